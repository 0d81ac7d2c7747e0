"""One test delivery, sent to the public URL as FLORA would send it, and what its answer means.

It is signed like FLORA's and has a type of its own, so the tracker stores it like any other and
applies it to nothing. Errors of the tracker itself are JSON of a known shape with a request id;
everything else comes from what stands in front of it.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from time import monotonic
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from tracker import __version__
from tracker.core.formatting import plain
from tracker.core.net import CALLBACK_PATH as _PATH
from tracker.core.net import is_loopback_url
from tracker.core.record import TEST_DELIVERY, TEST_DELIVERY_IDS
from tracker.flora.callback import sign
from tracker.flora.http import NoCookies

FLORA_WAITS: Final = 10.0
"""Seconds that FLORA waits for an answer."""
_CONNECT_SHARE: Final = 0.5
"""Of that time, how much may pass until there is a connection."""
LONGEST_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are read; the tracker's own has fifty."""
LONGEST_QUOTE: Final = 120
_SERVER: Final = "`tracker serve`"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorDelivery:
    """One test delivery. Body and signature are not shown."""

    delivery_id: str
    body: bytes = field(repr=False)
    signature: str = field(repr=False)

    @classmethod
    def signed(cls, secret: str, now: datetime, *, size: int = 0) -> "DoctorDelivery":
        """A delivery signed with `secret`, padded to `size` bytes."""
        delivery_id = f"{TEST_DELIVERY_IDS}{token_hex(12)}"
        fields = {
            "id": delivery_id,
            "type": TEST_DELIVERY,
            "created_at": int(now.timestamp() * 1000),
        }
        body = json.dumps(fields).encode()
        missing = size - len(body) - len(b', "padding": ""')
        if missing > 0:
            body = body[:-1] + b', "padding": "' + b"x" * missing + b'"}'
        return cls(delivery_id=delivery_id, body=body, signature=sign(body, secret, at=now))

    @classmethod
    def forged(cls, now: datetime) -> "DoctorDelivery":
        """A delivery signed with an unknown secret."""
        return cls.signed(f"whsec_{token_hex(16)}", now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, or why there was none (`kind` and `error`).

    `seconds` is how long it took, or the limit that it exceeded; `expires` is the end of the
    server's certificate.
    """

    kind: Literal["answer", "timeout", "certificate", "unreachable"]
    seconds: float
    error: str = ""
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    content: dict[str, Any] = field(default_factory=dict)
    expires: datetime | None = None

    @property
    def error_message(self) -> str | None:
        """The message of an error of the tracker itself; `None` for any other answer."""
        match self.content.get("error"):
            case {"code": str(), "message": message} if "x-request-id" in self.headers:
                return str(message)
        return None

    @property
    def to_sign_in(self) -> bool:
        """Whether the tracker redirects to its sign-in, as it does for protected paths."""
        path = self.headers.get("location", "").partition("?")[0]
        return self.status == 303 and path.endswith("/login") and "x-request-id" in self.headers

    @property
    def signature(self) -> Literal["missing", "expired", "wrong"] | None:
        """Why the tracker refused the signature, if it did."""
        message = self.error_message or ""
        if self.status != 401 or "signature is" not in message:
            return None
        if "missing" in message:
            return "missing"
        return "expired" if "expired" in message else "wrong"

    @property
    def outcome(self) -> str | None:
        """What the tracker did with the delivery, if it accepted it."""
        outcome = self.content.get("outcome")
        return outcome if self.status == 200 and isinstance(outcome, str) else None


Send = Callable[[DoctorDelivery], Awaitable[Reply]]
"""Sends a test delivery to one URL; never raises for what the other end does."""


async def _send(
    http: httpx.AsyncClient, url: str, timeout: float, delivery: DoctorDelivery
) -> Reply:
    began = monotonic()
    headers = {
        "Content-Type": "application/json",
        "Flora-Signature": delivery.signature,
        "Flora-Webhook-Id": delivery.delivery_id,
        "Flora-Event": TEST_DELIVERY,
    }
    try:
        async with (
            asyncio.timeout(timeout),
            http.stream("POST", url, content=delivery.body, headers=headers) as response,
        ):
            expires = _certificate_end(response)
            content = await _json(response)
        return Reply(
            kind="answer",
            seconds=monotonic() - began,
            status=response.status_code,
            headers=response.headers,
            content=content,
            expires=expires,
        )
    except httpx.ConnectTimeout:
        seconds = timeout * _CONNECT_SHARE
        error = f"there is no connection within {seconds:g} s"
        return Reply(kind="unreachable", seconds=seconds, error=error)
    except (httpx.TimeoutException, TimeoutError):
        return Reply(kind="timeout", seconds=timeout)  # as measured, it would be a little more
    except (httpx.HTTPError, OSError, ssl.SSLError) as error:
        untrusted = _certificate_error(error)
        return Reply(
            kind="unreachable" if untrusted is None else "certificate",
            seconds=monotonic() - began,
            error=untrusted or str(error) or type(error).__name__,
        )


@asynccontextmanager
async def open_sender(url: str, timeout: float) -> AsyncIterator[Send]:
    """A sender to `url`; each answer may take `timeout` seconds, half of them to connect. Redirects
    are not followed; FLORA follows none."""
    async with httpx.AsyncClient(
        headers={"user-agent": f"flora-run-tracker/{__version__} (doctor)"},
        cookies=NoCookies(),
        timeout=httpx.Timeout(timeout, connect=timeout * _CONNECT_SHARE),
        follow_redirects=False,
        trust_env=not is_loopback_url(url),
    ) as http:
        yield partial(_send, http, url, timeout)


async def _json(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; empty if it has none, or is too large."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LONGEST_ANSWER:
            return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _certificate_end(response: httpx.Response) -> datetime | None:
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("ssl_object") if stream is not None else None
    shown = connection.getpeercert() if connection is not None else None
    if not shown or "notAfter" not in shown:
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)


def _certificate_error(error: BaseException | None) -> str | None:
    """What is wrong with a certificate, if that is the cause."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or "it cannot be verified"
        error = error.__cause__ or error.__context__
    return None


class Diagnosis(NamedTuple):
    """What happened, as a clause that continues "a delivery", and what to do."""

    seen: str
    advice: str


def diagnose(reply: Reply) -> Diagnosis:
    """Why a delivery was not accepted as it should be."""
    if reply.kind != "answer":
        return _no_answer(reply)
    if reply.error_message is not None or reply.to_sign_in:
        return _by_the_tracker(reply)
    return _in_front(reply)


def _no_answer(reply: Reply) -> Diagnosis:
    if reply.kind == "timeout":
        return Diagnosis(
            f"gets no answer within {reply.seconds:g} s, when FLORA gives up an attempt",
            f"Check that {_SERVER} runs and answers on its own port (`curl http://127.0.0.1:8080"
            "/healthz`), that the proxy in front forwards to that port, and that no firewall "
            "drops requests.",
        )
    if reply.kind == "certificate":
        return Diagnosis(
            f"is not sent, because the certificate is not valid: {_quote(reply.error)}",
            "Give the proxy in front a certificate for this name, from a public authority, with "
            "its whole chain (for example with Caddy or certbot), and renew it in time.",
        )
    return Diagnosis(
        f"cannot be sent: {_quote(reply.error)}",
        f"Start {_SERVER} and the proxy in front, and open this address and port in the firewall. "
        "If this machine cannot reach its own public address (a router without hairpin NAT), run "
        "the doctor elsewhere, with the same settings.",
    )


def _by_the_tracker(reply: Reply) -> Diagnosis:
    message = reply.error_message or ""
    seen = f"is answered {reply.status} by the tracker: {_quote(message)}"
    match reply.status:
        case 401 if reply.signature == "missing":
            return Diagnosis(
                "arrives without its Flora-Signature header",
                "Let the proxy in front forward all request headers; it drops this one.",
            )
        case 401 if reply.signature == "wrong":
            return Diagnosis(
                seen,
                f"{_SERVER} has another FLORA_WEBHOOK_SECRET than the doctor: restart it with the "
                "same settings. If it has the same, the proxy in front changes the body (it must "
                "forward the bytes unchanged).",
            )
        case 401 if reply.signature == "expired":
            return Diagnosis(
                seen,
                f"The secret is right, but the clock of this machine or of that of {_SERVER} is "
                "wrong: set both by NTP (`timedatectl`).",
            )
        case 303 | 401 | 403 | 404 | 405:
            # With a token, an unknown route looks like a protected one.
            return Diagnosis(
                f"arrives at the tracker, but not as POST {_PATH} ({reply.status})",
                "Let the proxy in front forward method and path unchanged, without adding or "
                "removing a prefix; TRACKER_PUBLIC_URL includes the path below which it forwards.",
            )
        case 503 if "not set up" in message:
            return Diagnosis(
                "is answered 503 by the tracker, which has no signing secret",
                f"Set FLORA_WEBHOOK_SECRET where {_SERVER} runs too, and restart it.",
            )
        case 503:
            return Diagnosis(
                seen,
                f"The database does not accept writes from {_SERVER} in time: its log says why "
                "(callback.refused).",
            )
    return Diagnosis(seen, f"The log of {_SERVER} says more, at the same time.")


_FORWARD: Final = f"Let the proxy in front forward POST {_PATH} to {_SERVER}"
_ADVICE_IN_FRONT: Final = {
    (401, 403, 407): f"Allow {_PATH} without a sign-in, an address list or a bot filter: FLORA has "
    "none of these, and its deliveries are signed.",
    (404, 405, 410): f"{_FORWARD}, or fix the name, port or path in TRACKER_PUBLIC_URL.",
    (413,): "Let the proxy in front accept bodies of 256 KiB (nginx: client_max_body_size 1m).",
    (429,): f"Remove the rate limit for {_PATH}: callbacks of a batch come in bursts.",
}


def _in_front(reply: Reply) -> Diagnosis:
    seen = f"is answered {reply.status} by something in front of the tracker"
    match reply.status:
        case code if 200 <= code < 300:
            return Diagnosis(
                f"{seen}, and does not reach it: FLORA counts it as delivered",
                f"{_FORWARD}; now another site, a start page, or a sign-in answers.",
            )
        case code if 300 <= code < 400:
            return Diagnosis(
                f"is answered {code}, a redirect{_target(reply)}, and FLORA follows none",
                "Set TRACKER_PUBLIC_URL to the address of the redirect, if that is this service; "
                f"otherwise remove the redirect for POST {_PATH}.",
            )
        case 502 | 503 | 504:
            return Diagnosis(
                f"{seen}, which does not reach it",
                f"Start {_SERVER}, and let the proxy in front forward to its address and port; "
                "from another container or host it is only reachable with --host 0.0.0.0 and "
                "TRACKER_API_TOKEN set.",
            )
    for statuses, advice in _ADVICE_IN_FRONT.items():
        if reply.status in statuses:
            return Diagnosis(seen, advice)
    return Diagnosis(seen, "The log of what stands in front of the tracker says why.")


def _target(reply: Reply) -> str:
    """Where a redirect leads, without its query, which may be secret."""
    try:
        parts = urlsplit(reply.headers.get("location", ""))
        host = parts.hostname or ""
        shown = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return ""
    return f" to {_quote(shown if host else parts.path)}" if host or parts.path else ""


def _quote(text: str) -> str:
    line = plain(" ".join(text.split())).rstrip(".")
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"
