"""One call to FLORA: limited, repeated and timed, with every error as a `FloraError`.

Within the call's deadline these are repeated:

* a read: after no answer, a 408, a 429 and any 5xx;
* a start, which spends money: only if nothing of it was written (no connection was made), and after
  FLORA's own 429. The caller judges everything else; `FloraUnreachable.may_have_acted` says whether
  a request had been sent.

Redirects are never followed: the key is sent to one origin only.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import httpx

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    KeyRefused,
    RateLimited,
    RequestPaused,
)
from tracker.core.log import get_logger
from tracker.flora import parse
from tracker.flora.http import ReplaceableClient, http_date, is_bounded, retry_after_of
from tracker.flora.parse import decode
from tracker.flora.resilience import OWN_WAITS, Breaker, Contact, RequestLimit, SharedWaits

T = TypeVar("T")

DEFAULT_WAIT: Final = 5.0
"""FLORA's advice for a 429 without a wait."""
LARGEST_ANSWER: Final = 32 * 1024 * 1024
"""Bytes; a page of a hundred runs has some hundred thousand."""
OnRequest = Callable[[str, int | None, float], None]
"""Called after every request: its endpoint, its status (`None` without an answer), its seconds."""

_FIRST_BACKOFF: Final = 0.5
_LONGEST_BACKOFF: Final = 30.0
_LAST_YEAR: Final = 2999
"""No clock shows a later one; what is added to a time must stay within Python's years."""
_KEY_ACCEPTED: Final = (400, 402, 403, 404, 409, 422)
"""Refusals that FLORA gives only to a key that it takes."""
_NO_CONNECTION: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)

log = get_logger(__name__)


def backoff(attempt: int) -> float:
    """Seconds before the attempt after the `attempt`-th (from 1): doubling to 30, less jitter."""
    wait = min(_FIRST_BACKOFF * 2.0 ** min(attempt - 1, 10), _LONGEST_BACKOFF)
    return wait * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraCall:
    """A call to make.

    `endpoint` is the pattern of the URL, for people and metrics. `spends` marks a call that costs
    money; `lists` an unfiltered list, which any good key may read at the right base URL; `fresh` a
    read of a run that has just ended; `is_foreign` a URL from outside, whose 401 need not be about
    the key. `fence` is awaited after every wait, directly before the request is written, and
    prevents that by raising. With `answer_seconds`, the answer is waited for so long once the
    request is written, whatever the deadline of the call, and the request is not repeated then.
    """

    endpoint: str
    url: httpx.URL
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    spends: bool = False
    lists: bool = False
    fresh: bool = False
    is_foreign: bool = False
    fence: Callable[[], Awaitable[None]] | None = None
    answer_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraAnswer:
    """An answer, read whole. `sent_at` is when its request was sent, `request_id` is the id that
    FLORA's support asks for; `contact` is notified by `read` whether it was FLORA's."""

    endpoint: str
    sent_at: datetime
    status: int
    headers: httpx.Headers
    body: bytes
    request_id: str | None
    contact: Contact

    def read(self, reader: Callable[[object], T]) -> T:
        """The result of `reader` for the JSON value. Raises `FloraUnreadable`."""
        value = None
        try:
            value = decode(self.body)
            found = reader(value)
        except FloraUnreadable as exc:
            where = f" ({self.request_id})" if self.request_id else ""
            error = FloraUnreadable(
                f"FLORA's answer to {self.endpoint} is not what its API promises: {exc}{where}",
                request_id=self.request_id,
                silent=not isinstance(value, dict),
            )
            self.contact.failed(error)
            raise error from exc
        self.contact.answered()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A call that waits: for how long already, and how long it still may, in seconds.

    `paused` is what is left of a wait that FLORA has asked for, `error` that of the last attempt.
    """

    passed: float
    left: float
    paused: float
    error: FloraError | None


@dataclass(slots=True, eq=False)
class _Progress:
    """How far a call has come: whether a request has been sent, and the last attempt's error."""

    timeout: asyncio.Timeout
    since: float
    sent: bool = False
    error: FloraError | None = None


