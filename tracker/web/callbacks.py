"""`POST /callbacks/flora`: FLORA reports that a run ended. The response follows the commit.

This path takes the load, so it is plain ASGI. It knows only HTTP: how long to wait, how much to
read, and which response FLORA gets. FLORA retries after anything but a 2xx, so a 2xx means that the
callback is stored, and nothing else is answered with one.
"""

import asyncio
import logging
from collections import deque
from types import TracebackType
from typing import Final, Self, TypeVar

from starlette.types import Receive, Scope, Send

from tracker.core.errors import SettingsError, StoreError, StoreUnavailable
from tracker.core.log import get_logger
from tracker.core.net import CALLBACK_PATH
from tracker.core.rate_limited_log import LogRateLimit
from tracker.core.record import TEST_DELIVERY, DeliveryOutcome
from tracker.flora.signature import SignatureError
from tracker.operations.tracing import untraced
from tracker.services import Services
from tracker.web.http.limits import Limits
from tracker.web.http.request import ClientGone, read_body, too_slow
from tracker.web.http.responses import Fault, PrebuiltResponse, unavailable

LONGEST_TOKEN: Final = 64
"""Characters of a start's token; a path with a longer one counts as the bare address."""

E = TypeVar("E", bound=Exception)

log = get_logger(__name__)

_RESPONSES: Final = {
    (outcome, repeated): PrebuiltResponse({"outcome": outcome, "repeated": repeated})
    for outcome in DeliveryOutcome
    for repeated in (False, True)
}


class Callbacks:
    """The endpoint."""

    def __init__(self, services: Services, *, limits: Limits) -> None:
        self._receiver = services.receiver
        self._metrics = services.metrics
        self._is_traced = services.traced is not untraced  # the trace has to see the response
        self._limit = limits.callback_bytes
        self._timeout = SharedTimeout(limits.callback_seconds)
        self._logged = LogRateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one callback. Raises `Fault`."""
        if scope["method"] != "POST":
            raise Fault(405, "method_not_allowed", "FLORA posts here.", headers={"Allow": "POST"})
        loop = asyncio.get_running_loop()
        started = loop.time()
        signature, webhook_id, event = _headers(scope)
        body = None
        try:
            with self._timeout.start(started):
                body = await read_body(scope, receive, limit=self._limit, deadline=None)
                received = await self._receiver.receive(
                    body, signature=signature, webhook_id=webhook_id, token=_token(scope["path"])
                )
        except TimeoutError:
            if body is None:
                raise self._refused("too slow", too_slow()) from None
            late = unavailable("The callback could not be committed in time.")
            raise self._refused("not committed in time", late) from None
        except ClientGone as gone:
            raise self._refused("cut off", gone) from None
        except Fault as too_large:
            raise self._refused("too large", too_large) from None
        except StoreUnavailable as error:
            down = unavailable("The callback could not be committed.")
            raise self._refused("database unavailable", down, error) from error
        except StoreError as error:
            failed = unavailable("The callback could not be stored.")  # FLORA's retry may be
            raise self._refused("not storable", failed, error) from error
        except SignatureError as error:
            # No more details for the sender; "missing" points at a proxy that strips the header.
            words = "missing" if error.reason == "missing" else "wrong"
            forged = Fault(401, "unauthorized", f"The signature is {words}.")
            reason = "test_delivery" if event == TEST_DELIVERY else error.reason
            raise self._refused(reason, forged) from error
        except SettingsError as error:
            # Without details, which are in the log: anyone may ask.
            closed = unavailable("This receiver is not set up to take callbacks.")
            raise self._refused("not set up", closed, error) from error
        if received.is_test:
            log.info("callback.test_delivery", delivery_id=received.delivery_id)
        else:
            self._metrics.callback_taken(received, loop.time() - started)
            if log.is_enabled(logging.DEBUG):  # cheaper than a call that logs nothing
                log.debug(
                    "callback.taken",
                    delivery_id=received.delivery_id,
                    run_id=received.run_id,
                    repeated=received.repeated,
                )
        response = _RESPONSES[received.outcome, received.repeated]
        if self._is_traced or not response.write(scope):
            await response.send(scope, receive, send)

    def _refused(self, reason: str, answer: E, cause: Exception | None = None) -> E:
        """Count a refusal; log it at intervals, so that forged callbacks cannot fill the log."""
        self._metrics.callback_refused(reason.replace(" ", "_"))
        if count := self._logged.count(reason, now=asyncio.get_running_loop().time()):
            details = {} if cause is None else {"error": str(cause)}
            log.warning("callback.refused", reason=reason, count=count, **details)
        return answer


def is_callback(path: str) -> bool:
    """Whether `path` is the bare callback address or that of a start."""
    if not path.startswith(CALLBACK_PATH):
        return False
    token = path[len(CALLBACK_PATH) :]
    return not token or (token[0] == "/" and len(token) > 1 and "/" not in token[1:])


def _token(path: str) -> str | None:
    """The token in a start's own callback address; `None` for the bare one."""
    token = path[len(CALLBACK_PATH) + 1 :]
    return token if 0 < len(token) <= LONGEST_TOKEN else None


def _headers(scope: Scope) -> tuple[str | None, str | None, str | None]:
    """`Flora-Signature` (repeated ones joined by commas), `Flora-Webhook-Id`, `Flora-Event`."""
    signature = webhook_id = event = None
    for name, value in scope["headers"]:
        if name == b"flora-signature":
            text = value.decode("latin-1")
            signature = text if signature is None else f"{signature},{text}"
        elif name == b"flora-webhook-id":
            webhook_id = value.decode("latin-1")
        elif name == b"flora-event":
            event = value.decode("latin-1")
    return signature, webhook_id, event


class SharedTimeout:
    """Limits many blocks to the same number of seconds: `with timeout.start(loop.time()):`.

    Like `asyncio.timeout`, but with one timer for all blocks: those that start first expire first.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: deque[_Block] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, now: float) -> "_Block":
        """A block that starts `now`, by the running loop's clock. It raises `TimeoutError`."""
        return _Block(self, now + self._seconds)

    def add(self, block: "_Block") -> None:
        """Watch a block that has started."""
        running = self._running
        while running and running[0].task is None:  # ended in time
            running.popleft()
        running.append(block)
        if self._timer is None:
            self._schedule(block)

    def _schedule(self, first: "_Block") -> None:
        self._timer = asyncio.get_running_loop().call_at(first.expires, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        running = self._running
        while running:
            first = running[0]
            if first.task is not None:
                if first.expires > now:
                    self._schedule(first)
                    return
                first.expired = True
                first.task.cancel()
            running.popleft()


class _Block:
    """`task` is the task in the block; `None` once it has left."""

    __slots__ = ("_cancelling", "_timeout", "expired", "expires", "task")

    def __init__(self, timeout: SharedTimeout, expires: float) -> None:
        self._timeout = timeout
        self.expires = expires
        self.expired = False
        self.task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self.task = task
        self._cancelling = task.cancelling()
        self._timeout.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self.task = self.task, None
        if not self.expired or task is None:
            return
        # Like asyncio.timeout: a task that someone else cancelled as well stays cancelled.
        if task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error
