"""SIGKILL at chosen crash points: what was promised before is held afterwards.

`python -m bench.soak_crash` goes through all of them.
"""

from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.crash_run import Role, crash_run
from tests.e2e.crashing import Point, Switch
from tests.support.shares import share_of

POINTS: tuple[tuple[Role, Point], ...] = (
    # A start that is about to leave; one that FLORA has answered, and nobody else knows of.
    ("serve", Point(when="after", name="starts.mark_sent")),
    ("serve", Point(when="after", name="POST /techniques/*/runs")),
    # A callback that is not on disk, and one that is on disk and not answered.
    ("serve", Point(when="before", name="inbox: store")),
    ("serve", Point(when="after", name="inbox: store")),
    # One that is acknowledged and not applied, and one that is applied and nobody was told.
    ("serve", Point(when="before", name="inbox: apply")),
    ("serve", Point(when="after", name="inbox: apply")),
    # The same where another process goes on.
    ("receiver", Point(when="before", name="inbox: apply")),
    # Runs that are claimed; a page that is stored and not covered.
    ("serve", Point(when="after", name="coordination.claim_due")),
    ("worker", Point(when="before", name="sweeps.add")),
    # Events without messages, and messages that were sent and are not known to be.
    ("serve", Point(when="after", name="endpoints.fan_out")),
    ("worker", Point(when="before", name="messages.record_and_claim")),
    ("serve", Point(when="after", name="POST /hook")),
    # A batch that is on disk and whose client was told nothing; one whose launch is not noted.
    ("serve", Point(when="after", name="batches.keep")),
    ("serve", Point(when="after", name="batches.end_launch")),
)

LIVES = 3
"""Attempts for each point: what leads to it may fail in a life."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgres", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_what_was_promised_survives_a_kill_at_any_crash_point(
    database_url: str, tmp_path: Path, thorough: bool
) -> None:
    """After a kill at each of these points every run is true, what was acknowledged is on disk, and
    nothing was paid twice."""
    async with crash_run(database_url, tmp_path, seed=2) as one:
        for role, at in share_of(POINTS, of=5, thorough=thorough):
            for _ in range(LIVES):
                life = await one.live(role, at)
                if life.killed:
                    break
            assert life.killed, f"never came to {at}:\n{life.log}"
        await one.settle()
        verdict = await one.judge()
    assert verdict.lost == []
    assert verdict.paid_twice == []
    assert verdict.starts > 0
    assert verdict.deliveries > 0


def test_where_one_is_not_answered_the_next_one_is_meant() -> None:
    """Also where others were begun before that was known."""
    switch, name = Switch(Point(when="after", name="GET /runs/*")), "GET /runs/*"
    with suppress(TimeoutError), switch._next_one_if_it_fails():
        assert switch._reached({name}) == name
        assert switch._reached({name}) is None
        raise TimeoutError
    assert switch._reached({name}) == name
    assert switch._reached({name}) is None
