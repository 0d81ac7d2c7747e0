"""Reading one run, by the first way that works.

FLORA reads a technique run below its technique, and the technique of a run that only a callback
told of is not known. So the ways are tried in turn: its `poll_url` (on FLORA's origin only), its
technique, the newest page of the history, and `GET /runs/{run_id}`, which reads generation runs
too.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tracker.core.errors import FloraError, KeyRefused, NotFound, RateLimited
from tracker.core.observation import Observation
from tracker.core.run import Run
from tracker.flora.addresses import PollUrlRefused
from tracker.flora.client import FloraClient

CALL_SECONDS: Final = 20.0
"""How long one read may take, repetitions included: what fails is tried again at the next look."""


@dataclass(slots=True, kw_only=True)
class Reading:
    """What reading one run brought.

    `observation` is `None` where no way worked: then `missing` tells whether FLORA answered every
    way that the run does not exist, and `error` says why, fit for a person. `reads` counts the
    requests. `far_end_down` tells that FLORA itself said nothing (`FloraError.silent`). `beside`
    holds other runs that a history page showed on the way.
    """

    observation: Observation | None = None
    missing: bool = False
    error: str = ""
    far_end_down: bool = False
    reads: int = 0
    beside: list[Observation] = field(default_factory=list)


async def read_run(client: FloraClient, run: Run) -> Reading:
    """Read `run` from the API. FLORA's errors are part of the answer.

    `KeyRefused` and `RateLimited` are raised: they say nothing about the run.
    """
    reading = Reading()
    denied = doubtful = False
    async for way in _ways(client, run, reading):
        reading.reads += 1
        try:
            reading.observation = await way()
        except NotFound as refusal:
            denied = True
            reading.error = str(refusal)
        except PollUrlRefused as refusal:
            reading.reads -= 1  # nothing was sent
            reading.error = str(refusal)
        except (KeyRefused, RateLimited):
            raise
        except FloraError as error:
            reading.error = str(error)
            if error.silent:
                reading.far_end_down = True
                return reading
            doubtful = True  # such as a 403, or another run, to which a wrong `poll_url` leads
        if reading.observation is not None:
            return reading
    reading.missing = denied and not doubtful
    return reading


async def _ways(
    client: FloraClient, run: Run, reading: Reading
) -> AsyncIterator[Callable[[], Awaitable[Observation | None]]]:
    """The ways to read `run`, cheapest first; a way that gives `None` has not found it."""
    poll_url, technique_id = run.poll_url, run.technique_id
    if poll_url:
        yield partial(client.follow, poll_url, run.run_id, deadline=CALL_SECONDS)
    if run.run_type != "generation":
        if technique_id:
            yield partial(client.get_run, technique_id, run.run_id, deadline=CALL_SECONDS)
        else:
            async for way in _history_ways(client, run.run_id, reading):
                yield way
    yield partial(client.get_any_run, run.run_id, deadline=CALL_SECONDS)


async def _history_ways(
    client: FloraClient, run_id: str, reading: Reading
) -> AsyncIterator[Callable[[], Awaitable[Observation | None]]]:
    """Find the run on the newest history page, and read it below its technique if need be."""
    found: list[Observation] = []

    async def on_newest_page() -> Observation | None:
        page = await client.history(deadline=CALL_SECONDS)
        found.extend(item for item in page.items if item.run_id == run_id)
        reading.beside.extend(item for item in page.items if item.run_id != run_id)
        whole = [item for item in found if item.details or not item.standing.ended]
        return whole[0] if whole else None

    yield on_newest_page
    for item in found:
        reading.beside.append(item)  # it names the technique, which a single read does not
        technique_id = item.technique_id
        if technique_id:
            yield partial(client.get_run, technique_id, run_id, deadline=CALL_SECONDS)
