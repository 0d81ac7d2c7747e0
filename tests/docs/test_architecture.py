"""The page about the architecture: its files, functions and packages are there."""

import importlib
import re
import tomllib
from operator import attrgetter

from tests.docs.pages import DOCS, ROOT

PAGE = re.sub(r"```.*?```", "", (DOCS / "architecture.md").read_text(encoding="utf-8"), flags=re.S)


def test_its_files_and_packages_are_there() -> None:
    """They are named as below `tracker/`."""
    paths = set(re.findall(r"`([\w/]+(?:/|\.py))`", PAGE)) - {"tracker/"}
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / "tracker" / path).exists()] == []


def test_its_functions_are_in_the_files_it_says() -> None:
    """The file follows its function, in brackets, after a comma or after "of"."""
    named = re.findall(r"`(?!\w+\.py)(\w+(?:\.\w+)?)`(?:,| \(| of) ?`([\w/]+)\.py`", PAGE)
    assert len(named) > 10
    for function, file in named:
        module = importlib.import_module(f"tracker.{file.replace('/', '.')}")
        assert attrgetter(function)(module)


def test_its_layers_are_those_that_are_checked() -> None:
    """From the first sentence about imports, in order; "and" joins those that are independent."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = [
        one for one in settings["tool"]["importlinter"]["contracts"] if one["id"] == "layers"
    ]
    sentence = PAGE.partition("Imports point down: ")[2].partition(".")[0]
    shown = [" | ".join(re.findall(r"`(\w+)`", one)) for one in sentence.split(",")]
    assert shown == contract["layers"]
