"""One call to FLORA: its turn, its repetitions, its time limit, and every error in our own words.

What is repeated, as long as the call's time limit allows:

* a read: after no answer, a 408, a 429 and any 5xx;
* a start, which spends money: only where nothing of it was written (no connection was made), and
  after FLORA's own 429. Whatever else comes, or does not, is for the caller to judge;
  `FloraUnreachable.may_have_acted` says that a request had left.

Redirects are never followed: the key goes to one origin only.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, TypeVar

import httpx
import structlog

from tracker.core.clock import Clock, utc_now
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    KeyRefused,
    RateLimited,
)
from tracker.core.net import is_bounded
from tracker.flora import parse
from tracker.flora.contact import Contact
from tracker.flora.parse import decode
from tracker.flora.request_limit import Budget, SharedWaits

# How long to wait before a request is repeated: what FLORA asks for, else growing waits.


LONGEST_WAIT: Final = 60.0
"""No wait that FLORA asks for is kept longer than this, in seconds."""
UNTOLD_WAIT: Final = 5.0
"""FLORA's advice for a 429 that names no wait."""
_FIRST_BACKOFF: Final = 0.5
_LONGEST_BACKOFF: Final = 30.0
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


def backoff(attempt: int) -> float:
    """Seconds before the attempt after the `attempt`-th (from 1): doubling to 30, jitter off it."""
    wait = min(_FIRST_BACKOFF * 2.0 ** min(attempt - 1, 10), _LONGEST_BACKOFF)
    return wait * random.uniform(0.5, 1.0)


def asked_wait(headers: Mapping[str, str], *, now: datetime) -> float | None:
    """The seconds that an answer asks to wait, at most `LONGEST_WAIT`; `None` where it does not.

    `retry-after-ms` goes before `retry-after`, which is in seconds or a date. A date is measured
    from the answer's own `date`, so that it does not matter how our clock (`now`, UTC) is set.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if _NUMBER.fullmatch(milliseconds):
        return min(float(milliseconds) / 1000, LONGEST_WAIT)
    asked = headers.get("retry-after", "")
    if _NUMBER.fullmatch(asked):
        return min(float(asked), LONGEST_WAIT)
    when = http_date(asked)
    if when is None:
        return None
    seconds = (when - (http_date(headers.get("date", "")) or now)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def http_date(text: str) -> datetime | None:
    """The moment that an HTTP date names, aware, in UTC; `None` for what is not one."""
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


# A refused key is not tried again and again: calls fail at once, but for a trial now and then.
#
# FLORA answers a wrong or revoked key with 401, and every further call fails, too. The breaker
# then opens, for everybody to see, until FLORA takes the key in a trial.


TRIAL_EVERY: Final = 30.0
"""Seconds between two calls that are let through while the breaker is open."""


class Breaker:
    """Closed until FLORA refuses the key; `since` and `reason` tell when it opened, and why."""

    def __init__(
        self, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._refusal: KeyRefused | None = None
        self._next_trial = 0.0
        self.since: datetime | None = None

    @property
    def open(self) -> bool:
        """Whether FLORA refuses the key."""
        return self._refusal is not None

    @property
    def reason(self) -> str | None:
        """FLORA's refusal in words, or `None`."""
        return None if self._refusal is None else str(self._refusal)

    @property
    def blocked(self) -> bool:
        """Whether a call would be refused here, unsent: the key is refused and no trial is due."""
        return self._refusal is not None and self._next_trial > self._monotonic()

    def check(self) -> None:
        """Raise `KeyRefused` where a call would not be let through."""
        wait = self._next_trial - self._monotonic()
        if self._refusal is not None and wait > 0:
            raise _copy(self._refusal, retry_after=wait)

    def admit(self) -> None:
        """As `check`, right before a call: while the breaker is open, this call is the trial."""
        self.check()
        if self._refusal is not None:
            self._next_trial = self._monotonic() + TRIAL_EVERY

    def refused(self, refusal: KeyRefused) -> None:
        """FLORA refused the key."""
        self.since = self.since or self._clock()
        self._refusal = _copy(refusal)  # what is raised keeps the frames of its callers alive
        self._next_trial = self._monotonic() + TRIAL_EVERY

    def accepted(self) -> None:
        """FLORA took the key."""
        self._refusal = None
        self.since = None


