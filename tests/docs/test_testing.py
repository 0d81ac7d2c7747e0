"""The page about tests: its files are a suite that passes, and is quick."""

from pathlib import Path

import pytest

from tests.docs.pages import DOCS, blocks
from tests.support.forked import run_python


@pytest.mark.thorough
def test_the_files_of_the_page_are_a_suite_that_passes(tmp_path: Path) -> None:
    """As pytest runs them, with nothing but the package; each run takes seconds at most."""
    files = blocks(DOCS / "testing.md", "python")
    for block in files:
        (tmp_path / block.title).write_text(block.text)
    arguments = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path))
    done = run_python("-m", "pytest", *arguments, cwd=tmp_path, env={}, together=True)
    assert done.returncode == 0, done.stdout
    tests = sum(block.text.count("def test_") for block in files)
    assert f"{tests} passed" in done.stdout
