"""Two clocks that are moved by hand: FLORA's, which is right, and ours, which may be wrong."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final

BEGIN: Final = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)


class Clocks:
    """They stand still until they are moved. `ahead` is the lead of ours in seconds."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.ahead = 0.0

    def flora(self) -> datetime:
        return BEGIN + timedelta(seconds=self.elapsed)

    def ours(self) -> datetime:
        return self.flora() + timedelta(seconds=self.ahead)

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        """Moves the clocks instead of waiting."""
        self.elapsed += seconds
        await asyncio.sleep(0)
