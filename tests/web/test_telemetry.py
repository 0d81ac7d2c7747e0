"""Traces: only for who asks for them, and without anything that is nobody's business."""

import io
import sys
from collections.abc import Iterator
from copy import copy

import httpx
import pytest
from opentelemetry.instrumentation._semconv import _OpenTelemetrySemanticConventionStability
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.delivering.conftest import endpoint
from tests.support.endpoint import Receiver
from tests.support.logs import capture_logs
from tests.web import callbacks
from tests.web.callbacks import PATH, SECRET, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import serving
from tracker.core.clock import utc_now
from tracker.delivering.endpoints import send_test
from tracker.operations.telemetry import ENDPOINT, Wrap, configure_logs, tracing, untraced
from tracker.services import Services
from tracker.simulator import Options, running
from tracker.store.engine import Database
from tracker.web.app import build_app

pytestmark = pytest.mark.alone

ON = {ENDPOINT: "http://127.0.0.1:4318", "OTEL_SERVICE_NAME": "of the tests"}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Where the spans go in place of a collector."""
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


def traced_by(traced: Wrap, services: Services) -> Services:
    """The services, whose requests are traced."""
    traced_services = copy(services)
    traced_services.traced = traced
    return traced_services


async def test_a_callback_is_traced_to_the_statements(
    site: Site, spans: InMemorySpanExporter
) -> None:
    """On both engines: the request by its route, the SQL without its parameters, no secrets."""
    processor = SimpleSpanProcessor(spans)
    body = callbacks.event("run_traced")
    async with (
        tracing(site.services.database.engines, environ=ON, processor=processor) as traced,
        serving(build_app(traced_by(traced, site.services))) as base_url,
        httpx.AsyncClient(base_url=base_url) as client,
    ):
        spans.clear()
        assert (await client.post(PATH, content=body, headers=signed(body))).status_code == 200
        await site.services.applier.drain()
        assert (await client.get("/api/runs/run_traced/events")).status_code == 200
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200
    found = spans.get_finished_spans()
    served = [span.name for span in found if span.kind.name == "SERVER"]
    assert served == ["POST /callbacks/flora", "GET /api/runs/*"]
    statuses = [dict(span.attributes or {}) for span in found if span.kind.name == "SERVER"]
    assert [one["http.status_code"] for one in statuses] == [200, 200]
    told = " ".join(f"{span.name} {dict(span.attributes or {})}" for span in found)
    assert "INSERT INTO deliveries" in told
    assert "whd_run_traced" not in told
    assert SECRET not in told
    assert {span.resource.attributes["service.name"] for span in found} == {"of the tests"}


async def test_the_token_of_a_callback_address_shows_nowhere(
    serve: Serve,
    sqlite_url: str,
    spans: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in a span by either of OpenTelemetry's conventions, a line of the log, a metric or an
    answer, whether the callback is taken, refused, or came to an address that is almost right."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup")
    monkeypatch.setattr(_OpenTelemetrySemanticConventionStability, "_initialized", False)
    told = io.StringIO()
    configure_logs(format="json", level="debug", secrets=(), stream=told)
    body, address = callbacks.event(), f"{PATH}/a-token-of-one-start"
    async with serve(sqlite_url, tracker_api_token="a-token-for-the-api") as site:
        processor = SimpleSpanProcessor(spans)
        async with (
            tracing(site.services.database.engines, environ=ON, processor=processor) as traced,
            serving(build_app(traced_by(traced, site.services))) as base_url,
            httpx.AsyncClient(base_url=base_url) as client,
        ):
            answers = [
                await client.post(address, content=body, headers=signed(body)),
                await client.post(address, content=body, headers=signed(body, "another")),
                await client.get(address),
                await client.post(f"{address}/more", content=body, headers=signed(body)),
            ]
            assert [answer.status_code for answer in answers] == [200, 401, 405, 404]
            await site.services.applier.drain()
            token = {"Authorization": "Bearer a-token-for-the-api"}
            answers.append(await client.get("/metrics", headers=token))
            answers.append(await client.get("/api/deliveries", headers=token))
    # What asks here is traced too; its own spans have the address that it asked for.
    found = [span for span in spans.get_finished_spans() if span.kind.name != "CLIENT"]
    served = [dict(span.attributes or {}) for span in found if span.kind.name == "SERVER"]
    assert [one["url.path"] for one in served[:3]] == [f"{PATH}/*"] * 3
    assert served[0]["http.target"] == f"{PATH}/*"
    came_out = [span.to_json() for span in found]
    came_out += [told.getvalue(), *(f"{one.headers} {one.text}" for one in answers)]
    assert not [text for text in came_out if "a-token-of-one-start" in text]


async def test_a_call_to_flora_is_traced(small_site: Site, spans: InMemorySpanExporter) -> None:
    """With its status, and without the key."""
    async with (
        tracing((), environ=ON, processor=SimpleSpanProcessor(spans)),
        running(Options()) as flora,
        httpx.AsyncClient() as client,
    ):
        spans.clear()
        key = {"Authorization": "Bearer sk_test_simulator"}
        await client.get(f"{flora.base_url}/techniques", headers=key)
    (span,) = [span for span in spans.get_finished_spans() if span.kind.name == "CLIENT"]
    assert (span.attributes or {})["http.status_code"] == 200
    assert "sk_test" not in str(dict(span.attributes or {}))


@pytest.mark.parametrize("convention", ["", "http/dup"])
async def test_a_span_has_no_query_of_what_we_ask(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, convention: str
) -> None:
    """A query signs a link to a file, or authorizes an endpoint; the log does not show it either.
    Nor is the token of a callback address there, or the collector's password in the log."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", convention)
    monkeypatch.setattr(_OpenTelemetrySemanticConventionStability, "_initialized", False)
    collector = {ENDPOINT: "http://collector:pass-word@127.0.0.1:4318/?token=sec-ret"}
    with capture_logs() as lines:
        async with (
            Receiver() as receiver,
            tracing((), environ=collector, processor=SimpleSpanProcessor(spans)),
        ):
            for path in ("?key=sec-ret#sec-ret", "/callbacks/flora/sec-ret?key=sec-ret"):
                one = endpoint(receiver, url=f"{receiver.url}{path}")
                assert (await send_test(one, clock=utc_now)).delivered
    urls = [
        {text for name, text in (span.attributes or {}).items() if name in ("http.url", "url.full")}
        for span in spans.get_finished_spans()
    ]
    assert urls == [{receiver.url}, {f"{receiver.url}/callbacks/flora/*"}]
    assert not [span for span in spans.get_finished_spans() if "sec-ret" in span.to_json()]
    assert [one["endpoint"] for one in lines] == ["http://127.0.0.1:4318/"]


