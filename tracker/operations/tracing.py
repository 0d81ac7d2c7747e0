"""Traces for OpenTelemetry, for who asks for them: requests to us, calls to FLORA, SQL statements.

They are on where OTEL_EXPORTER_OTLP_ENDPOINT says where they go and `flora-run-tracker[otel]` is
installed; else nothing of OpenTelemetry is loaded. What else the OTEL_ variables say (service name,
sampler, headers) is read by its SDK. No span holds parameters of statements, bodies, headers, or
the token of a callback address.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import Engine
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker import __version__
from tracker.core.net import hide_callback_token

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVICE: Final = "flora-run-tracker"
Wrap = Callable[[ASGIApp], ASGIApp]
"""Puts the tracing layer around an application."""
_PATH: Final = "tracker.path"
"""Where a request keeps its path while the tracing layer looks at it."""

log = structlog.get_logger(__name__)


def untraced(app: ASGIApp) -> ASGIApp:
    """The application as it is."""
    return app


@asynccontextmanager
async def tracing(
    engines: Sequence[Engine],
    *,
    environ: Mapping[str, str] = os.environ,
    processor: "SpanProcessor | None" = None,
) -> AsyncIterator[Wrap]:
    """Trace what these engines send, and all of httpx, for as long as the block lasts.

    Gives the layer for the HTTP side. `processor` takes the spans in place of a sender to the
    endpoint. Only one block of a process can be open at a time.
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
    http.instrument(tracer_provider=provider)
    # The package names an older SQLAlchemy than ours as its newest, and would do nothing.
    sql.instrument(engines=list(engines), tracer_provider=provider, skip_dep_check=True)
    log.info("telemetry.on", endpoint=environ[ENDPOINT])
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
        await asyncio.to_thread(provider.shutdown)  # it sends what is left


def _without_tokens(traces: Callable[..., ASGIApp], app: ASGIApp, **options: Any) -> ASGIApp:
    """The tracing layer, to which a start's callback address is shown without its token."""

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
    """Who we are, unless the environment says otherwise."""
    names = {"service.version": __version__}
    if name := environ.get("OTEL_SERVICE_NAME"):
        return names | {"service.name": name}
    named = "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return names if named else names | {"service.name": SERVICE}


def _span_of(scope: Scope) -> tuple[str, dict[str, Any]]:
    """A request's span, named by the beginning of its path: ids are many."""
    parts = str(scope["path"]).split("/")
    path = "/".join([*parts[:3], "*"] if len(parts) > 3 else parts)
    return f"{scope['method']} {path}", {}
