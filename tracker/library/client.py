"""`Tracker`: runs from Python, over the same services as the commands.

Here they are started and tracked, events and callbacks are handled, and the catalogue is read.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

from tracker.core.clock import utc_now
from tracker.core.errors import (
    FloraUnreachable,
    InvalidRequest,
    RateLimited,
    StartNotStored,
    StartPending,
    StoreUnavailable,
)
from tracker.core.events import HANDLER_SECONDS, MOST_OPEN
from tracker.core.formatting import money
from tracker.core.starts import check_tags
from tracker.errors import FloraError, SettingsError, TechniqueUnknown, TrackerError, TrackerNotOpen
from tracker.library.batches import BatchCalls
from tracker.library.inputs import (
    InputValues,
    check_seconds,
    check_text,
    check_texts,
    given_inputs,
    naming_fields,
    valid,
)
from tracker.library.opening import HandlerFunction
from tracker.library.reading import CLOSED_MEANWHILE
from tracker.library.run import ACTOR, EventName, Run, RunEvent, acting_here

if TYPE_CHECKING:
    from tracker.receiving.receive import Received
    from tracker.services import Services
    from tracker.store.queries.techniques import TechniqueRow

RETRY_EVERY: Final = 1.0
"""Seconds between two attempts of a start while FLORA or the database does not answer."""
PAGE_SIZE: Final = 100
SYNC_SECONDS: Final = 24.0
"""How long a call waits for FLORA's list of techniques."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCallback:
    """A callback that FLORA signed. `status` is `None` if this version does not understand it.

    It says that a run ended, and has neither outputs nor cost: the run's details are polled.
    """

    delivery_id: str
    event_type: str | None
    run_id: str | None
    status: str | None
    workspace_id: str | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Technique:
    """A technique as the catalogue has it; `run_cost` is USD for each run.

    `inputs` and `outputs` are FLORA's own objects; a list may leave them out, `technique` reads
    them. `obstacle` is why it cannot be started, if so. `defined_at` is when the definition was
    last read, `synced_at` when anything was; `gone_at` is when FLORA's list first lacked it.
    """

    technique_id: str
    slug: str | None
    name: str
    description: str | None
    run_cost: Decimal | None
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    obstacle: str | None
    synced_at: datetime | None
    defined_at: datetime | None
    gone_at: datetime | None

    @classmethod
    def _of(cls, row: "TechniqueRow") -> Self:
        """The value of a stored technique."""
        from tracker.core.starts import obstacle
        from tracker.flora.parse import ports

        values: dict[str, Any] = {one.name: getattr(row, one.name, None) for one in fields(cls)}
        values["obstacle"] = obstacle(ports(row.inputs))
        return cls(**values)

    def __hash__(self) -> int:
        return hash(self.technique_id)

    def __repr__(self) -> str:
        price = "" if self.run_cost is None else f" · {money(self.run_cost)}"
        return f"<Technique {self.slug or self.technique_id} · {self.name}{price}>"