@pytest.mark.parametrize("address", ["http://[::1:4318", "user:hunter2@collector:4318"])
async def test_a_collector_s_address_that_is_no_url_stops_nothing(
    spans: InMemorySpanExporter, address: str
) -> None:
    """Nor is it shown: it may hold a password."""
    with capture_logs() as lines:
        async with tracing((), environ={ENDPOINT: address}, processor=SimpleSpanProcessor(spans)):
            pass
    assert [one["endpoint"] for one in lines] == ["(not a URL)"]


async def test_nothing_is_traced_unless_asked_for() -> None:
    """Without the variable nothing changes, and OpenTelemetry is not even looked for."""
    async with tracing((), environ={}) as traced:
        assert traced is untraced
    assert untraced(build_app) is build_app  # type: ignore[arg-type, comparison-overlap]


async def test_asking_without_the_extra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says what to install, and the service starts all the same."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with capture_logs() as lines:
        async with tracing((), environ=ON) as traced:
            assert traced is untraced
    (line,) = lines
    assert line["event"] == "telemetry.not_installed"
    assert "flora-run-tracker[otel]" in line["advice"]


async def test_tracing_ends_with_its_block(sqlite_url: str, spans: InMemorySpanExporter) -> None:
    """What comes afterwards is not recorded, and it can be opened again."""
    for _ in range(2):
        async with (
            await Database.open(sqlite_url) as database,
            tracing(database.engines, environ=ON, processor=SimpleSpanProcessor(spans)),
        ):
            await database.ping()
    assert spans.get_finished_spans()
    spans.clear()
    async with await Database.open(sqlite_url) as database:
        await database.ping()
    assert spans.get_finished_spans() == ()
