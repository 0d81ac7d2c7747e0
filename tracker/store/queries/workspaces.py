"""What is known about workspaces: the id of each API key, the waits that FLORA asks for, and
whether FLORA answers each process.

A wait is a row of the leases, shared by all processes with the same key; the latest counts.
"""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Update, bindparam, exists, or_, select, tuple_, update

from tracker.core.contact import ContactState, Trouble, joined
from tracker.core.run import known
from tracker.store.engine import Database
from tracker.store.schema import batches, leases, runs, starts, workspace_keys

BEFORE_IDS: Final = "default"
"""The name of the top-level workspace in rows of earlier versions: in starts and batches before
migration 0009, in sweeps that were logged before its id was known."""
_WAIT: Final = "wait:"
_CONTACT: Final = "contact:"
"""Before the workspace's place in the settings, in the names of leases."""
_AT_ONCE: Final = 5000
"""Rows moved in one transaction."""


_BY_KEY: Final = select(workspace_keys.c.workspace_id).where(
    workspace_keys.c.key_fingerprint == bindparam("key")
)


async def workspace_of(db: Database, key_fingerprint: str) -> str | None:
    """The id of the key's workspace, if known."""
    return await db.fetchval(_BY_KEY, {"key": key_fingerprint})


async def last_workspace_at(db: Database, place: str) -> str | None:
    """The workspace of the last key at this place in the settings, if known."""
    statement = (
        select(workspace_keys.c.workspace_id)
        .where(workspace_keys.c.place == place)
        .order_by(workspace_keys.c.learnt_at.desc())
        .limit(1)
    )
    return await db.fetchval(statement)


async def all_ids(db: Database) -> list[str]:
    """The workspaces of all keys that were ever used."""
    return await db.fetchcol(select(workspace_keys.c.workspace_id).distinct())


async def keep_id(
    db: Database, key_fingerprint: str, workspace_id: str, *, place: str, at: datetime
) -> None:
    """Store the workspace of a key."""
    values = {"workspace_id": workspace_id, "place": place, "learnt_at": at}
    statement = db.upsert(workspace_keys, {"key_fingerprint": key_fingerprint}, values)
    await db.execute(statement)


async def give_ids(db: Database, workspace_id: str) -> None:
    """Set the workspace id of starts and batches from before migration 0009.

    A start belongs to the workspace of its run, or to the calling workspace, whose key is at the
    top of the settings. An idempotency key that exists under both names is left alone.
    """
    name_starts, name_batches = _naming()
    while await db.execute(name_starts, {"named": workspace_id}):
        pass
    await db.execute(name_batches, {"named": workspace_id})


@cache
def _naming() -> tuple[Update, Update]:
    """The statements of `give_ids`, with the id as a parameter."""
    workspace_id = bindparam("named", type_=starts.c.workspace_id.type)
    other = starts.alias()
    taken = exists().where(
        other.c.workspace_slot == workspace_id, other.c.idempotency_key == starts.c.idempotency_key
    )
    elsewhere = exists().where(
        runs.c.run_id == starts.c.run_id,
        runs.c.workspace_id.is_not(None),
        runs.c.workspace_id != workspace_id,
    )
    slot = starts.c.workspace_slot
    key = tuple_(slot, starts.c.idempotency_key)
    some = select(slot, starts.c.idempotency_key).where(
        starts.c.workspace_id.is_(None),
        slot.in_([workspace_id, BEFORE_IDS]),
        or_(slot == workspace_id, ~or_(taken, elsewhere)),
    )
    named = update(starts).where(key.in_(some.limit(_AT_ONCE)))
    batched = update(batches).where(batches.c.workspace_slot == BEFORE_IDS)
    return (
        named.values(workspace_slot=workspace_id, workspace_id=workspace_id),
        batched.values(workspace_slot=workspace_id),
    )


async def keep_wait(
    db: Database, place: str, until: datetime, *, process: str, latest: datetime
) -> None:
    """Store that FLORA asked a `process` to wait until then, about the workspace in `place`.

    A wait beyond `latest`, the longest from now on, was stored by another clock, and is replaced.
    """
    key, values = {"name": _WAIT + place}, {"holder": process, "until": until}
    replaced = or_(leases.c.until < until, leases.c.until > latest)
    await db.execute(db.upsert(leases, key, values, replaced))


_WAITS_UNTIL: Final = select(leases.c.until).where(leases.c.name == bindparam("name"))


async def waits_until(db: Database, place: str) -> datetime | None:
    """Until when the workspace in `place` was last asked to wait, if ever."""
    return await db.fetchval(_WAITS_UNTIL, {"name": _WAIT + place})


# Whether FLORA answers, as the processes on one database have seen it.
#
# The state of a workspace is a row of the leases, as its waits are (`keep_wait`): named after the
# workspace's place in the settings, `until` being when FLORA was last asked, which moves with the
# clock, and `holder` the rest as JSON: `answered_at`, of a trouble `trouble`, `since`, `reason`.
# All versions share this form.

_STATE: Final = TypeAdapter(ContactState)
_AHEAD: Final = timedelta(minutes=1)
"""A state that is further ahead was stored before the clock was set back, and says nothing."""


async def keep_contact(db: Database, place: str, own: ContactState, *, now: datetime) -> None:
    """Join what this process has seen of the workspace in `place` to what is stored."""

    def work(connection: Connection) -> None:
        stored = connection.execute(select(leases).where(leases.c.name == _CONTACT + place))
        before = _state(stored.one_or_none(), now)
        state = own if before is None else joined(before, own)
        values = {"holder": _text(state), "until": state.asked_at}
        connection.execute(db.upsert(leases, {"name": _CONTACT + place}, values))

    await db.write(work)


async def stored_contacts(db: Database, *, now: datetime) -> dict[str, ContactState]:
    """The stored states of all workspaces, by their place in the settings."""
    statement = select(leases).where(leases.c.name.startswith(_CONTACT))
    rows = await db.fetch(statement)
    states = {row.name.removeprefix(_CONTACT): _state(row, now) for row in rows}
    return {place: state for place, state in states.items() if state is not None}


def _text(state: ContactState) -> str:
    values = _STATE.dump_python(state, mode="json", exclude={"asked_at"}, exclude_none=True)
    return json.dumps(values | values.get("trouble", {}))


def _state(row: Row[Any] | None, now: datetime) -> ContactState | None:
    if row is None or row.until > now + _AHEAD:
        return None
    try:
        values = json.loads(row.holder)
        if "trouble" in values:
            values["trouble"] = {name: values[name] for name in ("trouble", "since", "reason")}
        # `until` is moved with a clock that was set.
        state = _STATE.validate_python(values | {"asked_at": row.until})
    except (LookupError, TypeError, ValueError):
        return None  # a newer version stores it in another form
    found = state.trouble
    if found is not None:  # pydantic prefers a text to the enum's member
        found = replace(found, trouble=known(Trouble, found.trouble))
    return replace(state, trouble=found)
