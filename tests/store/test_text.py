"""Text and JSON are made fit for both databases, and left alone where they are."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import called, observations, seen
from tracker.core.formatting import clean
from tracker.core.record import FailedRead
from tracker.store.engine import dump_json
from tracker.store.writing.writer import cleaned

anything = st.text(st.characters(exclude_categories=())) | st.sampled_from(["\0", "\ud800", "é\0"])


@given(anything)
def test_clean_text_can_be_stored(text: str) -> None:
    """What comes out is UTF-8 without NUL, as long as it was, and the same where nothing was
    wrong."""
    fit = clean(text)
    assert "\0" not in fit.encode().decode()
    assert len(fit) == len(text)
    assert clean(fit) is fit
    assert fit == text or "\ufffd" in fit


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | anything,
        lambda inner: st.lists(inner) | st.dictionaries(anything, inner),
        max_leaves=20,
    )
)
def test_any_json_can_be_stored(value: Any) -> None:
    """Whatever someone's JSON holds becomes JSON that both databases take."""
    text = dump_json(value)
    assert "\\u0000" not in text
    text.encode()
    again = orjson.loads(text)
    assert dump_json(again) == text


def test_ordinary_json_is_left_alone() -> None:
    """Nothing is changed without need."""
    value = {"a": [1, 2.5, None, True, "é\\u0000"[:1]], "b": {"c": ""}}
    assert orjson.loads(dump_json(value)) == value


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, [b"bytes"]])
def test_what_is_no_json_is_refused(value: Any) -> None:
    """A value that JSON cannot hold is a fault in our own code, and said so."""
    with pytest.raises(ValueError, match="JSON"):
        dump_json(value)


def test_json_without_bottom_is_refused() -> None:
    """So is one that is nested without end."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="JSON"):
        dump_json(value)


@given(observations("run\0"))
def test_observations_are_cleaned_once(observation: Any) -> None:
    """A clean observation stays the very object it is."""
    fit = cleaned(observation)
    assert cleaned(fit) is fit
    assert fit.run_id == "run\ufffd"
    dump_json(fit.to_json()).encode()
    assert "\\u0000" not in dump_json(fit.to_json())


def test_entries_of_every_kind_are_cleaned() -> None:
    """Callbacks, reads, and reads that showed nothing."""
    entries = [
        called("r\0"),
        seen("r\0"),
        FailedRead(run_id="r\0", at=seen("r").observation.at, error="e\ud800"),
    ]
    for entry in entries:
        fit = cleaned(entry)
        assert "\0" not in repr(fit)
        assert "\\x00" not in repr(fit)
        assert "\\ud800" not in repr(fit)
        assert cleaned(fit) is fit
