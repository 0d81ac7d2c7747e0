"""README's lines of Python work as they are pasted, and the library's page names every error."""

import re
from pathlib import Path

from tests.docs.pages import DOCS, ROOT, blocks
from tests.docs.session import Session
from tracker import errors


async def test_the_lines_of_the_readme_work_as_pasted(tmp_path: Path) -> None:
    """README's first Python block starts a run, waits for its end with no other process running,
    and prints its cost and outputs; it has five lines."""
    session = Session(tmp_path, postgres={})
    try:
        await session.simulate()
        (block,) = blocks(ROOT / "README.md", "python")
        assert len([line for line in block.text.splitlines() if line]) == 5
        printed = session.run_python(block)
    finally:
        await session.close()
    assert printed.startswith("completed 0.25 ['http")


def test_every_error_has_a_row() -> None:
    """What a call can raise is in the table, with what to do about it."""
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`.*?) \|.*\|.*\|$", text.partition("## Errors")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    kinds = [getattr(errors, name) for name in errors.__all__]
    raised = {
        kind.__name__
        for kind in kinds
        if not any(other is not kind and issubclass(other, kind) for other in kinds)
    }
    assert raised - named == {"FieldFault", "DoNotRetry"}  # a part of one; raised by handlers
