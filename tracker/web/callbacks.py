"""`POST /callbacks/flora`: FLORA reports that a run ended. The response follows the commit.

FLORA retries after anything but a 2xx, so a 2xx means that the callback is stored, and nothing else
is answered with one. A callback that arrives whole, as nearly all do, is taken without a task, and
answered past all middleware: see `Take`. All others, and all that are refused, are served as an
ASGI application.
"""

import asyncio
import logging
from functools import lru_cache, partial
from typing import Final, TypeVar

from starlette.types import Receive, Scope, Send

from tracker.core.errors import SettingsError, StoreError, StoreUnavailable
from tracker.core.log import LogRateLimit, add_log_context, get_logger
from tracker.core.net import CALLBACK_PATH
from tracker.core.record import TEST_DELIVERY, DeliveryOutcome
from tracker.flora.callback import SignatureError
from tracker.receiving.receive import Received, Receiving
from tracker.services import Services
from tracker.web.http import Limits
from tracker.web.http.request import ClientGone, header, read_body, too_slow
from tracker.web.http.responses import (
    Answer,
    Fault,
    PrebuiltResponse,
    assign_request_id,
    unavailable,
)

_RECEIVING: Final = "tracker.receiving"
"""The key of a callback in its scope that waits for its commit, or of why it is refused."""

E = TypeVar("E", bound=Exception)

log = get_logger(__name__)


@lru_cache(32)
def _response(outcome: DeliveryOutcome | str, repeated: bool) -> PrebuiltResponse:
    return PrebuiltResponse({"outcome": outcome, "repeated": repeated})


class Callbacks:
    """The endpoint."""

    def __init__(self, services: Services, *, limits: Limits) -> None:
        self._receiver = services.receiver
        self._metrics = services.metrics
        self._limit = limits.callback_bytes
        self._seconds = limits.callback_seconds
        self._logged = LogRateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one callback. Raises `Fault`."""
        if scope["method"] != "POST":
            raise Fault(405, "method_not_allowed", "FLORA posts here.", headers={"Allow": "POST"})
        started = asyncio.get_running_loop().time()
        body = None
        try:
            async with asyncio.timeout(self._seconds):
                body = await read_body(scope, receive, limit=self._limit, seconds=None)
                receiving = scope.pop(_RECEIVING, None) or self._receive(scope, body)
                if isinstance(receiving, Exception):
                    raise receiving
                delivery, stored = receiving
                add_log_context(delivery_id=delivery.delivery_id, run_id=delivery.run_id)
                received = await stored
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
            # No more details for the sender; "missing" points at a proxy that strips the header,
            # and "expired" is said only to one who knows the secret.
            words = error.reason if error.reason in ("missing", "expired") else "wrong"
            forged = Fault(401, "unauthorized", f"The signature is {words}.")
            is_test = header(scope, b"flora-event") == TEST_DELIVERY.encode()
            reason = "test_delivery" if is_test else error.reason
            raise self._refused(reason, forged) from error
        except SettingsError as error:
            # Without details, which are in the log: anyone may ask.
            closed = unavailable("This receiver is not set up to take callbacks.")
            raise self._refused("not set up", closed, error) from error
        await self._taken(received, started).send(scope, receive, send)

    def take(self, scope: Scope, body: bytes, answer: Answer) -> bool:
        """Take a callback whose body has arrived; see `Take`."""
        if not is_callback(scope["path"]) or scope["method"] != "POST" or len(body) > self._limit:
            return False
        started = asyncio.get_running_loop().time()
        try:
            receiving = self._receive(scope, body)
        except Exception as error:
            scope[_RECEIVING] = error  # `__call__` answers it
            return False
        scope[_RECEIVING] = receiving
        receiving[1].add_done_callback(partial(self._answer, scope, started, answer))
        return True

    def _answer(
        self, scope: Scope, started: float, answer: Answer, stored: asyncio.Future[Received]
    ) -> None:
        if stored.cancelled() or stored.exception() is not None:
            answer(None)
            return
        answer(self._taken(stored.result(), started).encode(assign_request_id(scope)))

    def _receive(self, scope: Scope, body: bytes) -> Receiving:
        signature = webhook_id = None
        for name, value in scope["headers"]:
            if name == b"flora-signature":
                signature = value if signature is None else b"%b,%b" % (signature, value)
            elif name == b"flora-webhook-id":
                webhook_id = value.decode("latin-1")
        token = scope["path"][len(CALLBACK_PATH) + 1 :].removesuffix("/")
        return self._receiver.receive(body, signature=signature, webhook_id=webhook_id, token=token)

    def _taken(self, received: Received, started: float) -> PrebuiltResponse:
        """Count and log a callback that is stored; its response."""
        if received.is_test:
            log.info("callback.test_delivery", delivery_id=received.delivery_id)
        else:
            seconds = asyncio.get_running_loop().time() - started
            self._metrics.callback_taken(received, seconds)
            if log.is_enabled(logging.DEBUG):  # cheaper than a call that logs nothing
                log.debug(
                    "callback.taken",
                    delivery_id=received.delivery_id,
                    run_id=received.run_id,
                    repeated=received.repeated,
                )
        return _response(received.outcome, received.repeated)

    def _refused(self, reason: str, answer: E, cause: Exception | None = None) -> E:
        """Count a refusal; log it at intervals, so that forged callbacks cannot fill the log."""
        self._metrics.count("callbacks_refused", reason.replace(" ", "_"))
        if count := self._logged.count(reason, now=asyncio.get_running_loop().time()):
            details = {} if cause is None else {"error": str(cause)}
            log.warning("callback.refused", reason=reason, count=count, **details)
        return answer


def is_callback(path: str) -> bool:
    """Whether `path` is the bare callback address or that of a start, with or without a slash at
    its end: FLORA posts to what was typed somewhere."""
    if not path.startswith(CALLBACK_PATH):
        return False
    token = path[len(CALLBACK_PATH) :].removesuffix("/")
    return not token or (token[0] == "/" and len(token) > 1 and "/" not in token[1:])
