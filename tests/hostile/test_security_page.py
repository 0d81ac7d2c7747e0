"""`SECURITY.md` says what holds, and which test shows it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_files_named_in_security_md_exist() -> None:
    """Every file and module that it names exists."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:tests|tracker|docs)/[\w/.]+)`", text)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"`python -m ([\w.]+)`", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
