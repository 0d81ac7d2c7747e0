"""A first sweep that is killed again and again reads everything, and hardly more than once."""

from pathlib import Path

from tests.e2e.history import sweep


async def test_a_first_sweep_survives_being_killed(database_url: str, tmp_path: Path) -> None:
    """`tracker reconcile`, killed three times in its midst, ends with every run and a few pages
    more than its history has."""
    swept = await sweep(database_url, history=1500, kills=3, log=tmp_path / "log")
    assert (swept.rows, swept.killed) == (1500, 3)
    assert swept.pages <= 1500 / 97 + 1 + swept.killed * 5
