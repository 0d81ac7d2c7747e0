"""Rows are told by what they ask for, not by where they stand."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tracker.core.starts import Input, RunNumber, batch_id, canonical, row_digests, row_key


def asked(value: str) -> list[Input]:
    return [{"id": "prompt", "type": "text", "value": value}]


sheets = st.lists(st.sampled_from("abc").map(asked), max_size=8)
chances = st.randoms(use_true_random=False)


@given(sheets, sheets, chances)
def test_other_rows_do_not_change_a_rows_key(
    before: list[list[Input]], more: list[list[Input]], chance: Random
) -> None:
    """Rows that are added anywhere, and any sorting, leave the keys of those that were there."""
    after = before + more
    chance.shuffle(after)
    known, now = row_digests("tech_1", before), row_digests("tech_1", after)
    assert Counter(known) <= Counter(now)
    assert len(set(now)) == len(now)


@given(sheets, st.data())
def test_rows_that_are_taken_out_leave_known_keys(
    before: list[list[Input]], data: st.DataObject
) -> None:
    """What is left of a sheet is told by keys that it had before."""
    left = [row for row in before if data.draw(st.booleans())]
    assert set(row_digests("tech_1", left)) <= set(row_digests("tech_1", before))


def test_whatever_is_asked_for_makes_another_key() -> None:
    """Technique, input, type, value and how many equal rows came before all count."""
    one = asked("a")
    others = [
        row_digests("tech_2", [one])[0],
        row_digests("tech_1", [asked("b")])[0],
        row_digests("tech_1", [[{**one[0], "id": "words"}]])[0],
        row_digests("tech_1", [[{**one[0], "type": "imageUrl"}]])[0],
        *row_digests("tech_1", [one, one]),
    ]
    assert len(set(others)) == len(others)
    assert others[-2] == row_digests("tech_1", [one])[0]


def test_the_order_of_inputs_does_not_count_but_that_of_values_does() -> None:
    """Inputs are sorted by id; several values of one input stay as they were given."""
    a, b, c = ({"id": name, "type": "text", "value": value} for name, value in ("ax", "bx", "by"))
    assert canonical([b, c, a]) == [a, b, c]
    assert row_digests("t", [[a, b, c]]) == row_digests("t", [[b, a, c]])
    assert row_digests("t", [[a, b, c]]) != row_digests("t", [[a, c, b]])


def test_each_turn_has_its_own_key() -> None:
    """A rerun and each attempt within one are started by keys of their own, in order."""
    first = RunNumber()
    numbers = [first, first.retried(), first.retried().retried(), first.again()]
    numbers += [first.again().retried()]
    assert numbers == sorted(numbers)
    assert first.retried().again() == first.again()
    keys = [row_key("d1ge57", run_number) for run_number in numbers]
    assert keys == [
        "row-d1ge57",
        "row-d1ge57-retry1",
        "row-d1ge57-retry2",
        "row-d1ge57-again1",
        "row-d1ge57-again1-retry1",
    ]


def test_a_batch_is_its_sheet() -> None:
    """The same rows are the same batch, whatever was tried again; a rerun is another one."""
    rows = [(1, "a", RunNumber()), (2, "b", RunNumber())]
    one = batch_id("default", "tech_1", rows)
    assert one == batch_id("default", "tech_1", [(1, "a", RunNumber().retried()), rows[1]])
    others = [
        batch_id("other", "tech_1", rows),
        batch_id("default", "tech_2", rows),
        batch_id("default", "tech_1", [(1, "a", RunNumber().again()), rows[1]]),
        batch_id("default", "tech_1", [(1, "b", RunNumber()), (2, "a", RunNumber())]),
        batch_id("default", "tech_1", rows[:1]),
    ]
    assert len({one, *others}) == 6
