"""Options as text, JSON and on the command line, and where they are documented."""

import asyncio
import json
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from tracker.simulator import HELP, Options

CLI_PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
OWN_FLAGS = {
    *("drop", "duplicate", "early", "late", "reorder", "bad_signature", "rate_limit", "errors"),
    *("cut", "failures", "history_outputs"),
}


def test_every_option_is_documented() -> None:
    """The table in docs/cli.md has what `--set` takes, in the options' words."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ", CLI_PAGE.read_text(encoding="utf-8"), re.M)
    documented = {name: text for name, text in rows if not text.startswith("`")}
    assert documented == {name: text for name, text in HELP.items() if name not in OWN_FLAGS}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("gateway", "12.5%", 0.125),
        ("gateway_seconds", "none", None),
        ("gateway_seconds", "1.5", 1.5),
        ("gateway_answers", "404,empty", ("404", "empty")),
        ("bill_seconds", "5,60", (5.0, 60.0)),
        ("bad_offset", "7", 7),
        ("signed_links", "true", True),
        ("slow_run", "last", "last"),
        ("prices", "icon-pack:20,cctv-cam:0.5", {"icon-pack": 20.0, "cctv-cam": 0.5}),
        ("new_inputs", "icon-pack:style:text?", {"icon-pack": "style:text?"}),
        ("clock_offset", "-3.5", -3.5),
    ],
)
def test_options_are_taken_as_text(name: str, text: str, value: object) -> None:
    """Text becomes the value; the value is taken as it is."""
    assert getattr(Options().with_changes({name: text}), name) == value
    assert getattr(Options().with_changes({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gateway", 1.5),
        ("gateway_answers", "500"),
        ("gateway_seconds", "soon"),
        ("bill_seconds", "5,-1"),
        ("bad_offset", 1.5),
        ("signed_links", "maybe"),
        ("slow_run", "never"),
        ("prices", "icon-pack"),
        ("refuse", "runs.start:teapot"),
        ("queued_name", " "),
        ("speed", 2),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: object) -> None:
    """The error begins with the option's name."""
    with pytest.raises(ValueError, match=f"^{name}: "):
        Options().with_changes({name: value})
    with pytest.raises(ValueError, match=f"^{name}: "):
        Options(later=((1, {name: value}),))


async def _simulate(*arguments: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "tracker", "simulate", "--port", "0", *arguments)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


async def test_the_command_sets_options_now_and_later() -> None:
    """`--set` holds from the start, `--at` from its moment on; `-` stands for `_`."""
    process = await _simulate(
        *("--json", "--set", "late-bills=40%", "--set", "history=3"),
        *("--at", "0:prices=icon-pack:20", "--at", "900:gateway=1"),
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            shown = b""
            while not shown.rstrip().endswith(b"}\n}"):
                shown += await process.stdout.readline()
        async with httpx.AsyncClient() as client:
            url = f"{json.loads(shown)['url']}/simulator/faults"
            options = (await client.get(url)).json()
        assert (options["late_bills"], options["history"]) == (0.4, 3)
        assert (options["prices"], options["gateway"]) == ({"icon-pack": 20}, 0)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


@pytest.mark.parametrize(
    "arguments", [("--set", "x=1"), ("--set", "gateway"), ("--at", "soon:gateway=1")]
)
async def test_the_command_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    """Wrong usage is status 2 and one line."""
    process = await _simulate(*arguments)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert len(errors.decode().splitlines()) == 1
