"""One machine: the systemd unit and the cron table start what there is."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.commands import assert_taken
from tests.deploy.conftest import ROOT
from tests.docs.pages import DOCS, blocks
from tracker.settings import load_settings

UNIT = ROOT / "deploy/systemd/tracker.service"
CRON = ROOT / "deploy/cron/tracker"
PROGRAM = "/opt/tracker/bin/tracker"


@pytest.fixture
def analyze() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs systemd-analyze. Where it is not installed its tests are left out, unless
    TRACKER_REQUIRE_SYSTEMD is set."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("TRACKER_REQUIRE_SYSTEMD"):
            pytest.fail("systemd-analyze is not installed, and TRACKER_REQUIRE_SYSTEMD is set")
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    command = partial(subprocess.run, capture_output=True, text=True, check=False)
    return lambda *arguments: command(["systemd-analyze", *arguments])


def test_the_unit_is_sound(tmp_path: Path, analyze: Any) -> None:
    """systemd itself has nothing to say about the unit, once the program is there."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    done = analyze("verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", sorted(UNIT.parent.glob("*.service")), ids=lambda unit: unit.name)
def test_units_are_little_exposed(unit: Path, analyze: Any) -> None:
    """By systemd's own measure, from 0 to 10, each unit is below 2."""
    done = analyze("security", "--offline=true", "--threshold=20", unit)
    assert done.returncode == 0, done.stdout


def test_units_see_which_boot_it_is() -> None:
    """Without /proc/sys no process could tell that the clock was set while it did not run."""
    for unit in UNIT.parent.glob("*.service"):
        assert not re.search("^ProcSubset=pid", unit.read_text(), re.MULTILINE)


def test_the_unit_starts_a_real_command() -> None:
    """The command line takes what the unit starts."""
    (command,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", UNIT.read_text(), re.MULTILINE)
    assert_taken(command.split())
    assert "--callbacks-port 8081" in command  # docs/proxy.md leads proxies there


def test_the_drop_ins_start_real_commands() -> None:
    """Those of docs/production.md for several machines: each empties the unit's command first, and
    every process has a port to scrape."""
    drop_ins = [one.text for one in blocks(DOCS / "production.md", "ini")]
    assert len(drop_ins) == 2
    for text in drop_ins:
        emptied, command = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
        assert emptied == ""
        assert command.startswith(f"{PROGRAM} ")
        assert_taken(command.split()[1:])
        assert " --port " in command


def test_the_units_settings_load(tmp_path: Path) -> None:
    """tracker.toml is valid, and reads no secret but from files beside it."""
    text = (UNIT.parent / "tracker.toml").read_text()
    uncommented = re.sub(r"^# (?=\[\[|\w+ = )", "", text, flags=re.MULTILINE)
    read = re.findall(r'"file:/etc/tracker/(\w+)"', uncommented)
    assert len(read) == uncommented.count("file:") == 4
    for name in read:
        (tmp_path / name).write_text(f"{name}_value_long_enough")
    config = tmp_path / "tracker.toml"
    for given, names in (
        (text, ["TRACKER_API_TOKEN"]),
        (uncommented, ["TRACKER_API_TOKEN", "prometheus"]),
    ):
        config.write_text(given.replace("/etc/tracker", str(tmp_path)))
        settings = load_settings({"TRACKER_CONFIG": str(config)})
        assert settings.callback_url == "https://tracker.example.com/callbacks/flora"
        assert [token.name for token in settings.access_tokens] == names


def test_cron_and_the_unit_are_one_user_with_one_configuration() -> None:
    """What cron does is done by the unit's user, with the unit's settings."""
    unit, cron = UNIT.read_text(), CRON.read_text()
    assert "\nUser=tracker\n" in unit
    assert "DynamicUser" not in unit
    (config,) = re.findall(r"^Environment=(TRACKER_CONFIG=\S+)$", unit, re.MULTILINE)
    assert f"\n{config}\n" in cron


def test_cron_starts_real_commands() -> None:
    """Each line of the cron table has five fields, a user, and a command that is taken; those of a
    machine without a worker are remarks."""
    lines = [line for line in CRON.read_text().splitlines() if f"{PROGRAM} " in line]
    assert [line.startswith("# ") for line in lines] == [False, False, True, True]
    for line in (line.removeprefix("# ") for line in lines):
        assert line.split()[5] == "tracker"
        command, _, unread = line.partition(f"{PROGRAM} ")[2].partition(" >")
        assert_taken(command.split())
        # cron mails what is written, every minute of `poll`.
        assert unread == ("" if command.startswith("verify") else "/dev/null")
