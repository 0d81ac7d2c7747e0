"""`tracker demo` plays to its end, and its comparison finds every difference."""

import asyncio
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from tests.support.forked import run_python
from tracker.cli import simulate
from tracker.cli.simulate import compare_runs
from tracker.web.http import server

RECORD: dict[str, Any] = {
    "run_id": "run_1",
    "workspace_id": "ws_1",
    "technique": {"technique_id": "tech_a", "name": "A"},
    "callback_url": "http://127.0.0.1/callbacks/flora",
    "faults": ["drop"],
    "end": {
        "status": "completed",
        "created_at": 1750000000123,
        "started_at": 1750000001000,
        "completed_at": 1750000002000,
        "charged_cost": 0.25,
        "outputs": [{"output_id": "o1", "type": "text", "url": "words"}],
    },
}
RUN: dict[str, Any] = {
    "run_id": "run_1",
    "workspace_id": "ws_1",
    "technique_id": "tech_a",
    "tracking": "settled",
    "ended_via": "poll",
    "status": "completed",
    "created_at": "2025-06-15T15:06:40.123000Z",
    "started_at": "2025-06-15T15:06:41.000000Z",
    "completed_at": "2025-06-15T15:06:42.000000Z",
    "charged_cost": 0.25,
    "error_code": None,
    "error_message": None,
    "outputs": [{"position": 0, "output_id": "o1", "type": "text", "url": "words"}],
}


def assert_all_ended_as_the_simulator_says(told: dict[str, Any]) -> None:
    """All runs of the demo, those with lost callbacks and the unknown one too."""
    assert told["agree"] is True
    runs = told["runs"]
    assert len(runs) == 13
    assert len({run["technique_id"] for run in runs}) > 3
    assert {run["tracking"] for run in runs} == {"settled"}
    assert {run["status"] for run in runs} == {"completed", "failed"}
    lost = [run for run in runs if run["callback"] == "lost"]
    assert len(lost) >= 3
    assert all(run["ended_via"] in ("poll", "history") for run in lost)
    assert any(run["ended_via"] == "callback" for run in runs)


async def test_it_is_interrupted_while_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is a moment after its start."""

    def interrupting(app: ASGIApp, **more: Any) -> server.Server:
        return Server(app, **(more | {"on_ready": playing.cancel}))

    Server = server.Server
    monkeypatch.setattr(server, "Server", interrupting)
    playing = asyncio.create_task(simulate._demonstrate())
    with pytest.raises(asyncio.CancelledError):
        await playing


def test_the_comparison_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Each run, and how many differ."""
    simulate._print_result(compare_runs([RUN], [RECORD]))
    shown = capsys.readouterr().out
    assert "1 runs, 1 callbacks lost; ends known: 1 by poll." in shown
    assert "of every run are those of the simulator's records" in shown
    simulate._print_result(compare_runs([RUN | {"status": "failed"}], [RECORD]))
    shown = capsys.readouterr().out
    assert "no: status" in shown
    assert "1 of them differ" in shown


@pytest.mark.timeout(120)
async def test_the_demo_plays_to_its_end(tmp_path: Path) -> None:
    """Every run ends as the simulator says, someone's own settings are neither used nor harmed,
    and the machine's time zone does not matter, in POSIX's form either, which zoneinfo lacks."""
    theirs = {
        "FLORA_API_KEY": "sk_live_real",
        "TRACKER_DATABASE_URL": "sqlite:///real.db",
        "TRACKER_PUBLIC_URL": "https://real.example.org",
        "TZ": "CET-1CEST,M3.5.0,M10.5.0/3",
    }
    folder = tmp_path / "a user's"
    folder.mkdir()
    command = ("-m", "tracker", "demo", "--json")
    done = await asyncio.to_thread(run_python, *command, env=theirs, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    assert_all_ended_as_the_simulator_says(json.loads(done.stdout))


def test_an_equal_run_has_no_difference() -> None:
    """A run that is as the simulator recorded it shows no difference."""
    (comparison,) = compare_runs([RUN], [RECORD])
    assert comparison.differences == ()
    assert comparison.callback == "lost"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "failed"),
        ("tracking", "active"),
        ("charged_cost", 0.24),
        ("completed_at", "2025-06-15T15:06:42.001000Z"),
        ("started_at", None),
        ("error_code", "internal_error"),
        ("outputs", []),
        ("outputs", [{"position": 0, "output_id": "o1", "type": "text", "url": "other"}]),
        ("technique_id", None),
    ],
)
def test_any_difference_is_found(field: str, value: object) -> None:
    """The comparison covers status, outputs, cost, times, errors and ids."""
    run = deepcopy(RUN) | {field: value}
    (comparison,) = compare_runs([run], [RECORD])
    assert comparison.differences == (field,)


def test_a_run_known_to_one_side_only_is_a_difference() -> None:
    """Both a missed run and an invented one are reported."""
    (missed,) = compare_runs([], [RECORD])
    assert "status" in missed.differences
    made_up = compare_runs([RUN, deepcopy(RUN) | {"run_id": "run_2"}], [RECORD])[1]
    assert made_up.differences == ("unknown to FLORA",)
