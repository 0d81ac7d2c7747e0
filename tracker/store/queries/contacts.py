"""Whether FLORA answers, as the processes on one database have seen it.

The state of a workspace is a row of the leases, as its waits are (`workspaces.keep_wait`): named
after the workspace's place in the settings, `until` being when FLORA was last asked, and `holder`
the rest as JSON. It describes the moment, and is neither copied nor kept with the history.
"""

import json
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, select

from tracker.core.contact import ContactState, OngoingTrouble, Trouble, joined
from tracker.store.engine import Database
from tracker.store.schema import leases

_PREFIX: Final = "contact:"
_AHEAD: Final = timedelta(minutes=1)
"""A state that is further ahead was stored before the clock was set back, and says nothing."""


async def keep(db: Database, slot: str, own: ContactState, *, now: datetime) -> None:
    """Join what this process has seen of the workspace in `slot` to what is stored."""

    def work(connection: Connection) -> None:
        stored = connection.execute(select(leases).where(leases.c.name == _PREFIX + slot))
        before = _state(stored.one_or_none(), now)
        state = own if before is None else joined(before, own)
        values = {"holder": _text(state), "until": state.asked_at}
        connection.execute(
            db.insert(leases)
            .values(name=_PREFIX + slot, **values)
            .on_conflict_do_update(index_elements=[leases.c.name], set_=values)
        )

    await db.write(work)


async def read(db: Database, *, now: datetime) -> dict[str, ContactState]:
    """The stored states of all workspaces, by their place in the settings."""
    statement = select(leases).where(leases.c.name.startswith(_PREFIX))
    async with db.read() as connection:
        rows = list(await connection.execute(statement))
    states = {row.name.removeprefix(_PREFIX): _state(row, now) for row in rows}
    return {slot: state for slot, state in states.items() if state is not None}


def _text(state: ContactState) -> str:
    values: dict[str, str] = {}
    if state.answered_at is not None:
        values["answered_at"] = state.answered_at.isoformat()
    if (found := state.trouble) is not None:
        values |= {
            "trouble": found.trouble.value,
            "since": found.since.isoformat(),
            "reason": found.reason,
        }
    return json.dumps(values)


def _state(row: Row[Any] | None, now: datetime) -> ContactState | None:
    if row is None or row.until > now + _AHEAD:
        return None
    values: dict[str, str] = json.loads(row.holder)
    answered_at, trouble = values.get("answered_at"), None
    if "trouble" in values:
        since = datetime.fromisoformat(values["since"])
        trouble = OngoingTrouble(Trouble(values["trouble"]), since, values["reason"])
    return ContactState(
        asked_at=row.until,
        answered_at=datetime.fromisoformat(answered_at) if answered_at else None,
        trouble=trouble,
    )
