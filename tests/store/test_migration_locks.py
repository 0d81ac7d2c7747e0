"""No migration locks, rewrites or takes away what the version before is using."""

import pytest

from tests.store.upgrading import revisions
from tests.support.migration_locks import faults, recorded
from tracker.store import migrate

# From before the first release: no deployment had to run it. 0003 fills the new column of
# every run, and counts them, in the transaction that adds it.
EXCEPTIONS = {
    "0003": {
        "require-concurrent-index-creation",
        "changes-a-table-at-once",
        "works-while-it-locks",
    },
    # A CHECK is exchanged for one that allows more, in one transaction: nobody can write what the
    # old one forbade in between, and the version before writes nothing that the new one forbids.
    "0008": {"ban-drop-constraint"},
    "0009": {"ban-drop-constraint"},
    "0014": {"ban-drop-constraint"},
}


async def test_no_migration_blocks_running_processes(empty_postgres_url: str) -> None:
    """Every statement of every revision passes the rules, but for the exceptions, all of which are
    needed."""
    found = {}
    for revision in revisions():
        with recorded() as sent:
            await migrate.upgrade(empty_postgres_url, revision)
        assert any("alembic_version" in statement for statement in sent)
        found[revision] = {fault.rule for fault in faults(sent)}
    assert {revision: rules for revision, rules in found.items() if rules} == EXCEPTIONS


BAD = {
    "CREATE INDEX ix ON runs (status)": "require-concurrent-index-creation",
    "CREATE UNIQUE INDEX ix ON runs (status)": "require-concurrent-index-creation",
    "DROP INDEX ix_runs_due": "require-concurrent-index-deletion",
    "ALTER TABLE runs ADD COLUMN at timestamptz DEFAULT clock_timestamp()": (
        "adding-field-with-default"
    ),
    "ALTER TABLE runs ADD COLUMN n bigint GENERATED ALWAYS AS (checks * 2) STORED": (
        "adding-field-with-default"
    ),
    "ALTER TABLE runs ADD COLUMN note text NOT NULL": "adding-required-field",
    "ALTER TABLE runs ALTER COLUMN poll_url SET NOT NULL": "adding-not-nullable-field",
    "ALTER TABLE runs ADD CONSTRAINT fk FOREIGN KEY (technique_id) REFERENCES techniques": (
        "adding-foreign-key-constraint"
    ),
    "ALTER TABLE runs ADD CONSTRAINT ck CHECK (checks >= 0)": "constraint-missing-not-valid",
    "ALTER TABLE runs ADD COLUMN n text REFERENCES techniques": "adding-foreign-key-constraint",
    "ALTER TABLE runs ADD CONSTRAINT uq UNIQUE (poll_url)": "disallowed-unique-constraint",
    "ALTER TABLE runs ADD COLUMN n text UNIQUE": "disallowed-unique-constraint",
    "ALTER TABLE runs ADD CONSTRAINT ex EXCLUDE USING gist (run_id WITH =)": (
        "constraint-missing-not-valid"
    ),
    "ALTER TABLE runs ALTER COLUMN checks TYPE bigint": "changing-column-type",
    "ALTER TABLE runs RENAME COLUMN checks TO reads": "renaming-column",
    "ALTER TABLE runs RENAME TO flora_runs": "renaming-table",
    "ALTER TABLE runs DROP COLUMN checks": "ban-drop-column",
    "ALTER TABLE runs DROP CONSTRAINT ck": "ban-drop-constraint",
    "ALTER TABLE runs ALTER COLUMN checks DROP DEFAULT": "ban-drop-default",
    "DROP VIEW run_states": "ban-drop-view",
    "DROP TABLE runs": "ban-drop-table",
    "REINDEX TABLE runs": "require-concurrent-reindex",
    "VACUUM FULL runs": "keeps-all-out",
    "VACUUM (FULL, ANALYZE) runs": "keeps-all-out",
    "CLUSTER runs USING pk_runs": "keeps-all-out",
    "TRUNCATE runs": "keeps-all-out",
    "LOCK TABLE runs IN EXCLUSIVE MODE": "keeps-all-out",
    "ALTER TABLE runs SET UNLOGGED": "keeps-all-out",
    "REFRESH MATERIALIZED VIEW totals": "keeps-all-out",
    "UPDATE runs SET checks = 0": "changes-a-table-at-once",
    "DELETE FROM deliveries WHERE receipts = 1": "changes-a-table-at-once",
    "WITH old AS (SELECT 1) UPDATE ONLY runs SET checks = 0": "changes-a-table-at-once",
    "MERGE INTO runs USING notes ON true WHEN MATCHED THEN DELETE": "changes-a-table-at-once",
    "INSERT INTO notes SELECT run_id FROM runs": "works-while-it-locks",
    "ALTER TABLE runs VALIDATE CONSTRAINT ck": "works-while-it-locks",
    "ALTER TABLE ONLY public.runs VALIDATE CONSTRAINT ck": "works-while-it-locks",
    "CREATE TABLE notes AS SELECT run_id FROM runs": "works-while-it-locks",
    "SELECT max(created_at) FROM runs": "works-while-it-locks",
    "ALTER TABLE runs ADD COLUMN n bigserial": "goes-through-the-table",
    "ALTER TABLE runs ADD COLUMN n text, ADD COLUMN m numeric(9, 2) CHECK (m > 0)": (
        "goes-through-the-table"
    ),
    "DO $$ BEGIN UPDATE runs SET checks = 0; END $$": "hides-what-it-does",
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix ON runs (status)": "stays-invalid-if-interrupted",
    "CREATE INDEX CONCURRENTLY ix ON runs (status)": "ban-concurrent-index-creation-in-transaction",
}