class Tracker(BatchCalls):
    """A tracker on the database and the FLORA workspaces that the settings name.

    ::

        async with Tracker.from_env() as tracker:
            run = await tracker.start("icon-pack", {"prompt": "garden tools"})
            done = await run.wait()

    `worker` decides whether polling, sweeps and deliveries run in this process. By default they do
    where the tracker is mounted (`asgi`) or has handlers (`on`). Elsewhere another process may run
    them, or none: `wait` polls by itself what no process polls.

    Nothing is opened before `async with`. A tracker belongs to the event loop in which it was
    opened, is shared by all tasks there, and may be opened again after it was closed. All methods
    raise `TrackerNotOpen` where it is not open, and `StoreUnavailable` if the database does not
    answer; `tracker.errors` has all errors.
    """

    async def start(
        self,
        technique: str,
        inputs: InputValues = (),
        *,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        workspace_id: str | None = None,
        timeout: float | None = None,
    ) -> Run:
        """Start a run of a technique (its id or slug), once per `idempotency_key`.

        `inputs` has a value for each input, by its id: text, a number or a boolean, several in a
        list; `None` leaves an input out. Types come from the technique's definition. Inputs as the
        API takes them, `{"id", "type", "value"}` each, are possible too.

        The same key again returns the run that it started, and never pays twice. `timeout` is for
        how many seconds (by default 24) to try while FLORA or the database does not answer, and to
        wait where it is in doubt what became of the start.

        Raises `InvalidRequest` with every wrong field, `BudgetExceeded`, `IdempotencyConflict`,
        `StartPending` (start again with the same key), `StartUnresolved`, `FloraError`, and
        `SettingsError` without an API key.
        """
        from tracker.services import START_SECONDS
        from tracker.starting.start import StartRequest

        self._services()
        check_texts(workspace_id=workspace_id)
        timeout = valid("timeout", check_seconds, timeout)
        technique = valid("technique", check_text, technique)
        key = f"trk-{uuid4()}"
        if idempotency_key is not None:
            key = valid("idempotency_key", check_text, idempotency_key)
        checked = valid("tags", check_tags, tags or {})
        give_up = time.monotonic() + (START_SECONDS if timeout is None else timeout)
        request = StartRequest(
            technique=technique,
            inputs=given_inputs(inputs),
            workspace_id=workspace_id,
            idempotency_key=key,
            started_by=ACTOR,
            tags=checked,
        )
        with acting_here():
            while True:
                services = self._services()  # it may be closed meanwhile
                try:
                    wait = max(give_up - time.monotonic(), 0.0)
                    started = await services.starter.start(request, wait=wait)
                    return self._run(started.record)
                except RuntimeError as error:
                    if self._opened is None:  # httpx refuses to send when its client is closed
                        raise TrackerNotOpen(CLOSED_MEANWHILE) from error
                    raise
                except InvalidRequest as error:
                    raise naming_fields(error, inputs, request.inputs) from error
                except (
                    FloraUnreachable,
                    RateLimited,
                    StartNotStored,
                    StartPending,
                    StoreUnavailable,
                ) as error:
                    left = give_up - time.monotonic()
                    if left <= 0:
                        error.add_note(f"The idempotency key of the start is {key!r}.")
                        raise
                    await asyncio.sleep(min(RETRY_EVERY, left))

    async def track(
        self,
        run_id: str,
        *,
        technique: str | None = None,
        workspace_id: str | None = None,
        force: bool = False,
    ) -> Run:
        """Track a run that was started elsewhere.

        FLORA is asked first: raises `NotTracked`, and stores nothing, where it does not show the
        run or cannot be asked. With `force` it is tracked all the same.
        """
        run_id = valid("run_id", check_text, run_id)
        check_texts(technique=technique, workspace_id=workspace_id)
        services = self._services()
        with acting_here():
            track = services.tracker.track if force else services.tracker.track_shown
            tracked = await track(run_id, technique=technique, workspace_id=workspace_id)
        return self._run(tracked.record)

    def on(
        self,
        *events: EventName,
        name: str,
        workspace_id: str | None = None,
        technique_id: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        concurrency: int = MOST_OPEN,
        timeout: float = HANDLER_SECONDS,
    ) -> Callable[[HandlerFunction], HandlerFunction]:
        """Call the decorated function with a `RunEvent` for each event of the runs that match.

        The function is a `def` or an `async def`; it gets `run.settled` if no event is given, of
        the runs that match all filters::

            @tracker.on("run.settled", name="store-image", status="completed")
            async def store_image(event: RunEvent) -> None: ...

        The handler is an endpoint of the database under its `name`: an event is delivered at least
        once, also after a crash or a restart, and repeated by the schedule of endpoints until the
        function returns. An exception is a failed attempt; `tracker.errors.DoNotRetry` gives the
        message up. `tag` is `key=value`.

        At most `concurrency` calls run at a time, over all processes. After `timeout` seconds an
        attempt counts as failed: a coroutine is cancelled, a plain function goes on in its thread.
        Handlers are called where a worker runs; register them before the tracker is opened.

        Raises `SettingsError` for a wrong argument, a name that is taken, and an open tracker.
        """
        return self._register(
            lambda claim: RunEvent._of(claim, self._run),
            events=events or ("run.settled",),
            name=name,
            workspace_id=workspace_id,
            technique_id=technique_id,
            status=status,
            tag=tag,
            concurrency=concurrency,
            timeout=timeout,
        )

    def verify_callback(self, body: bytes, headers: Mapping[str, str]) -> VerifiedCallback:
        """The callback in a request that an application received itself; stores nothing.

        `body` are the raw bytes. Works on a tracker that is not open. Raises `SignatureError` if
        FLORA did not sign it, and `SettingsError` without a signing secret.
        """
        from tracker.flora.callback import delivery_of, observation_of, verify
        from tracker.receiving.receive import NoSecrets

        self._verifying.check_or_retry()
        settings = self._verifying.settings
        secrets = [secret for one in settings.all_workspaces for secret in one.clear_secrets]
        if not secrets:
            raise NoSecrets(
                "no signing secret is set, so no callback can be verified: set FLORA_WEBHOOK_SECRET"
            )
        signature, webhook_id = _signature_headers(body, headers)
        now = utc_now()
        verify(signature, body, secrets, now=now, tolerance=settings.tracker_signature_tolerance)
        delivery = delivery_of(body, at=now, webhook_id=webhook_id)
        seen = observation_of(body, at=now)
        return VerifiedCallback(
            delivery_id=delivery.delivery_id,
            event_type=delivery.event_type,
            run_id=delivery.run_id,
            status=None if isinstance(seen, str) else str(seen.status),
            workspace_id=delivery.workspace_id,
            created_at=delivery.created_at,
        )

    async def receive_callback(
        self, body: bytes, headers: Mapping[str, str], *, token: str | None = None
    ) -> "Received":
        """Store a callback that an application received itself, as `/callbacks/flora` does.

        Answer 2xx after it returns: the callback is on disk then, and is applied to its run at
        once. Answer 5xx to `StoreUnavailable`. `token` is what follows `/callbacks/flora/` in the
        address that was called. Raises `SignatureError` and `SettingsError` as `verify_callback`.
        """
        signature, webhook_id = _signature_headers(body, headers)
        _, received = self._services().receiver.receive(
            body, signature=signature, webhook_id=webhook_id, token=token
        )
        return await received

    async def techniques(
        self, text: str = "", *, gone: bool = False
    ) -> AsyncGenerator[Technique, None]:
        """The techniques of the catalogue by name: those with all words of `text` in their id,
        slug, name or description; with `gone` retired ones, too.

        FLORA's list is read first if no process has read it for six hours. If that fails, the
        stored ones are yielded; where there are none, raises `FloraError`, or `SettingsError`
        without an API key.
        """
        from tracker.store.queries import techniques as stored

        text = valid("text", check_text, text)
        services = self._services()
        error = await _sync(services)
        if error is not None and not (await stored.page(services.database, limit=1))[0]:
            raise error
        cursor: str | None = None
        while True:
            rows, cursor = await stored.page(
                self._services().database, query=text, gone=gone, cursor=cursor, limit=PAGE_SIZE
            )
            for row in rows:
                yield Technique._of(row)
            if cursor is None:
                return

    async def technique(self, technique: str) -> Technique:
        """A technique, by its id or slug, with its inputs and outputs.

        FLORA is read if the definition is not known or older than an hour. Raises
        `TechniqueUnknown`, and `FloraError` where nothing is known and FLORA cannot be read.
        """
        technique = valid("technique", check_text, technique)
        services = self._services()
        found = await services.catalogue.find(technique)
        if found is None:
            asked = "" if services.workspaces.keyed else "; FLORA_API_KEY is not set"
            raise TechniqueUnknown(
                f"there is no technique {technique!r}: `tracker.techniques()` yields all{asked}"
            )
        return Technique._of(found)


