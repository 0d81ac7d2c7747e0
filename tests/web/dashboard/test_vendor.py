"""What the dashboard has taken over from npm is what npm has."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
VENDOR = ROOT / "tracker/web/dashboard/static/vendor"
PACKAGES = ROOT / "tests/browser/axe"
ROW = re.compile(r"^\| (`.+?`) \| `([\w.]+)` \((`.+?`)\) \| ([\d.]+) \|", re.MULTILINE)
TAKEN = [
    (ours, package, theirs, version)
    for names, package, sources, version in ROW.findall((VENDOR / "README.md").read_text())
    for ours, theirs in zip(
        *(re.findall(r"`(.+?)`", text) for text in (names, sources)), strict=True
    )
]


def test_every_script_says_where_it_is_from() -> None:
    """The table names each file, and the lock holds its package in that version, with its hash."""
    assert {ours for ours, *_ in TAKEN} == {
        path.name for path in VENDOR.iterdir() if path.suffix in (".js", ".css")
    }
    lock = json.loads((PACKAGES / "package-lock.json").read_text())["packages"]
    for _, package, _, version in TAKEN:
        entry = lock[f"node_modules/{package}"]
        assert entry["version"] == version
        assert entry["integrity"].startswith("sha512-")


@pytest.mark.parametrize(("ours", "package", "theirs", "version"), TAKEN)
def test_a_script_is_the_one_of_its_package(
    ours: str, package: str, theirs: str, version: str
) -> None:
    """Byte for byte, as npm installed it by the hash of the lock."""
    installed = PACKAGES / "node_modules" / package
    if not installed.exists():
        assert not os.environ.get("TRACKER_REQUIRE_BROWSER"), "npm has not installed it"
        pytest.skip("npm has not installed it: make install")
    assert json.loads((installed / "package.json").read_text())["version"] == version
    assert (VENDOR / ours).read_bytes() == (installed / theirs).read_bytes()
