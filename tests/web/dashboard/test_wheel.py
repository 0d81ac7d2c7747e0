"""The wheel contains the files of the pages that are not Python."""

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "tracker" / "web" / "dashboard"


def test_the_wheel_holds_templates_and_assets(tmp_path: Path) -> None:
    """Every template, script, style, picture and licence, and the runbook."""
    builder = WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("templates", "static")
        for path in (DASHBOARD / folder).rglob("*")
        if path.is_file()
    }
    assert len(wanted) > 25
    wanted.add("tracker/docs/runbook.md")
    assert wanted <= packed