def _signature_headers(body: object, headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """`Flora-Signature` and `Flora-Webhook-Id`, whatever the case of their names.

    Several of the former, as a framework's headers may hold, are one with commas (RFC 9110, 5.3).
    Raises `InvalidRequest` for a body that was decoded: the signature covers its bytes.
    """
    if not isinstance(body, bytes | bytearray | memoryview):
        kind = type(body).__name__
        raise InvalidRequest(f"body: must be the raw bytes of the request, not {kind}")
    signature = webhook_id = None
    for name, value in valid("headers", _lower_pairs, headers):
        if name == "flora-signature":
            signature = value if signature is None else f"{signature},{value}"
        elif name == "flora-webhook-id":
            webhook_id = value
    return signature, webhook_id


def _lower_pairs(headers: Any) -> list[tuple[str, str]]:
    pairs: Any = headers.items() if hasattr(headers, "items") else headers
    return [(name.lower(), value) for name, value in pairs]


async def _sync(services: "Services") -> TrackerError | None:
    """Read FLORA's list if it is due; why that failed, if it did."""
    if not services.workspaces.keyed:
        return SettingsError("no technique is known, and FLORA cannot be asked: set FLORA_API_KEY")
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            report = await services.catalogue_sync.sync_if_due()
    except TimeoutError:
        return FloraError(f"FLORA has not answered for {SYNC_SECONDS:g} s: try again")
    errors = () if report is None else [one.error for one in report.lists]
    failure = next(filter(None, errors), None)
    return None if failure is None else FloraError(f"the techniques cannot be read: {failure}")
