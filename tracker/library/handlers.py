"""Handlers: functions that get the events of runs, registered with `Tracker.on`."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from tracker.core.errors import SettingsError
from tracker.library.run import Run

if TYPE_CHECKING:
    from tracker.delivering.handlers import Handler
    from tracker.store.writing.messages import Claim

EventName = Literal["run.settled", "run.lost", "run.cost_changed"]
"""What a handler can get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEventFields:
    """What the events of both trackers, asynchronous and blocking, have beside their run."""

    type: EventName
    timestamp: datetime
    message_id: str
    attempt: int

    @classmethod
    def _of(cls, claim: "Claim", run_of: Callable[[Mapping[str, Any]], object]) -> Self:
        """The event of a message; `run_of` makes the run of its JSON."""
        body = json.loads(claim.body)
        values: dict[str, Any] = {
            "type": body["type"],
            "timestamp": datetime.fromisoformat(body["timestamp"]),
            "message_id": claim.message_id,
            "attempt": claim.attempts + 1,
            "run": run_of(body["data"]),
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent(RunEventFields):
    """An event of a run, as a handler gets it.

    `type` is `run.settled`, `run.lost` or `run.cost_changed`; `timestamp` is when it happened.
    `message_id` is the same in every attempt to deliver the event to this handler; `attempt` counts
    them from 1. `run` is the run when the event's message was made; `await event.run.refresh()` is
    its present state.
    """

    run: Run


HandlerFunction = TypeVar("HandlerFunction", bound=Callable[[RunEvent], object])


def registering(
    known: "dict[str, Handler]",
    event_of: "Callable[[Claim], object]",
    *,
    name: str,
    **given: object,
) -> Callable[[HandlerFunction], HandlerFunction]:
    """A decorator that adds a function to the handlers that are `known` by name.

    The function gets the event that `event_of` makes. Raises `SettingsError`.
    """
    from pydantic import ValidationError

    from tracker.core.formatting import requirement
    from tracker.delivering.handlers import Handler
    from tracker.settings.model import HandlerSettings
    from tracker.store.queries.endpoints import HANDLER_URL, EndpointConfig

    try:
        settings = HandlerSettings.model_validate({"id": name, **given})
    except ValidationError as error:
        faults = "; ".join(
            f"{_argument(one['loc'])} {requirement(one['type'], one['msg'])}"
            for one in error.errors()
        )
        raise SettingsError(f"handler {name!r}: {faults}") from None

    def decorate(function: HandlerFunction) -> HandlerFunction:
        url = f"{HANDLER_URL}{_check(name, function)}"
        if name in known and known[name].config.url != url:  # else a cell or module is run again
            other = known[name].config.url.removeprefix(HANDLER_URL)
            raise SettingsError(
                f"handler {name!r}: {other} has this name already; names must differ"
            )
        call = getattr(function, "__call__", None)  # noqa: B004 - its kind, not whether it has one
        known[name] = Handler(
            config=EndpointConfig(
                endpoint_id=name, url=url, events=settings.events, filter=settings.filter
            ),
            call=lambda claim: cast("Callable[[object], object]", function)(event_of(claim)),
            is_async=any(map(inspect.iscoroutinefunction, (function, call))),
            concurrency=settings.concurrency,
            timeout=settings.timeout,
        )
        return function

    return decorate


def _argument(loc: tuple[int | str, ...]) -> str:
    first = str(loc[0]) if loc else ""
    return {"id": "name", "events": "event"}.get(first, first)


def _check(name: str, function: Callable[[Any], object]) -> str:
    """The function's name, to show. Raises `SettingsError` if it cannot be a handler."""
    if not callable(function):
        raise SettingsError(f"handler {name!r}: {function!r} is not a function")
    inner: Any = inspect.unwrap(getattr(function, "func", function))  # of a `partial` too
    shown = f"{inner.__module__}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise SettingsError(f"handler {name!r}: {shown} must not yield: its code would never run")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise SettingsError(
            f"handler {name!r}: {shown} must take one argument, the event"
        ) from None
    except ValueError:  # a function in C does not tell
        pass
    return shown