def _copy(refusal: KeyRefused, *, retry_after: float | None = None) -> KeyRefused:
    return KeyRefused(
        status=refusal.status,
        code=refusal.code,
        message=refusal.message,
        request_id=refusal.request_id,
        retry_after=retry_after,
    )


T = TypeVar("T")

LARGEST_ANSWER: Final = 32 * 1024 * 1024
"""Bytes; a page of a hundred runs has some hundred thousand."""
OnRequest = Callable[[str, int | None, float], None]
"""Told of every request: its endpoint, its status (`None` without an answer), its seconds."""

_PAST_THE_KEY: Final = (400, 402, 403, 404, 409, 422)
"""Refusals that FLORA gives only to a key that it takes."""
log = structlog.get_logger(__name__)

_NO_CONNECTION: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is asked of FLORA.

    `endpoint` is the pattern of the URL, for people and metrics. `spends` marks what costs money;
    `lists` a list without a filter, which any good key may read at the right base URL; `fresh` what
    brings home a run that has just ended. `fence` is awaited after every wait, directly before the
    request is written, and keeps it from being written by raising; from then on the answer is
    waited for `answer_seconds`, whatever the call's deadline.
    """

    endpoint: str
    url: httpx.URL
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    spends: bool = False
    lists: bool = False
    fresh: bool = False
    fence: Callable[[], Awaitable[None]] | None = None
    answer_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, read whole. `sent_at` is when the request that it answers was sent, `contact` is
    told whether it was FLORA's."""

    endpoint: str
    sent_at: datetime
    status: int
    headers: httpx.Headers
    body: bytes
    contact: Contact

    @property
    def request_id(self) -> str | None:
        """What FLORA's support asks for."""
        request_id: str | None = self.headers.get("request-id")
        return request_id

    def read(self, reader: Callable[[object], T]) -> T:
        """What `reader` makes of the JSON value in it. Raises `FloraUnreadable`."""
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


@dataclass(slots=True)
class _Course:
    """How far a call has come: whether a request is under way, and the last attempt's error."""

    limit: asyncio.Timeout
    under_way: bool = False
    error: FloraError | None = None


