"""What is often wrong in a first program gets one error, which says what to do."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.library.conftest import INPUTS, MakeTracker
from tests.support.forked import run_python
from tracker import Tracker, errors

Call = Callable[[Tracker], Awaitable[Any]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda tracker: tracker.start("icon-pak", INPUTS),
            errors.NotFound,
            "there is no technique 'icon-pak'; `tracker techniques list` shows all",
        ),
        (
            lambda tracker: tracker.start("icon-pack", {"promt": "tools"}),
            errors.InvalidRequest,
            "no input 'promt' (it has prompt)",
        ),
        (
            lambda tracker: tracker.start("icon-pack", "tools"),
            errors.InvalidRequest,
            "inputs: must be a mapping of input ids to values",
        ),
        (
            lambda tracker: tracker.start("icon-pack", ["tools"]),
            errors.InvalidRequest,
            "inputs: must be a mapping of input ids to values",
        ),
        (
            lambda tracker: tracker.start("icon-pack", INPUTS, idempotency_key=17),
            errors.InvalidRequest,
            "idempotency_key: must be a text, not 17",
        ),
        (
            lambda tracker: tracker.start(None, INPUTS),
            errors.InvalidRequest,
            "technique: must be a text, not None",
        ),
        (
            lambda tracker: tracker.start_batch(None, [INPUTS]),
            errors.InvalidRequest,
            "technique: must be a text, not None",
        ),
        (
            lambda tracker: tracker.start_batch("icon-pack", [INPUTS, {"promt": "tools"}]),
            errors.InvalidRequest,
            "rows.2.promt: is no input: did you mean 'prompt', which is required (text)?",
        ),
        (
            lambda tracker: tracker.start_batch("icon-pack", [INPUTS], name=5),
            errors.InvalidRequest,
            "name: must be a text, not 5",
        ),
        (
            lambda tracker: tracker.start_batch("icon-pack", 5),
            errors.InvalidRequest,
            "rows: cannot be 5",
        ),
        *(
            (
                lambda tracker, rows=rows: tracker.start_batch("icon-pack", rows),
                errors.InvalidRequest,
                words,
            )
            for rows, words in (
                ([], "rows: must not be empty"),
                ([INPUTS, 5], "nothing was started: rows.2: must be a mapping, not int"),
                ([{"prompt": ["a", object()]}], "rows.1.prompt: must be a text, a number"),
                ([{"prompt": ["a", "b"]}], "rows.1.prompt: prompt takes one value only"),
            )
        ),
        *(
            (
                lambda tracker, more=more: tracker.start_batch("icon-pack", [INPUTS], **more),
                errors.InvalidRequest,
                words,
            )
            for more, words in (
                ({"columns": 5}, "columns: cannot be 5"),
                ({"columns": {"prompt": 5}}, "5"),
                ({"tag_columns": 5}, "tag_columns: cannot be 5"),
                ({"tag_columns": {"order": 5}}, "5"),
            )
        ),
        (
            lambda tracker: tracker.start("icon-pack", INPUTS, tags={"order": 17}),
            errors.InvalidRequest,
            "'order': a value is a text",
        ),
        (
            lambda tracker: tracker.receive_callback('{"id": "whd_1"}', {}),
            errors.InvalidRequest,
            "body: must be the raw bytes of the request, not str",
        ),
        (
            lambda tracker: tracker.technique("icon-pak"),
            errors.TechniqueUnknown,
            "there is no technique 'icon-pak': `tracker.techniques()` yields all",
        ),
        (
            lambda tracker: anext(tracker.techniques(5)),
            errors.InvalidRequest,
            "text: must be a text, not 5",
        ),
        *(
            (call, errors.InvalidRequest, words)
            for call, words in (
                (
                    lambda tracker: tracker.wait("run_1", timeout="5"),
                    "timeout: must be a number of seconds or None, not '5'",
                ),
                (
                    lambda tracker: tracker.start("icon-pack", INPUTS, timeout="5"),
                    "timeout: must be a number of seconds or None, not '5'",
                ),
                (
                    lambda tracker: tracker.wait(None),
                    "runs: must be a run or its id, or several of them, not None",
                ),
                (lambda tracker: tracker.wait([None]), "run: must be a run or its id, not None"),
                (lambda tracker: anext(tracker.as_settled(5)), "runs: must be a run or its id"),
                (lambda tracker: anext(tracker.runs(status=5)), "status: must be a text, not 5"),
                (lambda tracker: anext(tracker.events(after="x")), "after: cannot be 'x'"),
                (lambda tracker: tracker.get(None), "run_id: must be a text, not None"),
                (lambda tracker: tracker.track(None), "run_id: must be a text, not None"),
                (lambda tracker: tracker.events_of(None), "run: must be a run or its id"),
                (lambda tracker: tracker.batch(None), "batch_id: must be a text, not None"),
                (lambda tracker: tracker.spending(since="7d"), "since: must be a datetime"),
                (lambda tracker: tracker.receive_callback(b"", None), "headers: cannot be None"),
            )
        ),
        (lambda tracker: tracker.wait("run_1"), errors.RunUnknown, "`tracker.track(run_id)`"),
        (
            lambda tracker: tracker.spending(by="tag"),
            errors.InvalidRequest,
            "by: must be day, technique or tag:KEY, such as tag:campaign",
        ),
        (
            lambda tracker: anext(tracker.runs(tracking="open")),
            errors.InvalidRequest,
            "tracking: must be one of active, settled, lost",
        ),
    ],
)
async def test_a_wrong_call_says_what_is_wrong(
    tracker: Tracker, call: Call, error: type[Exception], words: str
) -> None:
    """A wrong technique, input, key, tag or run is named, and nothing is started."""
    with pytest.raises(error) as raised:
        await call(tracker)
    assert words in str(raised.value)
    assert [run async for run in tracker.runs()] == []


async def test_a_missing_key_is_named(make_tracker: MakeTracker) -> None:
    """Without an API key, the error names the variable to set."""
    async with make_tracker(flora_api_key=None) as tracker:
        with pytest.raises(errors.SettingsError, match="set FLORA_API_KEY"):
            await tracker.start("icon-pack", INPUTS)


async def test_a_tracker_that_is_not_open_says_how_to_open_it(make_tracker: MakeTracker) -> None:
    """A call before `async with` names it."""
    with pytest.raises(errors.TrackerNotOpen, match="async with tracker"):
        await make_tracker().start("icon-pack", INPUTS)


def test_a_database_that_is_not_there_is_the_last_word() -> None:
    """A blocking tracker that could not be opened has nothing to close when the script ends."""
    program = """
from tracker.settings import Settings
from tracker.sync import Tracker

with Tracker(Settings(tracker_database_url="postgresql://127.0.0.1:1/none")):
    pass
"""
    done = run_python("-c", program, env={"PATH": os.environ["PATH"]})
    assert "StoreUnavailable: the database cannot be reached" in done.stderr.splitlines()[-1]
