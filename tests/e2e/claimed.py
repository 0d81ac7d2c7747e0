"""Who claimed what and when, by an independent witness: triggers in the database note every claim
and lease by the server's own clock, and FLORA notes every read of a run.

From both follows whether something was done twice, and how late it was begun.
"""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import asyncpg

from tests.e2e.fleet import POLL_INTERVAL
from tracker.simulator import Simulator
from tracker.simulator.world import RequestRecord

SLACK = timedelta(milliseconds=100)
"""How far a process's idea of the server's time may be off, and what a commit takes."""
JITTER = 0.8
"""By its jitter a wait is this much of itself at least: see tracker.core.schedule."""

WITNESS = """
CREATE TABLE witnessed (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    what text NOT NULL, key text NOT NULL, due timestamptz,
    was text, was_until timestamptz, holder text NOT NULL);

CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    new_row jsonb := to_jsonb(NEW);
    old_row jsonb := CASE TG_OP WHEN 'UPDATE' THEN to_jsonb(OLD) END;
BEGIN
    INSERT INTO witnessed (what, key, due, was, was_until, holder) VALUES (
        TG_TABLE_NAME, new_row ->> TG_ARGV[0], (old_row ->> 'next_check_at')::timestamptz,
        old_row ->> TG_ARGV[1], (old_row ->> TG_ARGV[2])::timestamptz, new_row ->> TG_ARGV[1]);
    RETURN NULL;
END $$;

CREATE TRIGGER witness AFTER UPDATE ON runs FOR EACH ROW
    WHEN (NEW.lease_holder IS NOT NULL AND NEW.lease_until IS DISTINCT FROM OLD.lease_until)
    EXECUTE FUNCTION witness('run_id', 'lease_holder', 'lease_until');
CREATE TRIGGER witness AFTER UPDATE ON starts FOR EACH ROW
    WHEN (NEW.lease_holder IS NOT NULL AND NEW.lease_until IS DISTINCT FROM OLD.lease_until)
    EXECUTE FUNCTION witness('idempotency_key', 'lease_holder', 'lease_until');
CREATE TRIGGER witness AFTER INSERT OR UPDATE ON leases FOR EACH ROW
    EXECUTE FUNCTION witness('name', 'holder', 'until');

CREATE TABLE swept (id bigint PRIMARY KEY, workspace text, logged timestamptz NOT NULL,
    finished timestamptz);

CREATE FUNCTION witness_sweep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO swept (id, workspace, logged) VALUES (NEW.id, NEW.workspace_id, clock_timestamp())
    ON CONFLICT (id) DO NOTHING;
    IF NEW.finished_at IS NOT NULL THEN
        UPDATE swept SET finished = clock_timestamp() WHERE id = NEW.id;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER witness AFTER INSERT OR UPDATE ON sweeps FOR EACH ROW
    EXECUTE FUNCTION witness_sweep();
"""
# A wait that FLORA asked for is nobody's own: whoever is told of a longer one prolongs it.
STOLEN = """
SELECT what, key, was, holder, was_until - at AS left_to_run FROM witnessed
WHERE was <> holder AND was_until > at + $1 AND key NOT LIKE 'wait:%'
"""
# What was free is late from when it was due; what a dead process held, from when that ran out.
# A settled run is claimed for its bill, which has a time of its own: it is not late.
CLAIMS = """
SELECT key, at, holder, was IS NOT NULL AS taken_over, due IS NULL AS for_bill,
    extract(epoch FROM at - greatest(due, was_until)) AS late
FROM witnessed WHERE what = 'runs' AND was IS DISTINCT FROM holder ORDER BY id
"""
# By the server's clock, because a process's idea of it may be off by more than lies between two
# sweeps. One begins with its lease, which comes before its row; there is one workspace.
SWEEPS_AT_ONCE = """
WITH spans AS (
    SELECT id, workspace, finished, (
        SELECT max(at) FROM witnessed WHERE what = 'leases' AND key LIKE 'sweep:%'
            AND was IS DISTINCT FROM holder AND at <= logged
    ) AS began FROM swept WHERE finished IS NOT NULL)
SELECT count(*) FROM spans a JOIN spans b
    ON a.id < b.id AND a.workspace IS NOT DISTINCT FROM b.workspace
WHERE a.began < b.finished AND b.began < a.finished
"""


@dataclass(slots=True)
class Found:
    """What the witnesses saw. `stolen`, `read_twice`, `sweeps_at_once` and `deadlocks` break a
    promise; `late` is in seconds, sorted, one for each claim of a run that was due."""

    stolen: list[str] = field(default_factory=list)
    read_twice: list[str] = field(default_factory=list)
    sweeps: int = 0
    sweeps_at_once: int = 0
    deadlocks: int = 0
    taken_over: int = 0
    late: list[float] = field(default_factory=list)
    claimed_by: dict[str, int] = field(default_factory=dict)


async def watch(database_url: str) -> None:
    """Put the witness into the database."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(WITNESS)
    await connection.close()


async def found(database_url: str, flora: Simulator) -> Found:
    """What was seen until now."""
    connection = await asyncpg.connect(database_url)
    try:
        stolen = await connection.fetch(STOLEN, SLACK)
        claims = await connection.fetch(CLAIMS)
        seen = Found(
            stolen=[str(dict(row)) for row in stolen],
            sweeps=await connection.fetchval("SELECT count(*) FROM sweeps"),
            sweeps_at_once=await connection.fetchval(SWEEPS_AT_ONCE),
            deadlocks=await connection.fetchval(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            ),
            taken_over=sum(claim["taken_over"] for claim in claims),
            late=sorted(float(claim["late"]) for claim in claims if not claim["for_bill"]),
        )
    finally:
        await connection.close()
    for claim in claims:
        seen.claimed_by[claim["holder"]] = seen.claimed_by.get(claim["holder"], 0) + 1
    seen.read_twice = _read_twice(flora, claims)
    return seen


def _read_twice(flora: Simulator, claims: list[Any]) -> list[str]:
    """Reads of one run alone that follow one another without a cause.

    The causes: it has ended in between, the read before brought nothing or a status that is not
    documented, the poll interval has passed and it had not ended, a dead process's claim has run
    out, or it was claimed for its bill.
    """
    claimed_again: dict[str, list[float]] = defaultdict(list)
    for claim in claims:
        if claim["taken_over"] or claim["for_bill"]:
            claimed_again[claim["key"]].append(claim["at"].timestamp() * 1000)
    reads: dict[str, list[RequestRecord]] = defaultdict(list)
    for asked in flora.world.request_log:
        if asked.run_id is not None:
            reads[asked.run_id].append(asked)
    twice = []
    for run_id, asked_for in reads.items():
        ended = flora.world.runs[run_id].completed_ms
        is_odd = flora.world.runs[run_id].unfinished_name is not None
        for one, other in pairwise(asked_for):
            again = claimed_again[run_id]
            after_one = bisect_left(again, one.at_ms)
            has_cause = (
                one.status != 200
                or (is_odd and one.at_ms < ended)
                or one.at_ms < ended <= other.at_ms
                or (one.at_ms < ended and other.at_ms - one.at_ms >= JITTER * POLL_INTERVAL * 1000)
                or (after_one < len(again) and again[after_one] <= other.at_ms)
            )
            if not has_cause:
                twice.append(f"{run_id}: {one} {other} ended {ended}")
    return twice