@pytest.mark.parametrize("statement", BAD)
def test_a_statement_that_locks_is_refused(statement: str) -> None:
    """Each kind of statement that would hold up the version before is named by its rule."""
    sent = ["BEGIN", "ALTER TABLE runs ADD COLUMN more text", statement, "COMMIT"]
    assert BAD[statement] in {fault.rule for fault in faults(sent)}


@pytest.mark.parametrize(
    "lock",
    [
        "CREATE TABLE notes (run_id text REFERENCES runs)",
        "CREATE TRIGGER t AFTER UPDATE ON runs FOR EACH ROW EXECUTE FUNCTION f()",
        "DROP TRIGGER t ON runs",
    ],
)
def test_no_work_is_done_behind_a_lock_that_does_not_look_like_one(lock: str) -> None:
    """Who only refers to a table, or hangs a trigger on it, locks it until the transaction ends."""
    sent = ["BEGIN", lock, "INSERT INTO more SELECT run_id FROM runs", "COMMIT"]
    assert [fault.rule for fault in faults(sent)] == ["works-while-it-locks"]
    assert faults([*sent[:2], "COMMIT", "BEGIN", *sent[2:]]) == []


def test_what_nobody_waits_for_passes() -> None:
    """A new table with its keys, indexes and rows is nobody's yet; an index may be made beside the
    work, a constraint checked later, and a column added that the version before can ignore."""
    fine = [
        "BEGIN",
        "CREATE TABLE notes (run_id text NOT NULL, n serial CHECK (n > 0), PRIMARY KEY (run_id))",
        "CREATE INDEX ix_notes ON notes (run_id)",
        "INSERT INTO notes SELECT run_id FROM runs",
        "UPDATE notes SET run_id = lower(run_id)",
        "CREATE TABLE more_notes (run_id text NOT NULL REFERENCES runs)",
        "ALTER TABLE runs ADD COLUMN more text",
        "ALTER TABLE runs ADD COLUMN less integer DEFAULT 0 NOT NULL",
        "ALTER TABLE runs ADD CONSTRAINT ck CHECK (checks >= 0) NOT VALID",
        "UPDATE alembic_version SET version_num='0009' WHERE alembic_version.version_num = '0008'",
        "COMMIT",
        "BEGIN",
        "ALTER TABLE runs VALIDATE CONSTRAINT ck",
        "ALTER TABLE runs VALIDATE CONSTRAINT ck_other",
        "COMMIT",
        "DROP INDEX CONCURRENTLY IF EXISTS ix",
        "CREATE INDEX CONCURRENTLY ix ON runs (status)",
    ]
    assert faults(fine) == []
