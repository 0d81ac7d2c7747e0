"""One machine: the systemd unit and the cron table start what there is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.commands import assert_taken
from tests.deploy.conftest import ROOT
from tracker.settings import load_settings

UNIT = ROOT / "deploy/systemd/tracker.service"
CRON = ROOT / "deploy/cron/tracker"
PROGRAM = "/opt/tracker/bin/tracker"


def test_the_unit_is_sound(tmp_path: Path) -> None:
    """systemd itself has nothing to say about the unit, once the program is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_a_real_command() -> None:
    """The command line takes what the unit starts."""
    (command,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", UNIT.read_text(), re.MULTILINE)
    assert_taken(command.split())


def test_the_units_settings_load(tmp_path: Path) -> None:
    """tracker.toml is valid, and reads no secret but those that the unit hands over."""
    text = (UNIT.parent / "tracker.toml").read_text()
    handed = set(re.findall(r"^LoadCredential=(\w+):", UNIT.read_text(), re.MULTILINE))
    read = set(re.findall(r"/run/credentials/tracker.service/(\w+)", text))
    assert read == handed
    for name in read:
        (tmp_path / name).write_text(f"{name}_value")
    config = tmp_path / "tracker.toml"
    config.write_text(text.replace("/run/credentials/tracker.service", str(tmp_path)))
    settings = load_settings({"TRACKER_CONFIG": str(config)})
    assert settings.callback_url == "https://tracker.example.com/callbacks/flora"


def test_cron_starts_real_commands() -> None:
    """Each line of the cron table has five fields, a user, and a command that is taken."""
    lines = [
        line
        for line in CRON.read_text().splitlines()
        if line and not line.startswith("#") and "=" not in line.split()[0]
    ]
    assert len(lines) == 3
    for line in lines:
        assert line.split()[5] == "tracker"
        assert_taken(line.partition(f"{PROGRAM} ")[2].split())
