"""What several processes have seen of FLORA together."""

from datetime import UTC, datetime, timedelta

from tracker.core.contact import ContactState, OngoingTrouble, Trouble, joined

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


def at(minutes: float) -> datetime:
    """A time by minutes after noon."""
    return NOON + timedelta(minutes=minutes)


def state(
    asked: float, answered: float | None = None, *, since: float | None = None, **more: Trouble
) -> ContactState:
    """What a process has seen, with a trouble `since` then."""
    trouble = None
    if since is not None:
        trouble = OngoingTrouble(more.get("trouble", Trouble.UNREACHABLE), at(since), "no answer")
    answered_at = None if answered is None else at(answered)
    return ContactState(asked_at=at(asked), answered_at=answered_at, trouble=trouble)


def both(one: ContactState, other: ContactState) -> tuple[datetime, datetime | None, float | None]:
    """The times of the two joined: asked, answered, and the minute since when there is a trouble.
    The order of the two does not matter."""
    found = joined(one, other)
    assert found == joined(other, one)
    since = found.trouble and (found.trouble.since - NOON) / timedelta(minutes=1)
    return found.asked_at, found.answered_at, since


def test_an_answer_to_any_process_ends_a_silence() -> None:
    """However long another one has got no answer; that one's later failures change nothing while
    answers keep coming."""
    assert both(state(5, since=0), state(6, 6)) == (at(6), at(6), None)
    assert both(state(6.2, since=0), state(6, 6)) == (at(6.2), at(6), None)


def test_a_silence_begins_where_the_last_answer_to_any_process_was() -> None:
    """The process that had answers has ended; what remains is the one that never gets any."""
    assert both(state(10, since=0), state(6, 6)) == (at(10), at(6), 6)


def test_a_restarted_process_keeps_the_beginning_of_a_silence() -> None:
    """Before it reports the trouble itself, and after."""
    before = state(5, -1, since=0)
    assert both(before, state(7)) == (at(7), at(-1), 0)
    assert both(before, state(8, since=7)) == (at(8), at(-1), 0)


def test_a_refusal_is_what_the_last_answer_says() -> None:
    """A key that is refused and then accepted by any process is accepted."""
    refused = state(5, since=4, trouble=Trouble.KEY_REFUSED)
    assert both(refused, state(6, 6)) == (at(6), at(6), None)
    assert both(refused, state(4, 4)) == (at(5), at(4), 4)
