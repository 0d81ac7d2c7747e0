"""A refused key: seen, not hammered on, and taken again as soon as FLORA takes it."""

from datetime import timedelta

import pytest

from tests.flora.far_end import NOON, VirtualTime
from tracker.core.errors import KeyRefused
from tracker.flora.resilience import Breaker

REFUSAL = KeyRefused(status=401, code="invalid_api_key", message="no such key", request_id="req_1")


def breaker_in(time: VirtualTime) -> Breaker:
    return Breaker(clock=time.now, monotonic=time.monotonic)


def test_closed_until_refused() -> None:
    """A new breaker lets everything through."""
    breaker = breaker_in(VirtualTime())
    breaker.check()
    breaker.admit()
    assert (breaker.open, breaker.since, breaker.reason) == (False, None, None)


def test_open_it_refuses_with_floras_words() -> None:
    """While it is open calls fail at once, with FLORA's refusal and the time to the next probe."""
    time = VirtualTime()
    breaker = breaker_in(time)
    breaker.refused(REFUSAL)
    time.elapsed = 10
    for refuse in (breaker.check, breaker.admit):
        with pytest.raises(KeyRefused) as caught:
            refuse()
        assert str(caught.value) == str(REFUSAL)
        assert caught.value.retry_after == 20
    assert (breaker.open, breaker.since, breaker.reason) == (True, NOON, str(REFUSAL))


def test_one_probe_every_half_minute() -> None:
    """After 30 s one call is let through, and the next only 30 s later, whatever became of it."""
    time = VirtualTime()
    breaker = breaker_in(time)
    breaker.refused(REFUSAL)
    for probe_at in (30, 60):
        time.elapsed = probe_at
        breaker.check()
        breaker.admit()
        with pytest.raises(KeyRefused):
            breaker.admit()
    breaker.refused(REFUSAL)
    assert breaker.since == NOON
    time.elapsed = 89
    with pytest.raises(KeyRefused):
        breaker.admit()


def test_closed_again() -> None:
    """A key that is taken closes it; a later refusal opens it anew."""
    time = VirtualTime()
    breaker = breaker_in(time)
    breaker.refused(REFUSAL)
    breaker.accepted()
    breaker.admit()
    assert (breaker.open, breaker.since, breaker.reason) == (False, None, None)
    time.elapsed = 5
    breaker.refused(REFUSAL)
    assert breaker.since == NOON + timedelta(seconds=5)
