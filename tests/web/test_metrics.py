"""`GET /metrics`: what a process did, and how things stand, in the words of Prometheus."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event

from tests.store.making import NOW, quarantined, seen, started
from tests.support.deliveries import keep
from tests.support.endpoint import SECRET as ENDPOINT_SECRET
from tests.support.endpoint import Receiver
from tests.support.logs import capture_logs
from tests.support.postgres import PostgresServer
from tests.support.scraping import Scrape, read_scrape, scrape
from tests.support.waiting import eventually
from tests.support.webhooks import add_endpoint
from tests.web import callbacks
from tests.web.callbacks import PATH, SECRET, signature, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import serving
from tracker.core.run import RunError, RunStatus
from tracker.operations.gauges import DatabaseGauges
from tracker.operations.metrics import Metrics
from tracker.services import Services, open_services
from tracker.settings import EndpointSettings, Settings
from tracker.simulator import Options, running
from tracker.store.engine import Database
from tracker.store.queries.endpoints import list_messages
from tracker.web.app import build_health_app

STATE = (
    *("tracker_runs", "tracker_oldest_due", "tracker_starts", "tracker_cost_today"),
    *("tracker_recent", "tracker_deliveries", "tracker_callback_last", "tracker_history"),
    *("tracker_sweep_last", "tracker_sweep_failed"),
)


async def post(site: Site, body: bytes, secret: str = SECRET, **headers: str) -> int:
    """Posts a signed callback; the status of the answer."""
    answer = await site.client.post(PATH, content=body, headers=signed(body, secret) | headers)
    return answer.status_code


@asynccontextmanager
async def opened(database_url: str, **more: Any) -> AsyncIterator[Services]:
    """Services as another process would have them."""
    async with open_services(Settings(tracker_database_url=database_url, **more)) as services:
        yield services


async def test_a_scrape_is_prometheus_text(small_site: Site) -> None:
    """Version 0.0.4 unless something newer is asked for, and each metric says what it means."""
    answer = await small_site.client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# HELP tracker_runs_due Runs due to be polled." in answer.text
    accept = "application/openmetrics-text;version=1.0.0"
    answer = await small_site.client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    answer = await small_site.client.get("/metrics", headers={"Accept": "text/plain;version=x"})
    assert answer.status_code == 200


async def test_callbacks_are_counted_by_outcome_and_secret(serve: Serve, sqlite_url: str) -> None:
    """By the position of the secret, and the secrets themselves are nowhere."""
    secrets = ("whsec_of_the_new_kind", "whsec_of_the_old_kind")
    async with serve(
        sqlite_url, flora_webhook_secret=" ".join(secrets), flora_workspace_id="ws_1"
    ) as site:
        assert (await scrape(site.client)).value("tracker_callbacks_total", secret=2) == 0
        for secret in (secrets[0], secrets[0], secrets[1]):
            assert await post(site, callbacks.event(), secret) == 200
        assert await post(site, b"?", secrets[1]) == 200
        await site.services.applier.drain()
        found = await scrape(site.client)
        text = (await site.client.get("/metrics")).text
    for secret, outcome, count in (
        *((1, "stored", 1), (1, "repeated", 1)),
        *((2, "stored", 1), (2, "repeated", 1)),
    ):
        labels = {"workspace_id": "ws_1", "secret": secret, "outcome": outcome}
        assert found.value("tracker_callbacks_total", **labels) == count, labels
    assert found.value("tracker_callback_seconds_count") == 4
    assert found.value("tracker_callbacks_applied_total", outcome="applied") == 1
    assert found.value("tracker_callbacks_applied_total", outcome="quarantined") == 1
    assert not any(secret in text for secret in secrets)


async def test_refused_callbacks_are_counted_by_reason(small_site: Site) -> None:
    """Each reason is there from the beginning, at zero."""
    body = callbacks.event()
    assert await post(small_site, body, "whsec_of_somebody_else") == 401
    assert (await small_site.client.post(PATH, content=body)).status_code == 401
    old = signature(body, at=NOW - timedelta(days=400))
    refused = await small_site.client.post(PATH, content=body, headers={"Flora-Signature": old})
    assert refused.status_code == 401
    assert refused.json()["error"]["message"] == "The signature is expired."
    assert await post(small_site, b"x" * (256 * 1024 + 1)) == 413
    found = (await scrape(small_site.client)).of("tracker_callbacks_refused_total")
    counts = {dict(labels)["reason"]: value for (_, labels), value in found.items()}
    assert {reason for reason, count in counts.items() if count} == {
        *("mismatch", "missing", "expired", "too_large")
    }
    assert set(counts.values()) == {0, 1}


async def test_a_receiver_without_secrets_is_counted_as_not_set_up(
    serve: Serve, sqlite_url: str
) -> None:
    """So that an alert can tell it from a wrong signature."""
    async with serve(sqlite_url, flora_webhook_secret="") as site:
        assert await post(site, callbacks.event()) == 503
        found = await scrape(site.client)
    assert found.value("tracker_callbacks_refused_total", reason="not_set_up") == 1


async def test_commits_and_ends_are_counted(site: Site) -> None:
    """How many entries share a commit, how long it takes, and who told the end first, how late."""
    at = NOW + timedelta(seconds=40)
    ended = {"completed_at": NOW, "created_at": NOW - timedelta(minutes=1)}
    details = {"outputs": (), "charged_cost": 1, **ended}
    await site.services.writer.submit_all([started("run_1"), started("run_2")])
    await post(site, callbacks.event("run_1"))
    await site.services.applier.drain()
    await site.services.writer.submit_all(
        [
            seen("run_1", RunStatus.COMPLETED, at=at, facts=details, reads=1),
            seen("run_2", RunStatus.FAILED, at=at, facts=ended, reads=1),
        ]
    )
    found = await scrape(site.client)
    assert found.value("tracker_commit_entries_sum") == 6  # a callback is stored, and applied
    assert found.value("tracker_commit_seconds_count") == 4
    ends = {"source": "poll", "status": "failed"}
    assert found.value("tracker_run_ends_total") == 2
    assert found.value("tracker_run_ends_total", source="callback", status="completed") == 1
    assert found.value("tracker_run_ends_total", **ends) == 1
    assert found.value("tracker_end_lag_seconds_sum", source="poll") == 40
    assert found.value("tracker_settle_lag_seconds_sum", source="callback") == 40
    assert found.value("tracker_settle_lag_seconds_bucket", source="poll", le="30.0") == 0
    assert found.value("tracker_settle_lag_seconds_bucket", source="poll", le="60.0") == 1


async def test_a_run_that_had_ended_before_it_was_heard_of_has_no_lag(small_site: Site) -> None:
    """What a first sweep finds says nothing about how soon ends are known."""
    old = {"completed_at": NOW - timedelta(days=3), "created_at": NOW - timedelta(days=3)}
    await small_site.services.writer.submit(seen("run_old", RunStatus.FAILED, facts=old, reads=1))
    found = await scrape(small_site.client)
    assert found.value("tracker_adopted_runs_total") == 1
    assert found.value("tracker_run_ends_total") == 0
    assert found.value("tracker_end_lag_seconds_count") is None


async def test_failed_writes_are_counted(serve: Serve, own_postgres: PostgresServer) -> None:
    """While the database is down nothing is said of its state but that, and the answer is 200."""
    async with serve(own_postgres.url("tracker")) as site:
        await post(site, callbacks.event())
        await site.services.applier.drain()
        site.services.metrics._gauges.keep_seconds = 0  # type: ignore[union-attr]
        assert (await scrape(site.client)).value("tracker_database_up") == 1
        await asyncio.to_thread(own_postgres.stop)
        posting = asyncio.create_task(post(site, callbacks.event("run_2")))

        async def noticed() -> bool:
            found = await scrape(site.client)
            failures = found.value("tracker_database_write_failures_total", reason="unavailable")
            return found.value("tracker_database_up") == 0 and bool(failures)

        await eventually(noticed)
        found = await scrape(site.client)
        assert not found.of(*STATE)
        assert found.value("tracker_queue_entries") == 1
        await asyncio.to_thread(own_postgres.start)
        assert await posting in (200, 503)
        await eventually(lambda: _is_up(site))


async def _is_up(site: Site) -> bool:
    return (await scrape(site.client)).value("tracker_database_up") == 1


async def test_a_database_that_hangs_delays_a_scrape_for_a_bounded_time(
    postgres_url: str,
) -> None:
    """Prometheus gets an answer before it gives up."""
    async with opened(postgres_url) as services, await Database.open(postgres_url) as other:
        state = DatabaseGauges(
            database=services.database,
            workspaces=services.workspaces,
            contacts=services.contacts,
            budgets=services.budgets,
            clock=services.clock,
            process="a-test",
            patience=0.2,
        )
        async with other.engine.connect() as blocker:
            await blocker.exec_driver_sql("SET TRANSACTION READ WRITE")
            await blocker.exec_driver_sql("LOCK TABLE deliveries IN ACCESS EXCLUSIVE MODE")
            await state.refresh()
        told = {family.name: family.samples for family in state.collect()}
    assert told.keys() == {"tracker_database_up", "tracker_state_read_seconds"}
    assert told["tracker_database_up"][0].value == 0


async def test_every_process_reports_the_same_state(database_url: str, serve: Serve) -> None:
    """State comes from the database; what a process did itself is told by that process alone."""
    async with serve(database_url) as site, opened(database_url) as other:
        await keep(site.services.database, quarantined("whd_x"))
        await site.services.writer.submit_all([started("run_1"), seen("run_2", at=NOW)])
        here = await scrape(site.client)
        there = read_scrape((await other.metrics.exposition())[0].decode())
    assert here.of(*STATE).names >= {"tracker_runs", "tracker_deliveries_quarantined"}
    differing = {"tracker_oldest_due_seconds"}  # it is an age, and time went on
    assert {k: v for k, v in here.of(*STATE).items() if k[0] not in differing} == {
        k: v for k, v in there.of(*STATE).items() if k[0] not in differing
    }
    assert here.value("tracker_deliveries_quarantined") == 1
    assert (
        here.value("tracker_commit_entries_sum"),
        there.value("tracker_commit_entries_sum"),
    ) == (2, 0)


async def test_scrapes_ask_the_database_once_in_a_while(small_site: Site) -> None:
    """However many scrape at the same moment, and however often."""
    sent: list[str] = []
    small_site.services.metrics._gauges.keep_seconds = 600  # type: ignore[union-attr]

    def hear(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        await asyncio.gather(*(scrape(small_site.client) for _ in range(8)))
        once = len([one for one in sent if "quarantined" in one])
        await scrape(small_site.client)
        again = len([one for one in sent if "quarantined" in one])
    finally:
        event.remove(Engine, "before_cursor_execute", hear)
    assert (once, again) == (1, 1)


async def test_calls_to_flora_are_counted_by_endpoint_and_status(
    serve: Serve, sqlite_url: str
) -> None:
    """With the state of the budget and of the breaker, by workspace."""
    async with (
        running(Options()) as flora,
        serve(
            sqlite_url,
            flora_base_url=flora.base_url,
            flora_api_key="sk_test_revoked",
            flora_workspace_id="ws_1",
        ) as site,
    ):
        before = await scrape(site.client)
        start = {"technique": "tech_1", "inputs": [{"id": "a", "type": "text", "value": "v"}]}
        assert (await site.client.post("/api/runs", json=start)).status_code == 502
        found = await scrape(site.client)
    assert before.value("tracker_flora_breaker_open", workspace_id="ws_1") == 0
    assert found.value("tracker_flora_breaker_open", workspace_id="ws_1") == 1
    refused = found.of("tracker_flora_requests_total")
    assert {dict(labels)["status"] for _, labels in refused} == {"401"}
    assert {dict(labels)["workspace_id"] for _, labels in refused} == {"ws_1"}
    assert found.value("tracker_flora_request_seconds_count") == sum(refused.values())
    assert found.value("tracker_flora_requests_in_flight", workspace_id="ws_1") == 0
    assert "tracker_flora_budget_rate" not in found.names  # no limit was met


async def test_metrics_need_the_token_where_one_is_set(serve: Serve, sqlite_url: str) -> None:
    """Without a token they are refused, on the worker's port too."""
    async with serve(sqlite_url, tracker_api_token="a-token-of-the-tests") as site:
        bearer = {"Authorization": "Bearer a-token-of-the-tests"}
        assert (await site.client.get("/metrics")).status_code == 401
        assert (await site.client.get("/metrics", headers=bearer)).status_code == 200
        async with (
            serving(build_health_app(site.services)) as base_url,
            httpx.AsyncClient(base_url=base_url) as client,
        ):
            assert (await client.get("/metrics")).status_code == 401
            assert (await client.get("/metrics", headers=bearer)).status_code == 200