class Caller:
    """Makes calls with one key, all through one budget and one breaker.

    `deadline` is how many seconds a call may take, repetitions included. `clock_offset` is FLORA's
    clock minus ours, as its last answer told; `clock_bounds` is the least and the most that it can
    be, by all answers; `request_id` is what FLORA's support asks for the last answer by. They are
    `None` before the first. `traced` tells that the transport reports when a request is written.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        concurrency: int,
        deadline: float,
        clock: Clock,
        on_request: OnRequest | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        shared: SharedWaits | None = None,
        find_new_key: Callable[[], object] = lambda: None,
        traced: bool = True,
    ) -> None:
        self.budget = Budget(concurrency, monotonic=monotonic, sleep=sleep, shared=shared)
        self.breaker = Breaker(clock=clock, monotonic=monotonic)
        self.contact = Contact(clock=clock, monotonic=monotonic)
        self.clock_offset: timedelta | None = None
        self.clock_bounds: tuple[timedelta, timedelta] | None = None
        self.request_id: str | None = None
        self._http = http
        self._deadline = deadline
        self._clock = clock
        self._on_request = on_request
        self._monotonic = monotonic
        self._sleep = sleep
        self._find_new_key = find_new_key
        self._traced = traced

    async def call(self, call: Call, *, deadline: float | None = None) -> Answer:
        """FLORA's answer, a 2xx. Raises the `FloraError` that says why there is none."""
        seconds = self._deadline if deadline is None else deadline
        limit = asyncio.timeout(seconds)
        course = _Course(limit)
        try:
            async with limit:
                return await self._persist(call, course, until=self._monotonic() + seconds)
        except TimeoutError as exc:
            if course.error is not None and not course.under_way:
                raise course.error from exc
            error = FloraUnreachable(
                f"FLORA gave no answer to {call.endpoint} within {seconds:g} s",
                may_have_acted=course.under_way,
                timed_out=True,
            )
            if course.under_way:  # else it has waited for its turn all the time
                self.contact.failed(error)
            raise error from exc

    async def _persist(self, call: Call, course: _Course, *, until: float) -> Answer:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._attempt(call, course, until=until)
            except FloraError as exc:
                course.under_way = False
                course.error = exc
                asked = exc.retry_after if isinstance(exc, FloraRefusal) else None
                if asked is not None:
                    await self.budget.tell_others(asked)
                wait = asked or backoff(attempt)
                if not _repeatable(call, exc) or self._monotonic() + wait > until:
                    raise
            await self._sleep(wait)

    async def _attempt(self, call: Call, course: _Course, *, until: float) -> Answer:
        self.breaker.check()
        async with self.budget.slot(until=until, fresh=call.fresh) as started:
            self.breaker.admit()
            key = self._http.headers.get("authorization")
            answer = await self._exchange(call, course)
            if answer.status == 401 and self._is_superseded(key):
                answer = await self._exchange(call, course)
            refusal = None if 200 <= answer.status < 300 else self._refusal(answer)
            self._learn(call, answer, refusal, started)
        if refusal is None:
            return answer
        raise refusal

    def _is_superseded(self, key: str | None) -> bool:
        """Whether another key is in force than the one that FLORA has just refused."""
        self._find_new_key()
        return bool(self._http.headers.get("authorization") != key)

    async def _exchange(self, call: Call, course: _Course) -> Answer:
        """Send the request once and read the answer, whatever its status."""
        began, sent_at = self._monotonic(), self._clock()
        self.contact.asked()
        status = request_id = None
        more: dict[str, Any] = {}
        if call.fence is None or not self._traced:
            await self._leaves(call, course)
        else:
            more["extensions"] = {"trace": partial(self._trace, call, course)}
        if call.answer_seconds is not None:
            timeout = self._http.timeout
            more["timeout"] = httpx.Timeout(call.answer_seconds, connect=timeout.connect)
        try:
            async with self._http.stream(
                call.method, call.url, headers=call.headers, content=call.content, **more
            ) as response:
                body = await _bounded_body(response, call.endpoint)
            status, request_id = response.status_code, response.headers.get("request-id")
        except httpx.DecodingError as exc:
            garbled = FloraUnreadable(f"FLORA's answer to {call.endpoint} is garbled", silent=True)
            self.contact.failed(garbled)
            raise garbled from exc
        except (httpx.RequestError, OSError) as exc:
            error = FloraUnreachable(
                f"FLORA gave no answer to {call.endpoint}: {str(exc) or type(exc).__name__}",
                may_have_acted=course.under_way and not isinstance(exc, _NO_CONNECTION),
                timed_out=isinstance(exc, httpx.TimeoutException),
            )
            self.contact.failed(error)
            raise error from exc
        finally:
            seconds = self._monotonic() - began
            log.debug(
                "flora.request",
                endpoint=call.endpoint,
                status=status,
                seconds=round(seconds, 3),
                flora_request_id=request_id,
            )
            if self._on_request is not None:
                self._on_request(call.endpoint, status, seconds)
        self._learn_of_clock(response.headers, sent_at)
        return Answer(
            endpoint=call.endpoint,
            sent_at=sent_at,
            status=status,
            headers=response.headers,
            body=body,
            contact=self.contact,
        )

    async def _trace(self, call: Call, course: _Course, event: str, info: Any) -> None:
        """Called by the transport as the request goes on its way."""
        if event.endswith(".send_request_headers.started"):
            request = info.get("request")
            if getattr(request, "method", None) != b"CONNECT":  # that is for a proxy on the way
                await self._leaves(call, course)

    async def _leaves(self, call: Call, course: _Course) -> None:
        """The request is written next. Raises what the fence raises."""
        if call.fence is not None:
            await call.fence()
        course.under_way = True
        if call.answer_seconds is not None:
            course.limit.reschedule(asyncio.get_running_loop().time() + call.answer_seconds)

    def _learn_of_clock(self, headers: httpx.Headers, sent_at: datetime) -> None:
        """Narrow down how far FLORA's clock is from ours: its `Date` is cut to seconds, and lies
        between the moments of the request and of the answer."""
        date = http_date(headers.get("date", ""))
        if date is None:
            return
        now = self._clock()
        self.clock_offset = date - now
        least, most = date - now, date + timedelta(seconds=1) - sent_at
        if self.clock_bounds is not None:
            lower, upper = max(least, self.clock_bounds[0]), min(most, self.clock_bounds[1])
            if lower <= upper:  # else one of the clocks was set
                least, most = lower, upper
        self.clock_bounds = least, most

    def _refusal(self, answer: Answer) -> FloraRefusal:
        if 300 <= answer.status < 400:
            return FloraRefusal(
                status=answer.status,
                code="redirect",
                message="a redirect, which is never followed; check FLORA_BASE_URL",
                request_id=answer.request_id,
                from_flora=False,
            )
        asked = asked_wait(answer.headers, now=self._clock())
        if answer.status == 429:
            asked = UNTOLD_WAIT if asked is None else asked
        return parse.refusal(
            answer.status, answer.body, request_id=answer.request_id, retry_after=asked
        )

    def _learn(
        self, call: Call, answer: Answer, refusal: FloraRefusal | None, started: float
    ) -> None:
        """Let budget, breaker and contact know what the answer tells."""
        self.request_id = answer.request_id
        if isinstance(refusal, RateLimited):
            self.budget.limited(started)
            log.info(
                "flora.rate_limited",
                endpoint=call.endpoint,
                rate=self.budget.state().rate,
                retry_after=refusal.retry_after,
                flora_request_id=answer.request_id,
            )
        elif answer.status < 500:
            self.budget.answered()
        if refusal is not None and refusal.retry_after is not None:
            self.budget.pause(refusal.retry_after)
        if refusal is not None:
            self.contact.failed(refusal, listing=call.lists)
        if refusal is not None or answer.body.lstrip()[:1] == b"{":  # else a gateway's page
            self._learn_of_key(refusal)

    def _learn_of_key(self, refusal: FloraRefusal | None) -> None:
        """Let the breaker know, and the log where that opens or closes it."""
        was_open = self.breaker.open
        if refusal is None or (refusal.from_flora and refusal.status in _PAST_THE_KEY):
            self.breaker.accepted()
            if was_open:
                log.info("flora.key_accepted")
        elif isinstance(refusal, KeyRefused):
            self.breaker.refused(refusal)
            if not was_open:
                log.error(
                    "flora.key_refused",
                    status=refusal.status,
                    code=refusal.code,
                    flora_request_id=refusal.request_id,
                )


def _repeatable(call: Call, error: FloraError) -> bool:
    match error:
        case RateLimited():
            return error.from_flora or not call.spends
        case FloraUnreachable():
            return not (call.spends and error.may_have_acted)
        case FloraRefusal():
            return not call.spends and (error.status >= 500 or error.status == 408)
    return False


async def _bounded_body(response: httpx.Response, endpoint: str) -> bytes:
    if not is_bounded(response.headers.get("content-encoding")):
        raise FloraUnreadable(f"FLORA's answer to {endpoint} is packed in a way that is not read")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise FloraUnreadable(f"FLORA's answer is larger than {LARGEST_ANSWER} bytes")
    return bytes(body)
