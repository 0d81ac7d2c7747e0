"""What is printed, and how long a command waits: the parts that no process is needed for."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import eventually
from tracker.cli import output
from tracker.cli.command import flora_deadline
from tracker.cli.output import print_fields, print_json, print_table
from tracker.core.errors import FloraUnreachable
from tracker.flora.caller import Wait

HOSTILE = "a\x1b[2Jb\nc\x9bd [red]e[/red]"


def test_other_peoples_text_is_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither control characters nor markup in a name or a message do anything to a terminal."""
    print_table(["run", "error"], [["run_1", HOSTILE], [None, True]])
    print_fields({"error": HOSTILE, "nothing": None})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert shown.count("a\\x1b[2Jb\\x0ac\\x9bd [red]e[/red]") == 2
    assert "nothing" not in shown


def test_json_survives_every_locale(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is ASCII, whatever is in it."""
    print_json({"name": "Ü\x9b\ud800"})
    assert capsys.readouterr().out.isascii()


async def test_each_cause_of_a_wait_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """However long it lasts, and when it comes again, where no terminal counts it down."""
    silent = FloraUnreachable("", may_have_acted=False)
    reads = 0

    class Client:
        @property
        def wait(self) -> Wait | None:
            nonlocal reads
            reads += 1
            waits = (
                Wait(passed=0.5, left=20, paused=3, error=None),  # too short to be reported
                Wait(passed=2, left=20, paused=3, error=None),
                Wait(passed=3, left=19, paused=0, error=silent),
                None,
            )
            return waits[reads % len(waits)]

    waiting: Any = SimpleNamespace(workspaces=[SimpleNamespace(client=Client())])
    async with output.showing_waits(waiting, every=0.001):
        await eventually(lambda: reads >= 12, interval=0.001)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "tracker: FLORA asked for a pause, waiting for up to 3 s",
        "tracker: FLORA does not answer, retrying for up to 19 s",
    ]


def services(clock_offset: Any) -> Any:
    """Services whose one client has heard from FLORA, or not."""
    client = SimpleNamespace(clock_offset=clock_offset)
    return SimpleNamespace(
        workspaces=[SimpleNamespace(client=client), SimpleNamespace(client=None)]
    )


async def test_a_command_gives_up_on_a_flora_that_never_answers() -> None:
    """Without any answer the block is cancelled; after one it continues."""
    with pytest.raises(FloraUnreachable, match="has not answered"):
        async with flora_deadline(services(None), seconds=0.01):
            await asyncio.Event().wait()
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, done.set)
    async with flora_deadline(services(0), seconds=0.01):
        await done.wait()
    with pytest.raises(TimeoutError):
        async with flora_deadline(services(0), seconds=0.01):
            raise TimeoutError  # another time-out is passed on
