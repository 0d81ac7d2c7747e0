"""Telemetry: the log, and OpenTelemetry traces.

Every log line of every library goes to stderr in one format; stdout is for the output of commands.
Lines are for people (`console`) or machines (`json`, one object a line). The last step redacts
known secrets, and whatever has the shape of one, in the finished line, including tracebacks.

Traces show HTTP requests served, requests to FLORA and SQL statements. They are enabled by
OTEL_EXPORTER_OTLP_ENDPOINT if `flora-run-tracker[otel]` is installed; otherwise nothing of
OpenTelemetry is loaded. Its SDK reads the other OTEL_ variables (service name, sampler, headers).
No span holds parameters of statements, bodies, headers, the token of a callback address, or the
query of a URL, which signs a link or authorizes an endpoint.
"""

import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.formatting import iso_time, plain, plain_lines
from tracker.core.log import LogEvent, get_logger, log_fields, redact, redact_also, shown
from tracker.core.net import hide_callback_token
from tracker.core.waiting import in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span
    from sqlalchemy import Engine

_QUIET: Final = {
    "httpx": logging.WARNING,  # a line per request, which our callers log themselves
    "httpcore": logging.WARNING,
    "apscheduler": logging.ERROR,  # lines per job run, and per one that waits for the one before
    "alembic": logging.WARNING,  # several lines per schema check
    "asyncio": logging.WARNING,
    "aiosqlite": logging.WARNING,
}
ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVICE: Final = "flora-run-tracker"
Wrap = Callable[[ASGIApp], ASGIApp]
"""Wraps an application in the tracing layer."""
_PATH: Final = "tracker.path"
"""Key in the scope for the real path, while the tracing layer sees one without a token."""

log = get_logger(__name__)


def configure_logs(
    *,
    format: Literal["console", "json"] | None = None,
    level: str = "info",
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send our own and other libraries' logs to `stream` (default: stderr).

    The default `format` is `console` on a terminal, else `json`. `secrets` are redacted in every
    line from now on. Another call replaces the rest of the configuration.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    if format is None:
        format = "console" if terminal else "json"
    colors = terminal and not os.environ.get("NO_COLOR")
    redact_also(secrets)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LineFormatter(format, colors=colors))
    handler.addFilter(_is_shown)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, lowest in _QUIET.items():
        logging.getLogger(name).setLevel(max(lowest, root.level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a record is logged. Not so what Python 3.14 and newer report with a traceback: that a
    shielded task failed whose caller was cancelled. Closing a connection to a database that is gone
    is such a task."""
    return record.name != "asyncio" or "exception in shielded future" not in record.getMessage()


_ATTRIBUTES: Final = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime"))
"""What every record has; all else is a field that its library has added."""
_BOLD, _DIM, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN = (
    f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 34, 35, 36)
)
_LEVELS: Final = {"debug": _GREEN, "info": _GREEN, "warning": _YELLOW}


class _LineFormatter(logging.Formatter):
    """Formats our own events with their fields, and other libraries' records with what they say."""

    def __init__(self, format: Literal["console", "json"], *, colors: bool) -> None:
        super().__init__()
        self._is_json = format == "json"
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        event: object = record.msg
        if isinstance(event, LogEvent):
            line = {**event.fields, "event": event.name}
        else:
            # What another library logs while a request is served has the request's id, too.
            added = {name: one for name, one in vars(record).items() if name not in _ATTRIBUTES}
            line = {**log_fields(), **added, "event": record.getMessage()}
        line |= {
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": iso_time(datetime.fromtimestamp(record.created, UTC)),
        }
        if record.stack_info:
            line["stack_info"] = record.stack_info
        if record.exc_info:  # without local variables, keys among them
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=repr) if self._is_json else self._for_people(line))

    def _for_people(self, line: dict[str, Any]) -> str:
        """A line, and a traceback below it. Quoted text moves no cursor and begins no line."""
        at, level, name, logger = map(line.pop, ("timestamp", "level", "event", "logger"))
        traceback = line.pop("exception", "")
        head = (
            self._in(_DIM, at),
            f"[{self._in(_LEVELS.get(level, _RED) + _BOLD, f'{level:<9}')}]",
            self._in(_BOLD, f"{plain(name):<30}"),
            f"[{self._in(_BOLD + _BLUE, logger)}]",
        )
        fields = (
            f"{self._in(_CYAN, name)}={self._in(_MAGENTA, shown(value))}"
            for name, value in sorted(line.items())
        )
        below = f"\n{plain_lines(traceback)}" if traceback else ""
        return " ".join((*head, *fields)) + below

    def _in(self, color: str, text: str) -> str:
        return f"{color}{text}\x1b[0m" if self._colors else text


# Traces


def untraced(app: ASGIApp) -> ASGIApp:
    """The application without a tracing layer."""
    return app


@asynccontextmanager
async def tracing(
    engines: "Sequence[Engine]",
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
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
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
    from tracker import __version__  # noqa: PLC0415 - commands that only log do not look it up

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
