"""Which of the pool's connections are fit for use: looked at each time that one is taken."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError

_REFUSED = "refused"


def use_only(engine: Engine, is_fit: Callable[[Any, Any], bool], why_not: str) -> None:
    """Use only connections for which `is_fit(connection, record)` holds.

    In place of another the pool makes a new one. Where that is no better the database is away, and
    whoever asked gets `ConnectionError`: the pool itself would say that the caller is to blame.
    """

    @event.listens_for(engine, "checkout")
    def look_at(connection: Any, record: Any, _: object) -> None:
        is_second = record.record_info.pop(_REFUSED, False)
        if is_fit(connection, record):
            return
        if is_second:
            raise ConnectionError(why_not)
        record.record_info[_REFUSED] = True
        raise DisconnectionError(why_not)
