"""README's lines of Python work as they are pasted, and the reference has every public name."""

from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.docs.session import Session


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
