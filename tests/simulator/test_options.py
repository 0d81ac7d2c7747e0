"""Options as text, JSON and on the command line, and where they are documented."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.forked import Forked
from tests.support.waiting import eventually
from tracker.simulator import HELP, Options

CLI_PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
OWN_FLAGS = {
    *("drop", "duplicate", "early", "late", "reorder", "bad_signature", "rate_limit", "errors"),
    *("cut", "failures", "history_outputs"),
}


def test_every_option_is_documented() -> None:
    """The table in docs/cli.md contains every option of `--set` with its help text."""
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
        ("history", "1e5", 100_000),
        ("bad_fields", "run_id,status", ("run_id", "status")),
        ("cursor_type", "number", "number"),
        ("signed_links", "true", True),
        ("slow_run", "last", "last"),
        ("prices", "icon-pack:20,cctv-cam:0.5", {"icon-pack": 20.0, "cctv-cam": 0.5}),
        ("new_inputs", "icon-pack:style:text?", {"icon-pack": "style:text?"}),
        ("clock_offset", "-3.5", -3.5),
    ],
)
def test_options_are_read_from_text(name: str, text: str, value: object) -> None:
    """Text becomes the value; the value itself is accepted too."""
    assert getattr(Options().with_changes({name: text}), name) == value
    assert getattr(Options().with_changes({name: value}), name) == value


def test_words_may_be_numbers_in_json() -> None:
    """As somebody writes a status there."""
    options = Options().with_changes({"gateway_answers": [502, "empty"], "second_answer": 404})
    assert (options.gateway_answers, options.second_answer) == (("502", "empty"), "404")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gateway", 1.5),
        ("credits", True),
        ("retry_after", True),
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


@contextmanager
def _simulate(folder: Path, *arguments: str) -> Iterator[Forked]:
    """`tracker simulate` on a free port; stdout and stderr go to files of these names."""
    output, errors = folder / "stdout", folder / "stderr"
    command = ("simulate", "--port", "0", *arguments)
    process = Forked.begin(*command, env={}, output=output, errors=errors)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.join(timeout=30)


async def _shown(folder: Path) -> dict[str, Any]:
    """What `tracker simulate --json` prints once it answers."""
    output = folder / "stdout"
    await eventually(lambda: output.exists() and output.read_text().endswith("}}\n"))
    return json.loads(output.read_text())  # type: ignore[no-any-return]


async def test_the_command_sets_options_now_and_later(tmp_path: Path) -> None:
    """`--set` holds from the start, `--at` from its moment on; `-` stands for `_`."""
    now = ("--set", "late-bills=40%", "--set", "history=3")
    later = ("--at", "0:prices=icon-pack:20", "--at", "900:gateway=1")
    with _simulate(tmp_path, "--json", *now, *later):
        url = f"{(await _shown(tmp_path))['url']}/simulator/faults"
        async with httpx.AsyncClient() as client:
            options = (await client.get(url)).json()
    assert (options["late_bills"], options["history"]) == (0.4, 3)
    assert (options["prices"], options["gateway"]) == ({"icon-pack": 20}, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """It prints its address, answers there, and ends with status 0 on either signal."""
    with _simulate(tmp_path, "--json") as process:
        environment = (await _shown(tmp_path))["environment"]
        headers = {"Authorization": f"Bearer {environment['FLORA_API_KEY']}"}
        async with httpx.AsyncClient(headers=headers) as client:
            answer = await client.get(f"{environment['FLORA_BASE_URL']}/techniques")
        assert answer.status_code == 200
        assert "date" in answer.headers
        process.send_signal(number)
        assert await process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    "arguments", [("--set", "x=1"), ("--set", "gateway"), ("--at", "soon:gateway=1")]
)
async def test_the_command_refuses_wrong_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The status is 2, and the error one line."""
    with _simulate(tmp_path, *arguments) as process:
        assert await process.wait() == 2
    assert len((tmp_path / "stderr").read_text().splitlines()) == 1
