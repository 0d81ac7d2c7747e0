"""The wheel, as someone installs it who has never seen the repository."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.cli.test_demo import assert_all_ended_as_the_simulator_says
from tests.deploy.conftest import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The wheel, built from this checkout."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (built,) = tmp_path.glob("*.whl")
    return built


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; the test fails where the command does."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    """It holds the package, its migrations and its pages' files, and no tests or caches."""
    assert wheel.name == f"flora_run_tracker-{VERSION}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "tracker",
        f"flora_run_tracker-{VERSION}.dist-info",
    }
    assert any(name.startswith("tracker/migrations/versions/0001") for name in names)
    assert "tracker/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_the_demo_runs_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """With nothing but the wheel and its locked dependencies, the demo plays to its end. (From the
    checkout: tests/cli/test_demo.py.)"""
    python = tmp_path / "fresh/bin/python"
    uv = (sys.executable, "-m", "uv")
    environment = {"PYTHONPATH": str(ROOT / ".tools"), "UV_PYTHON_DOWNLOADS": "never"}
    run(*uv, "venv", "--quiet", "--python", sys.executable, python.parents[1], cwd=tmp_path,
        **environment)  # fmt: skip
    locked = ROOT / "requirements/runtime.txt"
    run(*uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", locked,
        cwd=tmp_path, **environment)  # fmt: skip
    run(*uv, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel, cwd=tmp_path,
        **environment)  # fmt: skip
    tracker = python.with_name("tracker")
    assert run(tracker, "--version", cwd=tmp_path).strip() == f"tracker {VERSION}"
    folder = tmp_path / "a user's"
    folder.mkdir()
    # Someone's own settings must neither be used nor be harmed.
    told = json.loads(
        run(tracker, "demo", "--json", cwd=folder, FLORA_API_KEY="sk_live_real",
            TRACKER_DATABASE_URL="sqlite:///real.db", TRACKER_PUBLIC_URL="https://real.example.org")
    )  # fmt: skip
    assert list(folder.iterdir()) == []
    assert_all_ended_as_the_simulator_says(told)
