"""A test delivery, sent as FLORA would send it, and what came back.

It goes to the public URL, signed as FLORA signs, with a type of its own (`TRIAL`), so that the
tracker takes it as it takes any and applies it to nothing.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from time import monotonic
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx

from tracker import __version__
from tracker.core.net import is_loopback
from tracker.core.record import TRIAL, TRIAL_IDS
from tracker.flora.signature import sign

FLORA_WAITS: Final = 10.0
"""Seconds that FLORA waits for an answer."""
LONGEST_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are read; the tracker's own has fifty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One test delivery. Its header holds a signature, which is not shown."""

    delivery_id: str
    body: bytes = field(repr=False)
    signature: str = field(repr=False)

    @classmethod
    def make(cls, secret: str, *, now: datetime, size: int = 0) -> "Trial":
        """One that `secret` signs, of `size` bytes where that is more than it takes."""
        delivery_id = f"{TRIAL_IDS}{token_hex(12)}"
        fields = {"id": delivery_id, "type": TRIAL, "created_at": int(now.timestamp() * 1000)}
        body = json.dumps(fields).encode()
        missing = size - len(body) - len(b', "padding": ""')
        if missing > 0:
            body = body[:-1] + b', "padding": "' + b"x" * missing + b'"}'
        return cls(delivery_id=delivery_id, body=body, signature=sign(body, secret, at=now))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back: an answer, or why there was none (`trouble`, with its `kind`).

    `seconds` is how long it took, `expires` the end of the certificate that was shown.
    """

    kind: Literal["answer", "timeout", "certificate", "unreachable"]
    seconds: float
    trouble: str = ""
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    content: Any = None
    expires: datetime | None = None

    @property
    def error_code(self) -> str | None:
        """The code of an error that the tracker itself answered; `None` for all else."""
        error = self.content.get("error") if isinstance(self.content, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return code if isinstance(code, str) and "x-request-id" in self.headers else None

    @property
    def error_message(self) -> str:
        """What that error says."""
        return str(self.content["error"].get("message", "")) if self.error_code else ""

    @property
    def to_sign_in(self) -> bool:
        """Whether the tracker itself leads to its sign-in, as it does from all that is closed."""
        path = self.headers.get("location", "").partition("?")[0]
        return self.status == 303 and path == "/login" and "x-request-id" in self.headers

    @property
    def signature(self) -> Literal["missing", "wrong"] | None:
        """What the tracker says of the signature, where it refused the delivery for that."""
        if self.status != 401 or "signature is" not in self.error_message:
            return None
        return "missing" if "missing" in self.error_message else "wrong"

    @property
    def outcome(self) -> str | None:
        """What the tracker itself says it did with the delivery."""
        outcome = self.content.get("outcome") if isinstance(self.content, dict) else None
        return outcome if self.status == 200 and isinstance(outcome, str) else None


class Sender:
    """Sends to one URL. Redirects are not followed, as FLORA follows none."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self._http = http
        self._url = url

    async def send(self, trial: Trial) -> Reply:
        """Send it; never raises for what the other end does."""
        began = monotonic()
        headers = {
            "Content-Type": "application/json",
            "Flora-Signature": trial.signature,
            "Flora-Webhook-Id": trial.delivery_id,
            "Flora-Event": TRIAL,
        }
        try:
            async with (
                asyncio.timeout(FLORA_WAITS),
                self._http.stream(
                    "POST", self._url, content=trial.body, headers=headers
                ) as response,
            ):
                expires = _expires(response)
                content = await _content(response)
            return Reply(
                kind="answer",
                seconds=monotonic() - began,
                status=response.status_code,
                headers=response.headers,
                content=content,
                expires=expires,
            )
        except (httpx.TimeoutException, TimeoutError):
            return Reply(kind="timeout", seconds=monotonic() - began)
        except (httpx.HTTPError, OSError, ssl.SSLError) as error:
            untrusted = _certificate_error(error)
            return Reply(
                kind="unreachable" if untrusted is None else "certificate",
                seconds=monotonic() - began,
                trouble=untrusted or str(error) or type(error).__name__,
            )


@asynccontextmanager
async def sender(url: str) -> AsyncIterator[Sender]:
    """A sender to `url`, for as long as the block lasts."""
    async with httpx.AsyncClient(
        headers={"user-agent": f"flora-run-tracker/{__version__} (doctor)"},
        timeout=httpx.Timeout(FLORA_WAITS, connect=FLORA_WAITS / 2),
        follow_redirects=False,
        trust_env=not is_loopback(urlsplit(url).hostname or ""),
    ) as http:
        yield Sender(http, url)


async def _content(response: httpx.Response) -> Any:
    """The JSON value that an answer holds; `None` where it holds none, or too much."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LONGEST_ANSWER:
            return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _expires(response: httpx.Response) -> datetime | None:
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("ssl_object") if stream is not None else None
    shown = connection.getpeercert() if connection is not None else None
    if not shown or "notAfter" not in shown:
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)


def _certificate_error(error: BaseException | None) -> str | None:
    """What is wrong with a certificate, where that is the reason."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or "it cannot be verified"
        error = error.__cause__ or error.__context__
    return None
