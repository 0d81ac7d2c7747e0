"""The run history, newest first, page by page, up to where the caller has seen enough."""

from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Final, Literal

from tracker.core.observation import Observation
from tracker.flora import paging
from tracker.flora.client import FloraClient, HistoryPage

Kind = Literal["technique", "generation"]

PAGE_SIZE: Final = 100
"""FLORA's largest page: one request reads this many runs."""


def pages(
    client: FloraClient,
    kind: Kind,
    *,
    technique_id: str | None = None,
    deadline: Callable[[], float] | None = None,
) -> AsyncGenerator[HistoryPage, None]:
    """Every page of the history from the newest run on, until the list ends.

    No filter on a status is ever set: runs that leave the filter while pages are read would pull
    others past the reader. `deadline` says before each page how many seconds it may take. Raises
    `FloraUnreadable` where the list goes round in a circle, and whatever the client raises.
    """
    read = partial(client.history, kind=kind, limit=PAGE_SIZE, technique_id=technique_id)
    return paging.pages(
        lambda cursor: read(cursor=cursor, deadline=None if deadline is None else deadline())
    )


def oldest(items: Sequence[Observation]) -> datetime | None:
    """The creation time of the oldest item, UTC; `None` where no item has one."""
    return min((item.created_at for item in items if item.created_at), default=None)


def newest(items: Sequence[Observation]) -> datetime | None:
    """The creation time of the newest item, UTC; `None` where no item has one."""
    return max((item.created_at for item in items if item.created_at), default=None)
