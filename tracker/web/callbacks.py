"""`POST /callbacks/flora`: FLORA says that a run ended; it is answered once that is stored.

This is the path that takes the load, so it is plain ASGI. All it knows is HTTP: how long to wait,
how much to read, which answer means what to FLORA, which tries again after anything but a 2xx. A
2xx therefore says "kept", and nothing else may be answered with one.
"""

import asyncio
import logging
from typing import Final

import structlog
from starlette.types import Receive, Scope, Send

from tracker.core.errors import SettingsError, StoreError, StoreUnavailable
from tracker.core.net import CALLBACK_PATH
from tracker.core.rate_limited_log import Seldom
from tracker.core.record import TRIAL, DeliveryOutcome
from tracker.flora.signature import SignatureError
from tracker.operations.metrics import Metrics
from tracker.receiving.receive import Received, Receiver
from tracker.web.http.answers import Constant
from tracker.web.http.body import ClientGone, read_body, too_slow
from tracker.web.http.errors import Fault, unavailable
from tracker.web.http.limits import Bounds, Limits

log = structlog.get_logger(__name__)
_level = logging.getLogger(__name__)

_ANSWERS: Final = {
    (outcome, repeated): Constant({"outcome": outcome, "repeated": repeated})
    for outcome in DeliveryOutcome
    for repeated in (False, True)
}


LONGEST_TOKEN: Final = 64
"""Characters; a longer one is no token of ours, and counts as the bare address."""


class Callbacks:
    """The endpoint. `is_watched` says that a layer around it has to see what is answered."""

    def __init__(
        self, receiver: Receiver, metrics: Metrics, *, limits: Limits, is_watched: bool = False
    ) -> None:
        self._receiver = receiver
        self._metrics = metrics
        self._is_watched = is_watched
        self._limits = limits
        self._bounds = Bounds(limits.callback_seconds)
        self._refusals = _Refusals(metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one delivery; raises `Fault`."""
        if scope["method"] != "POST":
            raise Fault(405, "method_not_allowed", "FLORA posts here.", headers={"Allow": "POST"})
        loop = asyncio.get_running_loop()
        began = loop.time()
        signature, webhook_id, event = _headers(scope)
        token = _token(scope["path"])
        body = None
        try:
            with self._bounds.begin(began):
                body = await self._read(scope, receive)
                received = await self._receiver.receive(
                    body, signature=signature, webhook_id=webhook_id, token=token
                )
        except TimeoutError:
            if body is None:
                self._refusals.count("too slow")
                raise too_slow() from None
            self._refusals.count("not committed in time")
            raise unavailable("The delivery could not be committed in time.") from None
        except StoreUnavailable as error:
            self._refusals.count("database unavailable", error=str(error))
            raise unavailable("The delivery could not be committed.") from error
        except StoreError as error:
            self._refusals.count("not storable", error=str(error))
            # Whatever stopped it, FLORA comes again, and the next attempt may be stored.
            raise unavailable("The delivery could not be stored.") from error
        except SignatureError as error:
            self._refusals.count("trial" if event == TRIAL else error.reason)
            # Which of the two tells the sender nothing new, and whoever looks for what strips a
            # header on the way all there is to know.
            words = "missing" if error.reason == "missing" else "wrong"
            raise Fault(401, "unauthorized", f"The signature is {words}.") from error
        except SettingsError as error:
            self._refusals.count("not set up", error=str(error))
            # Not the message itself: whoever asks is a stranger, and the log has it.
            raise unavailable("This receiver is not set up to take callbacks.") from error
        if not received.trial:
            self._metrics.callback_taken(received, loop.time() - began)
        _say_taken(received)
        answer = _ANSWERS[received.outcome, received.repeated]
        if self._is_watched or not answer.write(scope):
            await answer.send(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.callback_bytes
        try:
            return await read_body(scope, receive, limit=limit, deadline=None)
        except Fault:
            self._refusals.count("too large")
            raise
        except ClientGone:
            self._refusals.count("cut off")
            raise


def _token(path: str) -> str | None:
    """The last part of a start's own callback address; `None` for the bare one."""
    _, below, token = path.rpartition(f"{CALLBACK_PATH}/")
    return token if below and 0 < len(token) <= LONGEST_TOKEN else None


def _headers(scope: Scope) -> tuple[str | None, str | None, str | None]:
    """`Flora-Signature` (several are one, as HTTP has it), `Flora-Webhook-Id`, `Flora-Event`."""
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


def _say_taken(received: Received) -> None:
    """The log's line about one delivery."""
    if received.trial:
        log.info("callback.trial", delivery_id=received.delivery_id)
    elif _level.isEnabledFor(logging.DEBUG):  # to ask costs less than to be passed over
        log.debug(
            "callback.taken",
            delivery_id=received.delivery_id,
            run_id=received.run_id,
            repeated=received.repeated,
        )


class _Refusals:
    """Says in the log that callbacks are refused, without letting strangers fill it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seldom = Seldom()

    def count(self, reason: str, **more: str) -> None:
        """Counts one, and says so unless it was said just now. Reasons are few, and fixed."""
        self._metrics.callback_refused(reason.replace(" ", "_"))
        if count := self._seldom.count(reason, now=asyncio.get_running_loop().time()):
            log.warning("callback.refused", reason=reason, count=count, **more)
