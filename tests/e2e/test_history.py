"""A first sweep that is killed again and again reads everything, and hardly more than once."""

from pathlib import Path

from tests.e2e.history import sweep


async def test_a_first_sweep_survives_being_killed(postgres_url: str, tmp_path: Path) -> None:
    """`tracker reconcile`, killed twice in its midst, ends with every run and a few pages
    more than its history has."""
    swept = await sweep(postgres_url, history=1000, kills=2, log=tmp_path / "log")
    assert (swept.rows, swept.killed) == (1000, 2)
    assert swept.pages <= 1000 / 97 + 1 + swept.killed * 5
