"""A start's hold, while the database comes and goes."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.store import starts
from tracker.store.engine import Database
from tracker.tracking import ledger
from tracker.tracking.ledger import holding


async def test_a_hold_that_could_not_be_given_back_is_as_soon_as_it_can_be(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the caller's next try would wait until it runs out, though nobody has it. Said once."""
    monkeypatch.setattr(ledger, "GIVE_BACK_AGAIN_AFTER", 0.05)
    path, away = tmp_path / "tracker.db", tmp_path / "away.db"
    async with await Database.open(sqlite_url) as db:
        row = await starts.reserve(
            db,
            workspace_slot="default",
            idempotency_key="key",
            technique_id="tech_1",
            fingerprint="f00d",
            inputs=[],
            at=utc_now(),
        )
        with capture_logs() as lines:
            async with holding(db, row, "process", utc_now) as held:
                assert held is not None
                path.rename(away)
            away.rename(path)

            async def given_back() -> bool:
                async with holding(db, row, "process", utc_now) as again:
                    return again is not None

            await eventually(given_back)
    assert [line["event"] for line in lines] == ["start.hold_kept"]
