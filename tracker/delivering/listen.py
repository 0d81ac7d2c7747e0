"""The events of a running tracker, derived from its stream, and sent to a local address.

The stream has a frame for each change of a run, which shows the run in its present state. Events
follow from the frames:

* `run.settled`: the change that happened when the run was settled (`settled_at`), or a later read
  after which the merged timeline has another end, or more outputs.
* `run.cost_changed`: such a read, with another cost.
* `run.lost`: the change of a lost run. Such a frame has no number to resume after, so after a cut
  the lost runs are listed again.

An event that is derived twice has the same id, and is sent once.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

import httpx

from tracker.core.clock import utc_now
from tracker.core.errors import TrackerError
from tracker.core.events import EventType, RunFilter, settles_anew
from tracker.core.net import is_loopback_url
from tracker.core.observation import Observation, Source, merge
from tracker.core.run import RunState
from tracker.delivering.addresses import UNREACHED
from tracker.delivering.endpoints import Endpoint, EndpointClient
from tracker.flora.http import NoCookies
from tracker.store.engine import dump_json
from tracker.store.queries.endpoints import EndpointConfig
from tracker.store.writing.messages import Attempt, Claim

RETRY_SECONDS: Final = (0.5, 1.0, 2.0)
"""Waits before a refused connection is tried again: a development server may be restarting."""
SILENCE_SECONDS: Final = 60.0
"""After this long without a frame the connection is lost: the tracker sends one every 15 s."""
RECONNECT_SECONDS: Final = (0.2, 5.0)
"""The first and the longest wait before the tracker is connected again."""
REMEMBERED_EVENTS: Final = 10_000
"""Events whose ids are remembered."""
_OTHER: Final = "the answer is not a tracker's"
_STREAM: Final = "text/event-stream"
_READS: Final = (Source.POLL, Source.HISTORY)


@dataclass(frozen=True, slots=True)
class StreamedEvent:
    """An event as an endpoint receives it. `run` is the run as the API shows it."""

    message_id: str
    type: EventType
    at: str
    run: Mapping[str, Any]

    @property
    def body(self) -> str:
        return dump_json({"type": self.type, "timestamp": self.at, "data": self.run})


class _Cut(Exception):
    """The tracker does not answer now; the message says how."""


@dataclass(eq=False)
class TrackerStream:
    """Follows the stream of the tracker at `url`, through cuts and restarts.

    `wanted` are the types of the events to return. `notice` is called with a line for people when
    the connection is made, lost, and made again. `now` is the time as the API shows it.
    """

    url: str
    token: str | None = field(repr=False)
    _: KW_ONLY
    wanted: Collection[EventType]
    notice: Callable[[str], None]
    now: Callable[[], str]

    def __post_init__(self) -> None:
        self._position: str | None = None
        self._connected = False
        self._lost: dict[str, bool] = {}
        """The runs that are lost, and whether that was reported."""
        self._returned: OrderedDict[str, None] = OrderedDict()

    async def events(self) -> AsyncGenerator[StreamedEvent, None]:
        """Events from now on, for ever. After a cut, the stream resumes after the last one for
        which the caller asked for the next.

        Raises `TrackerError` where the first connection fails or access is refused.
        """
        wait, longest = RECONNECT_SECONDS
        async with httpx.AsyncClient(
            base_url=self.url,
            headers={} if self.token is None else {"authorization": f"Bearer {self.token}"},
            cookies=NoCookies(),
            timeout=httpx.Timeout(10.0, read=SILENCE_SECONDS),
            trust_env=not is_loopback_url(self.url),
        ) as client:
            while True:
                try:
                    async for event in self._follow(client):
                        yield event
                except (_Cut, httpx.TransportError) as error:
                    reason = str(error) or type(error).__name__
                    if self._position is None:
                        raise TrackerError(
                            f"no tracker can be reached at {self.url} ({reason}): start it with "
                            "`tracker serve`, or give its address with --url"
                        ) from error
                    if self._connected:
                        self.notice(f"Connection to the tracker lost ({reason}); reconnecting.")
                if self._connected:
                    wait, self._connected = RECONNECT_SECONDS[0], False
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)

    async def _follow(self, client: httpx.AsyncClient) -> AsyncGenerator[StreamedEvent, None]:
        """The events that one connection shows."""
        first = self._position is None
        headers = {} if self._position is None else {"last-event-id": self._position}
        async with client.stream("GET", "/api/stream", headers=headers) as response:
            await self._check(response)
            async for frame in _frames(response):
                if not self._connected:
                    for event in await self._missed_losses(client, report=not first):
                        yield event
                    self._connected = True
                    self.notice(f"Listening{'' if first else ' again'} to {self.url}.")
                if frame.get("event") == "reset":
                    self.notice("The tracker counts its events anew; some may be missing.")
                # All others are a newer version's.
                elif frame.get("event") == "run":
                    for event in await self._events(client, frame["data"]):
                        yield event
                self._position = frame.get("id", self._position)

    async def _check(self, response: httpx.Response) -> None:
        """Raise `_Cut` unless a stream begins, and `TrackerError` where access is refused."""
        status = response.status_code
        if status == 200 and response.headers.get("content-type", "").startswith(_STREAM):
            return
        if status in (401, 403):
            want = "refuses this token" if self.token else "wants a token"
            raise TrackerError(
                f"the tracker at {self.url} {want}: give one with the scope read with --token, "
                "or set TRACKER_API_TOKEN"
            )
        raise _Cut(_OTHER if status == 200 else f"status {status}")

    async def _events(self, client: httpx.AsyncClient, data: str) -> list[StreamedEvent]:
        """The events that a frame stands for, as far as they are wanted and new."""
        shown = json.loads(data)
        run, change = shown["run"], shown["event"]
        run_id = run["run_id"]
        found: list[StreamedEvent | None] = []
        if run["tracking"] == "lost":
            if change is None and not self._lost.get(run_id):
                self._lost[run_id] = True
                found.append(self._new(EventType.LOST, self.now(), run, run["checks"]))
        else:
            self._lost.pop(run_id, None)
            if change is None or run["tracking"] != "settled":
                pass
            elif change["at"] == run["settled_at"]:
                found.append(self._new(EventType.SETTLED, change["at"], run, change["at"]))
            elif change["source"] in _READS:
                path = f"/api/runs/{quote(run_id, safe='')}/events"
                timeline = (await _get(client, path))["events"]
                for kind in changes_of_settled(timeline, change["id"]):
                    found.append(self._new(kind, change["at"], run, change["id"]))
        return [event for event in found if event is not None]

    async def _missed_losses(
        self, client: httpx.AsyncClient, *, report: bool
    ) -> list[StreamedEvent]:
        """Note which runs are lost; with `report`, return those that were not before."""
        if EventType.LOST not in self.wanted:
            return []
        query: dict[str, Any] = {"tracking": "lost", "limit": 100}
        lost: dict[str, dict[str, Any]] = {}
        while True:
            page = await _get(client, "/api/runs", **query)
            lost |= {run["run_id"]: run for run in page["runs"]}
            query["cursor"] = page["meta"]["next_cursor"]
            if query["cursor"] is None:
                break
        new = [run for run_id, run in lost.items() if run_id not in self._lost]
        self._lost = {run_id: report or self._lost.get(run_id, False) for run_id in lost}
        at = self.now()
        events = [self._new(EventType.LOST, at, run, run["checks"]) for run in new if report]
        return [event for event in events if event is not None]

    def _new(
        self, kind: EventType, at: str, run: Mapping[str, Any], occurrence: object
    ) -> StreamedEvent | None:
        """An event, unless it is not wanted or was returned before."""
        digest = hashlib.sha256(f"{kind} {run['run_id']} {occurrence}".encode())
        message_id = f"msg_{digest.hexdigest()[:24]}"
        if kind not in self.wanted or message_id in self._returned:
            return None
        self._returned[message_id] = None
        if len(self._returned) > REMEMBERED_EVENTS:
            self._returned.popitem(last=False)
        return StreamedEvent(message_id, kind, at, run)


def changes_of_settled(events: Iterable[Mapping[str, Any]], number: int) -> list[EventType]:
    """The events that the change of that number caused, if the run was settled before it, too.

    `events` are the run's timeline, oldest first, as `GET /api/runs/{run_id}/events` shows it.
    """
    run: RunState | None = None
    for event in events:
        after = merge(run, Observation.from_json(event["detail"]))
        if event["id"] != number:
            run = after
            continue
        found = []
        if run is not None and run.settled and after.settled:
            if settles_anew(run, after):
                found.append(EventType.SETTLED)
            if run.charged_cost != after.charged_cost:
                found.append(EventType.COST_CHANGED)
        return found
    return []


def local_client(url: str, secret: str) -> EndpointClient:
    """Sends events to a local address, signed with `secret`."""
    config = EndpointConfig(endpoint_id="listen", url=url, events=(), filter=RunFilter())
    endpoint = Endpoint(config=config, url=url, secrets=(secret,), allow_private=True)
    return EndpointClient(endpoint, clock=utc_now)


async def forward(client: EndpointClient, event: StreamedEvent) -> Attempt:
    """Send an event as an endpoint receives it. Only a refused connection is tried again."""
    claim = Claim(event.message_id, event.body, datetime.fromisoformat(event.at))
    waits = iter(RETRY_SECONDS)
    while True:
        attempt = await client.send(claim)
        if attempt.error != UNREACHED or (wait := next(waits, None)) is None:
            return attempt
        await asyncio.sleep(wait)


async def _get(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    response = await client.get(path, params=query)
    if response.status_code != 200:
        raise _Cut(f"status {response.status_code}")
    try:
        return response.json()
    except ValueError:
        raise _Cut(_OTHER) from None


async def _frames(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Complete frames of server-sent events: their fields. A comment has an empty name."""
    frame: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            frame[name] = value
        else:
            yield frame
            frame = {}
