"""FLORA's clocks: when a run may have begun, whatever `Date` says and whichever clock is set."""

from datetime import timedelta

import pytest

from tests.flora.far_end import NOON
from tracker.flora.clock import MARGIN, UNSEEN, FloraClocks

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


def answer(clocks: FloraClocks, date_ahead: timedelta, at: timedelta = timedelta()) -> None:
    now = NOON + at
    clocks.answered((now + date_ahead).replace(microsecond=0), sent_at=now, at=now)


@pytest.mark.parametrize("date_ahead", [-HOUR, timedelta(), HOUR])
def test_before_a_start_the_earlier_clock_and_a_margin_count(date_ahead: timedelta) -> None:
    """A gateway may have written `Date`, and our own clock may be wrong."""
    clocks = FloraClocks()
    assert clocks.earliest_creation(NOON) == NOON - UNSEEN
    answer(clocks, date_ahead)
    assert clocks.earliest_creation(NOON) == NOON + min(timedelta(), date_ahead) - UNSEEN


@pytest.mark.parametrize("date_ahead", [-HOUR, timedelta(), HOUR])
@pytest.mark.parametrize("ahead", [-3 * HOUR, timedelta(), 3 * HOUR])
def test_a_start_shows_the_clock(date_ahead: timedelta, ahead: timedelta) -> None:
    """Both ahead and behind, to a few seconds, and of several the one that is furthest behind."""
    clocks = FloraClocks()
    answer(clocks, date_ahead)
    clocks.started(NOON + ahead, at=NOON)
    for later in (timedelta(), HOUR):
        earliest = clocks.earliest_creation(NOON + later)
        assert NOON + later + ahead - 2 * MARGIN <= earliest <= NOON + later + ahead - MARGIN
    clocks.started(NOON + ahead - 30 * SECOND, at=NOON)
    clocks.started(NOON + ahead, at=NOON)
    assert clocks.earliest_creation(NOON) <= NOON + ahead - 30 * SECOND - MARGIN


def test_answers_narrow_what_a_date_in_seconds_shows() -> None:
    """So that a start's answer shows the clock to a tenth of a second."""
    clocks = FloraClocks()
    for tenth in range(10):
        answer(clocks, timedelta(), tenth * SECOND / 10)
    clocks.started(NOON, at=NOON)
    assert NOON - MARGIN - SECOND / 9 <= clocks.earliest_creation(NOON) <= NOON - MARGIN


def test_our_clock_is_set_forward() -> None:
    """`Date` shows it, so that a run is not taken for an older one."""
    clocks = FloraClocks()
    answer(clocks, timedelta())
    clocks.started(NOON, at=NOON)
    answer(clocks, -HOUR, HOUR)  # FLORA's clock goes on as it was
    assert clocks.earliest_creation(NOON + HOUR) <= NOON - MARGIN


def test_lists_come_with_the_date_of_another_gateway() -> None:
    """What the answers to starts have shown holds."""
    clocks = FloraClocks()
    answer(clocks, timedelta())
    clocks.started(NOON, at=NOON)
    answer(clocks, HOUR)
    assert clocks.earliest_creation(NOON) <= NOON - MARGIN


def test_a_creation_time_that_is_a_mistake_shows_nothing() -> None:
    """No run would be as late, so that a start in doubt were repeated beside its run."""
    clocks = FloraClocks()
    clocks.started(NOON.replace(year=9999), at=NOON)
    assert clocks.earliest_creation(NOON) == NOON - UNSEEN