def test_two_sets_of_metrics_share_nothing() -> None:
    """A test, or a program that opens the services twice, counts each apart."""
    one, other = Metrics(clock=lambda: NOW), Metrics(clock=lambda: NOW)
    one.count("worker_job_failures", "poll")
    name, labels = "tracker_worker_job_failures_total", {"task": "poll"}
    assert one.registry.get_sample_value(name, labels) == 1
    assert other.registry.get_sample_value(name, labels) is None


async def test_the_log_names_the_request_and_the_delivery(small_site: Site) -> None:
    """Each line has those that it is about, and nothing of the requests before."""
    strange, unsigned = callbacks.event("run_1", type="run.sung"), callbacks.event("run_2")
    with capture_logs() as lines:
        for body, headers in ((strange, signed(strange)), (unsigned, {})):
            number = {"X-Request-Id": f"number-{len(headers)}"}
            await small_site.client.post(PATH, content=body, headers=headers | number)
            await small_site.services.applier.drain()
    quarantined, refused = [line for line in lines if line["event"].startswith("callback.")]
    assert (quarantined["event"], quarantined["delivery_id"]) == (
        "callback.quarantined",
        "whd_run_1",
    )
    assert "request_id" not in quarantined  # it was applied by itself
    assert (refused["event"], refused["request_id"]) == ("callback.refused", "number-0")
    assert "delivery_id" not in refused


