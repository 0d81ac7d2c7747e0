"""Starts are paid once, whatever FLORA and its gateway do, and whoever is killed or frozen."""

from pathlib import Path

import pytest

from tests.e2e.starting import endure


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "idempotency", ["replay", pytest.param("conflict", marks=pytest.mark.thorough)]
)
async def test_nothing_is_paid_twice_and_no_run_is_another_keys(
    database_url: str, tmp_path: Path, idempotency: str, thorough: bool
) -> None:
    """Some seconds of everything at once; `python -m bench.soak_starts` goes on for minutes. (A
    FLORA that answers a used key with 409: tests/worker/test_doubt.py.)"""
    receivers = 1 if database_url.startswith("sqlite") else 2
    figures = await endure(
        database_url,
        tmp_path,
        seconds=5 if thorough else 3,
        receivers=receivers,
        seed=1,
        calm=30,
        idempotency=idempotency,
    )
    assert figures.paid_twice == []
    assert figures.wrong == []
    assert figures.told_wrong == []
    assert figures.states["started"] >= 10, figures
    assert figures.slowest_answer < 30