@dataclass(eq=False)
class Caller:
    """Makes calls with one key, through one request limit and one breaker.

    `deadline` is in seconds, for a call with all repetitions. `on_request` is called after every
    request. `shared_waits` exchanges the waits that FLORA asks for with other processes.
    `find_new_key` is called if FLORA refuses the key, and may replace it: the request is then sent
    once more. `traced` means that the transport reports when a request is written.

    `new_http` makes a client of httpx, `http` is the one for new requests: see `ReplaceableClient`.

    `breaker` is open while FLORA refuses the key, `contact` says whether FLORA answers.
    `clock_offset` is FLORA's clock minus ours, `request_id` the id of the last answer, for its
    support; both are `None` before the first. `backoff` gives the seconds to wait after the n-th
    attempt (from 1) where FLORA names none.
    """

    new_http: Callable[[], httpx.AsyncClient]
    _: KW_ONLY
    concurrency: InitVar[int]
    deadline: float
    clock: Clock
    on_request: OnRequest | None = None
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    backoff: Callable[[int], float] = backoff
    shared_waits: InitVar[SharedWaits] = OWN_WAITS
    find_new_key: Callable[[], object] = lambda: None
    traced: bool = True
    largest_answer: int = LARGEST_ANSWER

    def __post_init__(self, concurrency: int, shared_waits: SharedWaits) -> None:
        self._client = ReplaceableClient(self.new_http, is_fixed=not self.traced)
        self.request_limit = RequestLimit(
            concurrency,
            monotonic=self.monotonic,
            sleep=self.sleep,
            shared=shared_waits,
            clock=self.clock,
        )
        self.breaker = Breaker(clock=self.clock, monotonic=self.monotonic)
        self.contact = Contact(clock=self.clock, monotonic=self.monotonic)
        self.clock_offset: timedelta | None = None
        self.request_id: str | None = None
        self._calls: list[_Progress] = []

    @property
    def http(self) -> httpx.AsyncClient:
        return self._client.current

    @property
    def wait(self) -> Wait | None:
        """What the oldest of the present calls waits for; `None` without a call."""
        if not self._calls:
            return None
        call = self._calls[0]
        until = call.timeout.when() or 0.0
        return Wait(
            passed=self.monotonic() - call.since,
            left=max(0.0, until - asyncio.get_running_loop().time()),
            paused=self.request_limit.state().paused,
            error=call.error,
        )

    async def call(self, call: FloraCall, *, deadline: float | None = None) -> FloraAnswer:
        """FLORA's answer, a 2xx. Raises the `FloraError` that says why there is none."""
        seconds = self.deadline if deadline is None else deadline
        timeout = asyncio.timeout(seconds)
        progress = _Progress(timeout, self.monotonic())
        self._calls.append(progress)
        try:
            async with timeout:
                return await self._repeat(call, progress, until=self.monotonic() + seconds)
        except TimeoutError as exc:
            if progress.error is not None and not progress.sent:
                raise progress.error from exc
            error = FloraUnreachable(
                f"FLORA gave no answer to {call.endpoint} within {round(seconds, 1):g} s",
                may_have_acted=progress.sent,
                timed_out=True,
            )
            if progress.sent:  # else the call has only waited for the request limit
                self.contact.failed(error)
            raise error from exc
        finally:
            self._calls.remove(progress)

    async def _repeat(self, call: FloraCall, progress: _Progress, *, until: float) -> FloraAnswer:
        attempt, ends_at = 0, progress.timeout.when()
        while True:
            attempt += 1
            try:
                return await self._attempt(call, progress, until=until)
            except FloraError as exc:
                progress.sent = False
                progress.error = exc
                asked = exc.retry_after if isinstance(exc, FloraRefusal) else None
                # Another process may use another key than the one that is refused here.
                if asked is not None and not isinstance(exc, (KeyRefused, RequestPaused)):
                    await self.request_limit.shared.share(asked)
                wait = asked or self.backoff(attempt)
                if not _repeatable(call, exc) or self.monotonic() + wait > until:
                    raise
            progress.timeout.reschedule(ends_at)  # that of the answer is over
            await self.sleep(wait)

    async def _attempt(self, call: FloraCall, progress: _Progress, *, until: float) -> FloraAnswer:
        self.breaker.check()
        async with self.request_limit.permit(until=until, fresh=call.fresh) as started:
            self.breaker.admit()
            key = self.http.headers.get("authorization")
            answer = await self._exchange(call, progress)
            if answer.status == 401:
                self.find_new_key()
                if self.http.headers.get("authorization") != key:
                    answer = await self._exchange(call, progress)
            refusal = None if 200 <= answer.status < 300 else self._refusal(answer)
            self._learn(call, answer, refusal, started)
        if refusal is None:
            return answer
        raise refusal

    async def _exchange(self, call: FloraCall, progress: _Progress) -> FloraAnswer:
        """Send the request once and read the answer, whatever its status."""
        began, sent_at = self.monotonic(), self.clock()
        self.contact.asked()
        status = request_id = None
        more: dict[str, Any] = {}
        if not self.traced or (call.fence is None and call.answer_seconds is None):
            await self._before_writing(call, progress)
        else:
            more["extensions"] = {"trace": partial(self._trace, call, progress)}
        if call.answer_seconds is not None:
            timeout = self.http.timeout
            more["timeout"] = httpx.Timeout(call.answer_seconds, connect=timeout.connect)
        try:
            async with (
                self._client.for_request() as http,
                http.stream(
                    call.method, call.url, headers=call.headers, content=call.content, **more
                ) as response,
            ):
                body = await _bounded_body(response, call.endpoint, self.largest_answer)
            status, request_id = response.status_code, response.headers.get("request-id")
        except httpx.DecodingError as exc:
            garbled = FloraUnreadable(f"FLORA's answer to {call.endpoint} is garbled", silent=True)
            self.contact.failed(garbled)
            raise garbled from exc
        except (httpx.RequestError, OSError) as exc:
            error = FloraUnreachable(
                f"FLORA gave no answer to {call.endpoint}: {str(exc) or type(exc).__name__}",
                may_have_acted=progress.sent and not isinstance(exc, _NO_CONNECTION),
                timed_out=isinstance(exc, httpx.TimeoutException),
            )
            self.contact.failed(error)
            raise error from exc
        finally:
            seconds = self.monotonic() - began
            log.debug(
                "flora.request",
                endpoint=call.endpoint,
                status=status,
                seconds=round(seconds, 3),
                flora_request_id=request_id,
            )
            if self.on_request is not None:
                self.on_request(call.endpoint, status, seconds)
        date = http_date(response.headers.get("date", ""))
        if date is not None and date.year <= _LAST_YEAR:
            self.clock_offset = date - self.clock()
        return FloraAnswer(
            endpoint=call.endpoint,
            sent_at=sent_at,
            status=status,
            headers=response.headers,
            body=body,
            request_id=request_id,
            contact=self.contact,
        )

    async def aclose(self) -> None:
        """Close all connections, those of requests under way too."""
        await self._client.aclose()

    async def _trace(self, call: FloraCall, progress: _Progress, event: str, info: Any) -> None:
        """Called by the transport as it sends the request."""
        if event.endswith(".send_request_headers.started"):
            request = info.get("request")
            if getattr(request, "method", None) != b"CONNECT":  # which is for a proxy
                await self._before_writing(call, progress)

    async def _before_writing(self, call: FloraCall, progress: _Progress) -> None:
        """Pass the fence, which may raise, and start the time limit of the answer."""
        if call.fence is not None:
            await call.fence()
        progress.sent = True
        if call.answer_seconds is not None:
            progress.timeout.reschedule(asyncio.get_running_loop().time() + call.answer_seconds)

    def _refusal(self, answer: FloraAnswer) -> FloraRefusal:
        if 300 <= answer.status < 400:
            return FloraRefusal(
                status=answer.status,
                code="redirect",
                message="a redirect, which is never followed; check FLORA_BASE_URL",
                request_id=answer.request_id,
                from_flora=False,
            )
        wait = retry_after_of(answer.headers, now=self.clock())
        if answer.status == 429 and wait is None:
            wait = DEFAULT_WAIT
        return parse.refusal(
            answer.status, answer.body, request_id=answer.request_id, retry_after=wait
        )

    def _learn(
        self, call: FloraCall, answer: FloraAnswer, refusal: FloraRefusal | None, started: float
    ) -> None:
        """Notify request limit, contact and breaker of the answer."""
        self.request_id = answer.request_id
        if isinstance(refusal, RateLimited):
            self.request_limit.limited(started)
            log.info(
                "flora.rate_limited",
                endpoint=call.endpoint,
                rate=self.request_limit.state().rate,
                retry_after=refusal.retry_after,
                flora_request_id=answer.request_id,
            )
        elif answer.status < 500:
            self.request_limit.answered()
        if refusal is not None:
            if refusal.retry_after is not None:
                self.request_limit.pause(refusal.retry_after)
            self.contact.failed(refusal, listing=call.lists)
        elif answer.body.lstrip()[:1] != b"{":  # a gateway's page says nothing about the key
            return
        was_open = self.breaker.open
        if refusal is None or (refusal.from_flora and refusal.status in _KEY_ACCEPTED):
            self.breaker.accepted()
            if was_open:
                log.info("flora.key_accepted")
        elif isinstance(refusal, KeyRefused) and not call.is_foreign:
            self.breaker.refused(refusal)
            if not was_open:
                log.error(
                    "flora.key_refused",
                    status=refusal.status,
                    code=refusal.code,
                    flora_request_id=refusal.request_id,
                )


def _repeatable(call: FloraCall, error: FloraError) -> bool:
    once = call.spends or call.answer_seconds is not None
    match error:
        case RateLimited():
            return error.from_flora or not call.spends
        case FloraUnreachable():
            return not (once and error.may_have_acted)
        case FloraRefusal():
            return not once and (error.status >= 500 or error.status == 408)
    return False


async def _bounded_body(response: httpx.Response, endpoint: str, largest: int) -> bytes:
    if not is_bounded(response.headers.get("content-encoding")):
        raise FloraUnreadable(f"FLORA's answer to {endpoint} has an unsupported content encoding")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > largest:
            raise FloraUnreadable(f"FLORA's answer is larger than {largest} bytes")
    return bytes(body)