@pytest.mark.parametrize("given", [b"req-7.of_a_proxy", b"bad id", b"", b"x" * 65])
async def test_each_answer_has_the_number_of_its_request(small_site: Site, given: bytes) -> None:
    """The proxy's own where it is fit for a log, else a new one."""
    answer = await small_site.client.get("/healthz", headers=[(b"X-Request-Id", given)])
    number = answer.headers["X-Request-Id"]
    assert (number == given.decode()) == (given == b"req-7.of_a_proxy")
    assert 8 <= len(number) <= 64


async def test_bills_and_failures_are_reported(site: Site) -> None:
    """What today's runs cost at least, what the others were quoted, how many may still be billed
    and how many never were; failed ones by what to do, unknown codes counted."""
    now = site.services.clock()
    site.services.metrics._gauges.clock = lambda: now  # type: ignore[union-attr]
    ended = {"completed_at": now, "workspace_id": "ws_1"}
    quote = {"workspace_id": "ws_1", "charged_cost": Decimal("0.25")}
    old = now - timedelta(days=2)
    for run_id in ("run_1", "run_2"):
        await site.services.writer.submit(started(run_id, at=now, facts=quote))
    await site.services.writer.submit_all(
        [
            seen("run_1", RunStatus.COMPLETED, at=now, facts=ended),
            seen("run_2", RunStatus.COMPLETED, at=now, facts=ended | {"charged_cost": Decimal(1)}),
            seen("run_3", RunStatus.COMPLETED, at=now, facts=ended | {"completed_at": old}),
            seen("run_4", RunStatus.FAILED, at=now, facts=ended | {"error": RunError("new_code")}),
            seen("run_5", RunStatus.FAILED, at=now, facts=ended | {"error": RunError("BILLING_X")}),
        ]
    )
    found = await scrape(site.client)
    assert found.value("tracker_cost_today_usd", workspace_id="ws_1") == 1
    assert found.value("tracker_quoted_today_usd", workspace_id="ws_1") == 0.25
    assert found.value("tracker_runs_cost_not_final", workspace_id="ws_1") == 4
    assert found.value("tracker_runs_unpriced", workspace_id="ws_1") == 1
    labels = {"workspace_id": "ws_1", "retry_advice": "not_retryable"}
    assert found.value("tracker_failed_today", **labels) == 2
    assert found.value("tracker_unknown_error_codes_total") == 1


