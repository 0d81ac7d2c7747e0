"""Whether FLORA answers, as the processes on one database tell each other."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from tests.store.making import NOW
from tracker.core.contact import ContactState, OngoingTrouble, Trouble
from tracker.store.engine import Database
from tracker.store.queries import workspaces
from tracker.store.schema import leases

MINUTE = timedelta(minutes=1)
SILENT = ContactState(
    asked_at=NOW,
    answered_at=NOW - 3 * MINUTE,
    trouble=OngoingTrouble(Trouble.UNREACHABLE, NOW - 2 * MINUTE, "no answer: »√\x00\ud800«"),
)


async def test_states_are_joined_by_workspace(db: Database, other_db: Database) -> None:
    """Each process reads what all have stored, and an answer to one ends the trouble of another."""
    assert await workspaces.stored_contacts(db, now=NOW) == {}
    await workspaces.keep_contact(db, "default", SILENT, now=NOW)
    found = (await workspaces.stored_contacts(other_db, now=NOW))["default"]
    assert (found.asked_at, found.answered_at) == (SILENT.asked_at, SILENT.answered_at)
    assert found.trouble is not None
    assert found.trouble.trouble is Trouble.UNREACHABLE
    assert found.trouble.since == NOW - 2 * MINUTE
    await workspaces.keep_contact(other_db, "ws_2", replace(SILENT, trouble=None), now=NOW)
    answered = ContactState(asked_at=NOW + MINUTE, answered_at=NOW + MINUTE)
    await workspaces.keep_contact(other_db, "default", answered, now=NOW + MINUTE)
    both = await workspaces.stored_contacts(db, now=NOW + MINUTE)
    assert both == {"default": answered, "ws_2": replace(SILENT, trouble=None)}


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ('{"answered_at": "2026-11-27T08:57:00+00:00"}', None),
        (
            '{"trouble": "unreachable", "since": "2026-11-27T08:58:00+00:00", "reason": "cut"}',
            Trouble.UNREACHABLE,
        ),
        ('{"trouble": "tired", "since": "2026-11-27T08:58:00+00:00", "reason": "late"}', "tired"),
    ],
)
async def test_versions_read_each_others_states(
    db: Database, text: str, trouble: Trouble | str | None
) -> None:
    """A process of another version may be at work on the same database."""
    await db.execute(db.upsert(leases, {"name": "contact:default"}, {"holder": text, "until": NOW}))
    found = (await workspaces.stored_contacts(db, now=NOW))["default"]
    assert (found.trouble and found.trouble.trouble) == trouble
    await workspaces.keep_contact(db, "other", found, now=NOW)
    written = await db.fetchval(select(leases.c.holder).where(leases.c.name == "contact:other"))
    assert json.loads(written.replace("Z", "+00:00")) == json.loads(text)


async def test_a_state_from_the_future_says_nothing(db: Database) -> None:
    """It was stored before a clock was set back."""
    await workspaces.keep_contact(db, "default", SILENT, now=NOW)
    earlier = NOW - 10 * MINUTE
    assert await workspaces.stored_contacts(db, now=earlier) == {}
    own = ContactState(asked_at=earlier, answered_at=earlier)
    await workspaces.keep_contact(db, "default", own, now=earlier)
    assert await workspaces.stored_contacts(db, now=earlier) == {"default": own}


async def test_a_state_moves_with_the_clock(db: Database) -> None:
    """FLORA was last asked as long ago as before, where a clock that was set back moves its row."""
    await workspaces.keep_contact(db, "default", SILENT, now=NOW)
    earlier = NOW - 10 * MINUTE
    await db.execute(update(leases).values(until=earlier))
    (found,) = (await workspaces.stored_contacts(db, now=earlier)).values()
    assert found.asked_at == earlier
