"""`POST /callbacks/flora`: FLORA says that a run ended; it is answered once that is committed.

This is the path that takes the load, so it is plain ASGI. All it knows is HTTP: how long to wait,
how much to read, which answer means what to FLORA, which tries again after anything but a 2xx. A
2xx therefore says "kept", and nothing else may be answered with one.
"""

import asyncio
from typing import Final

import structlog
from starlette.types import Receive, Scope, Send

from tracker.core.errors import SettingsError, StoreUnavailable
from tracker.flora.signature import SignatureError
from tracker.web.answers import Json
from tracker.web.body import read_body
from tracker.web.faults import Fault, unavailable
from tracker.web.limits import Limits
from tracker.web.services import Receives

log = structlog.get_logger(__name__)

_SAY_AGAIN_AFTER: Final = 10.0
"""Seconds between two lines about refused callbacks: anybody can send one."""


class Callbacks:
    """The endpoint."""

    def __init__(self, receiver: Receives, *, limits: Limits) -> None:
        self._receiver = receiver
        self._limits = limits
        self._refusals = _Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one delivery; raises `Fault`."""
        if scope["method"] != "POST":
            raise Fault(405, "method_not_allowed", "FLORA posts here.", headers={"Allow": "POST"})
        deadline = asyncio.get_running_loop().time() + self._limits.callback_seconds
        body = await read_body(scope, receive, limit=self._limits.callback_bytes, deadline=deadline)
        signature, webhook_id = _headers(scope)
        try:
            async with asyncio.timeout_at(deadline):
                received = await self._receiver.receive(
                    body, signature=signature, webhook_id=webhook_id
                )
        except TimeoutError:
            self._refusals.count("not committed in time")
            raise unavailable("The delivery could not be committed in time.") from None
        except StoreUnavailable as error:
            self._refusals.count("database unavailable", error=str(error))
            raise unavailable("The delivery could not be committed.") from error
        except SignatureError as error:
            self._refusals.count(error.reason)
            raise Fault(401, "unauthorized", "The signature is missing or wrong.") from error
        except SettingsError as error:
            self._refusals.count("not set up", error=str(error))
            # Not the message itself: whoever asks is a stranger, and the log has it.
            raise unavailable("This receiver is not set up to take callbacks.") from error
        answer = Json({"outcome": received.outcome, "repeated": received.repeated})
        await answer(scope, receive, send)


def _headers(scope: Scope) -> tuple[str | None, str | None]:
    """`Flora-Signature` (several are one, as HTTP has it) and `Flora-Webhook-Id`."""
    signature = webhook_id = None
    for name, value in scope["headers"]:
        if name == b"flora-signature":
            text = value.decode("latin-1")
            signature = text if signature is None else f"{signature},{text}"
        elif name == b"flora-webhook-id":
            webhook_id = value.decode("latin-1")
    return signature, webhook_id


class _Refusals:
    """Says in the log that callbacks are refused, without letting strangers fill it."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._said_at: dict[str, float] = {}

    def count(self, reason: str, **more: str) -> None:
        """Counts one, and says so unless it was said just now. Reasons are few, and fixed."""
        now = asyncio.get_running_loop().time()
        self._counts[reason] = self._counts.get(reason, 0) + 1
        if now - self._said_at.get(reason, -_SAY_AGAIN_AFTER) < _SAY_AGAIN_AFTER:
            return
        self._said_at[reason] = now
        log.warning("callback.refused", reason=reason, count=self._counts.pop(reason), **more)
