"""OpenTelemetry traces: HTTP requests served, requests to FLORA, SQL statements.

Enabled by OTEL_EXPORTER_OTLP_ENDPOINT if `flora-run-tracker[otel]` is installed; otherwise nothing
of OpenTelemetry is loaded. Its SDK reads the other OTEL_ variables (service name, sampler,
headers). No span holds parameters of statements, bodies, headers, the token of a callback address,
or the query of a URL, which signs a link or authorizes an endpoint.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from sqlalchemy import Engine
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker import __version__
from tracker.core.log import get_logger
from tracker.core.net import hide_callback_token
from tracker.core.waiting import in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVICE: Final = "flora-run-tracker"
Wrap = Callable[[ASGIApp], ASGIApp]
"""Wraps an application in the tracing layer."""
_PATH: Final = "tracker.path"
"""Key in the scope for the real path, while the tracing layer sees one without a token."""

log = get_logger(__name__)


def untraced(app: ASGIApp) -> ASGIApp:
    """The application without a tracing layer."""
    return app


@asynccontextmanager
async def tracing(
    engines: Sequence[Engine],
    *,
    environ: Mapping[str, str] = os.environ,
    processor: "SpanProcessor | None" = None,
) -> AsyncIterator[Wrap]:
    """Trace these engines and all of httpx while the block lasts.

    Yields the layer for the HTTP application. `processor` receives the spans instead of the
    exporter. Only one block can be open per process.
    """
    if not environ.get(ENDPOINT):
        yield untraced
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor  # noqa: PLC0415
        from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        log.warning(
            "telemetry.not_installed",
            missing=error.name,
            advice=f"{ENDPOINT} is set: install flora-run-tracker[otel]",
        )
        yield untraced
        return
    provider = TracerProvider(resource=Resource.create(_names(environ)))
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
    http, sql = HTTPXClientInstrumentor(), SQLAlchemyInstrumentor()
    http.instrument(tracer_provider=provider, async_request_hook=_shorten_url)
    # The package declares an older SQLAlchemy than ours as its newest, and would do nothing.
    sql.instrument(engines=list(engines), tracer_provider=provider, skip_dep_check=True)
    log.info("telemetry.on", endpoint=_shown_url(environ[ENDPOINT]))
    try:
        yield partial(
            _without_tokens,
            OpenTelemetryMiddleware,
            tracer_provider=provider,
            default_span_details=_span_of,
            exclude_spans=["receive", "send"],
            excluded_urls="/healthz$,/readyz$,/metrics$",
        )
    finally:
        http.uninstrument()
        sql.uninstrument()
        await in_thread("tracing", provider.shutdown)  # sends the remaining spans


async def _shorten_url(span: "Span", request: object) -> None:
    """Called with the span of a request that we send, once it has its attributes."""
    attributes: Mapping[str, Any] = getattr(span, "attributes", None) or {}
    for name in ("http.url", "url.full"):  # by either of OpenTelemetry's conventions
        if name in attributes:
            span.set_attribute(name, _shown_url(attributes[name]))


def _shown_url(url: str) -> str:
    """A URL without what may be secret in it: user, query, and the token of a callback."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if not parts.netloc:
        return "(not a URL)"
    shown = parts._replace(
        netloc=parts.netloc.rpartition("@")[2],
        path=hide_callback_token(parts.path),
        query="",
        fragment="",
    )
    return shown.geturl()


def _without_tokens(traces: Callable[..., ASGIApp], app: ASGIApp, **options: Any) -> ASGIApp:
    """The tracing layer, which sees callback addresses without their token."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            scope[_PATH], scope["path"] = scope["path"], hide_callback_token(scope["path"])
        await traced(scope, receive, send)

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        if _PATH in scope:
            scope["path"] = scope.pop(_PATH)
        await app(scope, receive, send)

    traced = traces(inner, **options)
    return outer


def _names(environ: Mapping[str, str]) -> dict[str, str]:
    """Our name and version, unless the environment sets the name."""
    names = {"service.version": __version__}
    if name := environ.get("OTEL_SERVICE_NAME"):
        return names | {"service.name": name}
    named = "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return names if named else names | {"service.name": SERVICE}


def _span_of(scope: Scope) -> tuple[str, dict[str, Any]]:
    """A request's span, named by the beginning of its path, without ids."""
    parts = str(scope["path"]).split("/")
    path = "/".join([*parts[:3], "*"] if len(parts) > 3 else parts)
    return f"{scope['method']} {path}", {}