async def test_deliveries_to_endpoints_are_measured(serve: Serve, sqlite_url: str) -> None:
    """Attempts by outcome and the delay, from zero for each endpoint of the settings; whether it
    works, and what waits for it."""
    async with Receiver() as receiver:
        shop = EndpointSettings(
            id="shop", url=receiver.url, secrets=[ENDPOINT_SECRET], allow_private=True
        )
        async with serve(sqlite_url, endpoints=(shop,)) as site:
            await add_endpoint(site.services.database, "shop", url=receiver.url)
            first = await scrape(site.client)
            await site.services.webhooks.start()
            try:
                receiver.script, receiver.headers = [500], {"Retry-After": "3600"}
                now = site.services.clock()
                await site.services.writer.submit(
                    seen("run_1", RunStatus.COMPLETED, at=now, facts={"completed_at": now}, reads=1)
                )
                [failed] = await eventually(lambda: _pending(site))
                await site.services.webhooks.resend(failed)
                await eventually(lambda: receiver.taken)

                async def delivered() -> Scrape | None:
                    found = await scrape(site.client)
                    count = found.value(
                        "tracker_message_delivery_seconds_count", endpoint_id="shop"
                    )
                    return found if count == 1 else None

                found = await eventually(delivered)
            finally:
                await site.services.webhooks.stop()
    for outcome, count in (("delivered", 1), ("refused", 1), ("no_answer", 0)):
        labels = {"endpoint_id": "shop", "outcome": outcome}
        assert first.value("tracker_message_attempts_total", **labels) == 0
        assert found.value("tracker_message_attempts_total", **labels) == count
    for name, value in (("endpoint_up", 1), ("endpoint_disabled", 0), ("messages_pending", 0)):
        assert first.value(f"tracker_{name}", endpoint_id="shop") == value


async def _pending(site: Site) -> list[str]:
    """The messages that were tried and wait for their next attempt."""
    rows, _ = await list_messages(site.services.database, state="pending")
    return [row.message_id for row in rows if row.attempts]
