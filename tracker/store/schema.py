"""The tables, and the invariants that the database itself checks.

Names and meaning of the columns that dashboards read are public and stay. Rows of `runs` are
written by the writer alone; claims change only their lease and times.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    FromClause,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    and_,
    bindparam,
    false,
    func,
    literal,
    literal_column,
    or_,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from tracker.core.events import EventType, MessageState
from tracker.core.formatting import clean
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome
from tracker.core.rollup import RollupKey
from tracker.core.run import Tracking
from tracker.store.engine import dump_json

# Column types with the same meaning on both databases. On SQLite, which lacks times with a zone,
# exact decimals and JSON, they have the form that ad-hoc SQL reads best.


class CleanText(TypeDecorator[str]):
    """Text of any length; NUL and lone surrogates are replaced by U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean(value)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC.

    `timestamptz` on PostgreSQL; on SQLite text, `YYYY-MM-DD HH:MM:SS.ffffff`, which sorts by time.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone cannot be stored: {value}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.replace(tzinfo=UTC)


class Money(TypeDecorator[Decimal]):
    """USD. Exact on PostgreSQL; on SQLite a double, which has 15 digits and can be summed."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """A number that SQLite can sum."""
        return dialect.type_descriptor(Double() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Decimal | float | None:
        """The nearest double for SQLite."""
        return float(value) if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """The shortest decimal with this double."""
        return Decimal(repr(value)) if isinstance(value, float) else value


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
"""A JSON value; `None` is SQL's NULL. Text on SQLite, `jsonb` on PostgreSQL."""

SerialId = BigInteger().with_variant(Integer(), "sqlite")
"""A number that the database generates; SQLite does so only for plain INTEGER."""


metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, values: Any) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _partial(name: str, columns: str, where: str, **more: Any) -> Index:
    """An index of these columns, or expressions in parentheses, of the rows where `where` holds."""
    listed = [text(one) if one.startswith("(") else one for one in columns.split(", ")]
    return Index(name, *listed, postgresql_where=text(where), sqlite_where=text(where), **more)


def _lease() -> tuple[Column[Any] | CheckConstraint, ...]:
    return (
        Column("lease_until", UtcDateTime),
        Column("lease_holder", CleanText),
        CheckConstraint(
            "(lease_until IS NULL) = (lease_holder IS NULL)", name="lease_has_holder_and_end"
        ),
    )


def word(value: str) -> ColumnElement[str]:
    """A constant in the text of a statement, because the planner chooses partial indexes before it
    knows the parameters."""
    return literal_column(f"'{value}'", CleanText)


def is_rare(column: Column[Any], value: str, frequent: str) -> ColumnElement[bool]:
    """`column` has this value, as matches a partial index of all but the most frequent one.

    PostgreSQL uses a partial index only if the statement's text has its value (hence `word`),
    SQLite only if it has the very term of the index.
    """
    wanted = column == word(value)
    return wanted if value == frequent else and_(wanted, _OnSqlite(column != word(frequent)))


class _Condition(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """Itself: any other function would be compared with 1."""
        return self


class _OnSqlite(_Condition):
    """A condition that follows from the others, and that PostgreSQL is not told: it would take both
    for independent, and expect so few rows that it sorts all of them instead of some by an index.
    """

    inherit_cache = True


@compiles(_OnSqlite)
def _omitted(element: _OnSqlite, compiler: SQLCompiler, **options: Any) -> str:
    return "true"


@compiles(_OnSqlite, "sqlite")
def _included(element: _OnSqlite, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


class _TextList(TypeDecorator[Sequence[str]]):
    """Texts in one parameter, fit as those of `CleanText`: an array on PostgreSQL, JSON on
    SQLite."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind = Text() if dialect.name == "sqlite" else ARRAY(Text(), dimensions=1)
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: Sequence[str] | None, dialect: Dialect) -> Any:
        return dump_json(value) if dialect.name == "sqlite" else [*map(clean, value or ())]


class _AnyOf(_Condition):
    inherit_cache = True


@compiles(_AnyOf)
def _in_array(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, texts = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} = ANY ({texts})"


@compiles(_AnyOf, "sqlite")
def _in_json(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, texts = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({texts}))"  # noqa: S608 - compiled


def is_any_of(column: ColumnElement[str], texts: str | Sequence[str]) -> ColumnElement[bool]:
    """`column` is one of these texts, or of those in the parameter of that name: any number of
    them, in one statement that is planned once."""
    if isinstance(texts, str):
        return _AnyOf(column, bindparam(texts, type_=_TextList()))
    return _AnyOf(column, literal(texts, _TextList()))


def each_of(texts: str, dialect: str) -> FromClause:
    """The texts in the parameter of that name as a table, one in each row, in the column `value`:
    any number of them, in one statement that is planned once."""
    given = bindparam(texts, type_=_TextList())
    if dialect == "postgresql":
        return func.unnest(given).table_valued("value").render_derived(name="each_text")
    return func.json_each(given).table_valued("value", name="each_text")


LONGEST_LEASE: Final = timedelta(minutes=5)
"""A lease on a row that lasts longer was taken before the clock was set back: it has expired."""


def is_free(table: Table, now: datetime, lease: timedelta = LONGEST_LEASE) -> ColumnElement[bool]:
    """No process has a lease on the row, where they last for `lease`."""
    until = table.c.lease_until
    return or_(until.is_(None), until <= now, until > now + max(lease, LONGEST_LEASE))


def _storage(*, fillfactor: int | None = None) -> dict[str, Any]:
    """PostgreSQL's settings for a table that keeps growing.

    The defaults vacuum when a fifth of the rows is dead, which is too late for a big table. A
    fillfactor leaves space in each page, so that an update stays in it and touches no index.
    """
    space = {} if fillfactor is None else {"fillfactor": str(fillfactor)}
    return space | {
        "autovacuum_vacuum_scale_factor": "0.02",
        "autovacuum_vacuum_insert_scale_factor": "0.05",
        "autovacuum_analyze_scale_factor": "0.02",
    }


_DURATIONS: Final = {
    "postgresql": "(completed_at - created_at)",
    "sqlite": "(julianday(completed_at) - julianday(created_at))",
}
"""How long a run took, as each database can index it."""

runs: Final = Table(
    "runs",
    metadata,
    Column("run_id", CleanText, primary_key=True),
    Column("run_type", CleanText),
    Column("workspace_id", CleanText),
    Column("project_id", CleanText),
    Column("technique_id", CleanText),
    Column("technique_name", CleanText),
    Column("status", CleanText, nullable=False),
    Column("progress", Double, nullable=False),
    # FLORA's time, else when the run was first seen; see the next column.
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_at_known", Boolean, nullable=False),
    Column("started_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    # The price before the end; the bill, as a read sent at `cost_read_at` showed it.
    Column("quoted_cost", Money),
    Column("charged_cost", Money),
    Column("cost_read_at", UtcDateTime),
    # Whether that read was long enough after the end.
    Column("cost_final", Boolean, nullable=False, server_default=false()),
    Column("error_code", CleanText),
    Column("error_message", CleanText),
    # For a failed run, by code and message.
    Column("retry_advice", CleanText),
    # How many rows `run_outputs` has for the run; when the read that showed them was sent.
    Column("output_count", Integer, nullable=False),
    Column("outputs_read_at", UtcDateTime),
    Column("poll_url", CleanText),
    # What `merge` needs besides the values: see tracker.core.run. `precedences` and `polls` have
    # other names in the database, as `precedence` has: a process of an older version would fail at
    # a renamed column while the new version is rolled out.
    Column("standing", SmallInteger, nullable=False, key="precedence"),
    Column("details", SmallInteger, nullable=False),
    Column("ranks", BigInteger, nullable=False, key="precedences"),
    Column("conflict", Boolean, nullable=False),
    # Facts about receipt, outside the merge.
    Column("source", CleanText, nullable=False),
    Column("first_seen_at", UtcDateTime, nullable=False),
    Column("callback_at", UtcDateTime),
    Column("callback_expected", Boolean, nullable=False),
    Column("ended_via", CleanText),
    Column("end_seen_at", UtcDateTime),
    Column("tracking", CleanText, nullable=False),
    Column("settled_at", UtcDateTime),
    Column("inputs", Json),
    # Of a run started here: the key of its start, its tags, and the time and price of its
    # reservation. Without the key, the start of a run is the one whose `run_id` it is: a version
    # before 0023 stored none.
    Column("idempotency_key", CleanText),
    Column("tags", Json),
    Column("reserved_at", UtcDateTime),
    Column("reserved_cost", Money),
    # When to poll it next, and the results of earlier polls.
    Column("next_check_at", UtcDateTime),
    # Why then, in a word of tracker.core.schedule; NULL in rows of versions before 0021.
    Column("next_check_reason", CleanText),
    # When to read cost and outputs of a settled run again.
    Column("recheck_at", UtcDateTime),
    Column("looks", Integer, nullable=False, key="polls"),
    Column("checks", Integer, nullable=False),
    Column("missing", Integer, nullable=False),
    Column("missing_since", UtcDateTime),
    Column("last_error", CleanText),
    *_lease(),
    _one_of("tracking", Tracking),
    _one_of("source", Source),
    _one_of("ended_via", Source),
    CheckConstraint("progress BETWEEN 0 AND 100", name="progress"),
    CheckConstraint("standing BETWEEN 0 AND 5", name="standing"),
    CheckConstraint("details BETWEEN 0 AND 2", name="details"),
    # An unknown status of a newer FLORA counts as running, or as ended.
    CheckConstraint(
        "CASE WHEN status IN ('completed', 'failed') THEN standing >= 2"
        " WHEN status IN ('pending', 'running') THEN standing < 2"
        " ELSE status <> '' AND standing IN (1, 4) END",
        name="status_as_it_stands",
    ),
    CheckConstraint("(tracking = 'settled') = (settled_at IS NOT NULL)", name="settled_has_a_time"),
    CheckConstraint("tracking <> 'settled' OR standing >= 4", name="settled_has_ended"),
    # A version before 0014 never read a lost run again.
    CheckConstraint(
        "tracking = 'lost' OR (tracking = 'active') = (next_check_at IS NOT NULL)",
        name="active_is_checked",
    ),
    # Due runs: few of many, so the index holds only those with a next poll.
    _partial("ix_runs_due", "next_check_at", "next_check_at IS NOT NULL"),
    _partial("ix_runs_recheck", "recheck_at", "recheck_at IS NOT NULL"),
    # Listings, newest first, read backwards. The most frequent values need no index, because they
    # are found among the newest: see tracker.store.queries.runs.
    Index("ix_runs_newest", "created_at", "run_id"),
    _partial("ix_runs_newest_not_completed", "status, created_at, run_id", "status <> 'completed'"),
    _partial("ix_runs_newest_not_settled", "tracking, created_at, run_id", "tracking <> 'settled'"),
    _partial(
        "ix_runs_newest_of_a_technique",
        "technique_id, created_at, run_id",
        "technique_id IS NOT NULL",
    ),
    _partial(
        "ix_runs_newest_of_advice", "retry_advice, created_at, run_id", "retry_advice IS NOT NULL"
    ),
    Index("ix_runs_newest_of_workspace", "workspace_id", "created_at", "run_id"),
    _partial(
        "ix_runs_newest_of_project", "project_id, created_at, run_id", "project_id IS NOT NULL"
    ),
    # By tag: SQLite scans the tags of the newest runs, without the runs themselves.
    Index(
        "ix_runs_tags",
        "tags",
        postgresql_using="gin",
        postgresql_ops={"tags": "jsonb_path_ops"},
        postgresql_where=text("tags IS NOT NULL"),
        info={"dialect": "postgresql"},
    ).ddl_if(dialect="postgresql"),
    Index(
        "ix_runs_newest_tagged",
        *("created_at", "run_id", "tags"),
        sqlite_where=text("tags IS NOT NULL"),
        info={"dialect": "sqlite"},
    ).ddl_if(dialect="sqlite"),
    # Whether a workspace has generation runs: few do.
    _partial("ix_runs_generations", "workspace_id", "run_type = 'generation'"),
    # The most expensive and the longest runs first.
    _partial("ix_runs_by_cost", "charged_cost, run_id", "charged_cost IS NOT NULL"),
    *(
        _partial(
            f"ix_runs_by_duration_{dialect}",
            f"{duration}, run_id",
            "completed_at IS NOT NULL",
            info={"dialect": dialect},
        ).ddl_if(dialect=dialect)
        for dialect, duration in _DURATIONS.items()
    ),
    # The runs of a start.
    _partial("ix_runs_start", "idempotency_key", "idempotency_key IS NOT NULL"),
    # How long a technique's runs take.
    _partial("ix_runs_durations", "technique_id, completed_at", "status = 'completed'"),
    postgresql_with=_storage(fillfactor=85),
)


def run_duration(dialect: str) -> ColumnElement[Any]:
    """How long a run took: an interval on PostgreSQL, on SQLite days."""
    if dialect == "postgresql":
        return type_coerce(runs.c.completed_at - runs.c.created_at, Interval())
    days = func.julianday(runs.c.completed_at) - func.julianday(runs.c.created_at)
    return type_coerce(days, Double())


run_outputs: Final = Table(
    "run_outputs",
    metadata,
    Column("run_id", ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("output_id", CleanText, nullable=False),
    Column("type", CleanText, nullable=False),
    Column("url", CleanText, nullable=False),
    postgresql_with=_storage(),
)

run_events: Final = Table(
    "run_events",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    Column("run_id", ForeignKey("runs.run_id", ondelete="CASCADE"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("source", CleanText, nullable=False),
    Column("status", CleanText, nullable=False),
    Column("progress", Double),
    # The whole observation, so that the run can be merged again.
    Column("detail", Json, nullable=False),
    _one_of("source", Source),
    Index("ix_run_events_timeline", "run_id", "id"),
    postgresql_with=_storage(),
)

deliveries: Final = Table(
    "deliveries",
    metadata,
    Column("delivery_id", CleanText, primary_key=True),
    Column("run_id", CleanText),
    Column("event_type", CleanText),
    Column("api_version", CleanText),
    Column("workspace_id", CleanText),
    Column("created_at", UtcDateTime),
    Column("received_at", UtcDateTime, nullable=False),
    Column("last_received_at", UtcDateTime, nullable=False),
    Column("receipts", Integer, nullable=False),
    Column("outcome", CleanText, nullable=False),
    Column("reason", CleanText),
    # When it was applied to its run. Null while it waits, and for deliveries applied by a version
    # before 0008, on receipt.
    Column("applied_at", UtcDateTime),
    # Emptied by retention, at that time.
    Column("body", LargeBinary, nullable=False),
    Column("body_removed_at", UtcDateTime),
    # The last part of the address, if that was a start's own.
    Column("callback_token", CleanText),
    # When someone marked it as seen while it was quarantined.
    Column("acknowledged_at", UtcDateTime),
    _one_of("outcome", DeliveryOutcome),
    CheckConstraint("receipts >= 1", name="receipts"),
    CheckConstraint("applied_at IS NULL OR outcome = 'applied'", name="applied_has_its_time"),
    Index("ix_deliveries_run", "run_id"),
    Index("ix_deliveries_newest", "received_at", "delivery_id"),
    # The inbox: stored and not applied yet, oldest first.
    _partial("ix_deliveries_waiting", "received_at, delivery_id", "outcome = 'waiting'"),
    _partial("ix_deliveries_quarantined", "received_at, delivery_id", "outcome = 'quarantined'"),
    postgresql_with=_storage(fillfactor=85),
)

starts: Final = Table(
    "starts",
    metadata,
    # The workspace's id. A version before 0009 wrote 'default' for its first workspace; such rows
    # get the id as soon as it is known.
    Column("workspace_slot", CleanText, primary_key=True),
    Column("idempotency_key", CleanText, primary_key=True),
    Column("technique_id", CleanText, nullable=False),
    Column("fingerprint", CleanText, nullable=False),
    Column("inputs", Json, nullable=False),
    Column("state", CleanText, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # Since when FLORA may know the key; the callback address in the request.
    Column("in_use_since", UtcDateTime),
    Column("callback_url", CleanText),
    Column("sent_at", UtcDateTime),
    Column("run_id", CleanText),
    Column("error", Json),
    *_lease(),
    # The same id, once it is verified.
    Column("workspace_id", CleanText),
    # The last part of the start's own callback address; null if it has none.
    Column("callback_token", CleanText),
    # The request, for repetitions, while the start is open.
    Column("request_body", CleanText),
    Column("started_by", CleanText),
    Column("tags", Json),
    # What it reserves in the budgets: when, USD, and for how many runs.
    Column("reserved_at", UtcDateTime),
    Column("reserved_cost", Money),
    Column("reserved_runs", Integer),
    # How many runs it became; null for none, and for one that a version before 0023 stored.
    Column("run_count", Integer),
    # When it was last sent by a clock that only runs forward (`boot`, `seconds`), by how many
    # seconds FLORA's clock was ahead (`flora_ahead`), and the `sent_at` that this is about.
    Column("sent_clock", Json),
    # By how many seconds the clock was set back since its key was first sent, in all.
    Column("set_back", Double),
    _one_of("state", ("stored", "sent", "in_doubt", "started", "refused", "unresolved")),
    CheckConstraint("(state = 'started') = (run_id IS NOT NULL)", name="started_has_a_run"),
    _partial("ix_starts_open", "created_at", "state IN ('stored', 'sent')"),
    _partial("ix_starts_in_doubt", "created_at", "state = 'in_doubt'"),
    _partial("ix_starts_unresolved", "created_at", "state = 'unresolved'"),
    _partial("ix_starts_without_workspace", "workspace_slot", "workspace_id IS NULL"),
    # Starts of several runs of which not all have appeared: few.
    _partial("ix_starts_several", "reserved_at", "state = 'started' AND reserved_runs > 1"),
    Index("ix_starts_run", "run_id"),
    Index("ix_starts_technique", "technique_id", "created_at"),
    _partial(
        "ix_starts_callback_token", "callback_token", "callback_token IS NOT NULL", unique=True
    ),
    postgresql_with=_storage(),
)

sweeps: Final = Table(
    "sweeps",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    Column("workspace_id", CleanText),
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("pages", Integer, nullable=False),
    Column("items", Integer, nullable=False),
    Column("discovered", Integer, nullable=False),
    Column("repaired", Integer, nullable=False),
    # Items that could not be parsed.
    Column("unreadable", Integer, nullable=False),
    # Up to which of FLORA's times each kind was read when the sweep ended.
    Column("through", UtcDateTime),
    Column("generations_through", UtcDateTime),
    # Why technique runs or generations could not be read.
    Column("error", CleanText),
    Column("generations_error", CleanText),
    Index("ix_sweeps_newest", "workspace_id", "started_at"),
    # Few workspaces show generation runs, so the last sweep that saw some may be long ago.
    _partial(
        "ix_sweeps_generations", "workspace_id, started_at", "generations_through IS NOT NULL"
    ),
)

# The parts of the history that were read without a gap: see tracker.store.queries.sweeps.
history_coverage: Final = Table(
    "history_coverage",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    Column("workspace_id", CleanText, nullable=False),
    Column("run_type", CleanText, nullable=False),
    # FLORA's times of creation: after the first, through the second.
    Column("from_at", UtcDateTime, nullable=False),
    Column("to_at", UtcDateTime, nullable=False),
    Column("read_at", UtcDateTime, nullable=False),
    # Where to go on below it; why that failed, how often, and when it is tried again.
    Column("cursor", CleanText),
    Column("error", CleanText),
    Column("failures", Integer, nullable=False),
    Column("retry_at", UtcDateTime),
    CheckConstraint("from_at <= to_at", name="in_order"),
    Index("ix_history_coverage_newest", "workspace_id", "run_type", "to_at"),
)

techniques: Final = Table(
    "techniques",
    metadata,
    Column("technique_id", CleanText, primary_key=True),
    # Another name under which it was requested, if any.
    Column("slug", CleanText),
    Column("name", CleanText, nullable=False),
    Column("description", CleanText),
    Column("run_cost", Money),
    Column("inputs", Json, nullable=False),
    Column("outputs", Json, nullable=False),
    Column("synced_at", UtcDateTime, nullable=False),
    # When its definition was last read, and when a list last showed it.
    Column("defined_at", UtcDateTime),
    Column("listed_at", UtcDateTime),
    # Since when the catalogue has lacked it.
    Column("gone_at", UtcDateTime),
    Index("ix_techniques_slug", "slug"),
)

batches: Final = Table(
    "batches",
    metadata,
    Column("batch_id", CleanText, primary_key=True),
    Column("workspace_slot", CleanText, nullable=False),
    Column("technique_id", CleanText, nullable=False),
    # The name of the file when it was last used.
    Column("name", CleanText, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # When a command completed it; an unfinished batch is continued.
    Column("finished_at", UtcDateTime),
    # Which column is which input: `[[input id, column, type]…]`, as it was when the batch began.
    Column("mapping", Json),
    # Where it came from: `cli`, `api` or `page`; null before 0015. Names of the carried columns.
    Column("source", CleanText),
    Column("columns", Json),
    # The options of a batch that a worker launches; null for a command's. When that is due, and
    # why its last launch ended early, or what it waits for.
    Column("launch", Json),
    Column("launch_at", UtcDateTime),
    Column("stopped", CleanText),
    Column("lease_until", UtcDateTime),
    Column("lease_holder", CleanText),
    Index("ix_batches_newest", "created_at", "batch_id"),
    _partial("ix_batches_open", "launch_at", "launch IS NOT NULL AND finished_at IS NULL"),
)

batch_rows: Final = Table(
    "batch_rows",
    metadata,
    Column("batch_id", ForeignKey("batches.batch_id", ondelete="CASCADE"), primary_key=True),
    # From 1, in the order of the file; `line` is where the row begins in it.
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("line", Integer, nullable=False),
    # The identity of the row, and how often it was run before: see tracker.core.starts.
    Column("row_digest", CleanText, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    # The key of its start, whose row has the outcome.
    Column("idempotency_key", CleanText, nullable=False),
    # What is started, null before 0015; the cells that are no input, by column; why the last
    # launch could not try it.
    Column("inputs", Json),
    Column("tags", Json),
    Column("carried", Json),
    Column("error", CleanText),
    Index("ix_batch_rows_digest", "row_digest"),
    Index("ix_batch_rows_key", "idempotency_key"),
    postgresql_with=_storage(),
)

# Signed-in browsers. Neither the cookie nor the token can be derived from a row.
sessions: Final = Table(
    "sessions",
    metadata,
    Column("session_id", CleanText, primary_key=True),
    Column("token_name", CleanText, nullable=False),
    Column("token_digest", CleanText, nullable=False),
    # Whether the browser used https.
    Column("secure", Boolean, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("last_used_at", UtcDateTime, nullable=False),
)

# The audit log: see tracker.store.queries.audit. Refused requests of one address, token and minute
# share a row.
audit: Final = Table(
    "audit",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", CleanText, nullable=False),
    Column("action", CleanText, nullable=False),
    Column("detail", Json, nullable=False),
    Column("request_id", CleanText),
    Column("address", CleanText),
    Column("count", Integer, nullable=False),
    CheckConstraint("count >= 1", name="count"),
    Index("ix_audit_newest", "at", "id"),
    _partial("ix_audit_refused", "address, at, actor", "action = 'refused'", unique=True),
)

# The workspace of each API key, as FLORA reported it. A key cannot be derived from its fingerprint.
# `place` is the position of the key in the settings.
workspace_keys: Final = Table(
    "workspace_keys",
    metadata,
    Column("key_fingerprint", CleanText, primary_key=True),
    Column("workspace_id", CleanText, nullable=False),
    Column("place", CleanText, nullable=False),
    Column("learnt_at", UtcDateTime, nullable=False),
)

leases: Final = Table(
    "leases",
    metadata,
    Column("name", CleanText, primary_key=True),
    Column("holder", CleanText, nullable=False),
    Column("until", UtcDateTime, nullable=False),
)


# How far retention has come: the creation time up to which runs of a workspace (empty: unknown) may
# have been removed, and the time of receipt up to which bodies have been.
retention: Final = Table(
    "retention",
    metadata,
    Column("what", CleanText, primary_key=True),
    Column("workspace_id", CleanText, primary_key=True),
    Column("through", UtcDateTime, nullable=False),
    _one_of("what", ("runs", "bodies")),
)

# Events of runs, written in the transaction that causes them, by processes that need not know any
# endpoint. A row becomes one message for each endpoint and is deleted: see
# tracker.store.queries.endpoints.
outbox: Final = Table(
    "outbox",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    # The identity of the event: SQLite uses an `id` again once the table is empty.
    Column("event_id", CleanText, nullable=False),
    Column("event", CleanText, nullable=False),
    Column("run_id", CleanText, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    _one_of("event", EventType),
    # Emptied within milliseconds: dead rows must not be read again and again.
    postgresql_with={"autovacuum_vacuum_scale_factor": "0", "autovacuum_vacuum_threshold": "1000"},
)

# Where events are sent: the settings of the processes, without secrets, and what the last attempts
# showed.
endpoints: Final = Table(
    "endpoints",
    metadata,
    Column("endpoint_id", CleanText, primary_key=True),
    # Without the values of its query, which may be secrets.
    Column("url", CleanText, nullable=False),
    Column("events", Json, nullable=False),
    # Which runs: see tracker.core.events.RunFilter.
    Column("filters", Json, nullable=False),
    # When it was first configured, and when a process last had it in its settings.
    Column("since", UtcDateTime, nullable=False),
    Column("configured_at", UtcDateTime, nullable=False),
    Column("state", CleanText, nullable=False),
    Column("disabled_at", UtcDateTime),
    Column("disabled_reason", CleanText),
    # When it was enabled again: schedules of attempts begin anew.
    Column("enabled_at", UtcDateTime),
    # The first failure after the last success.
    Column("failing_since", UtcDateTime),
    Column("last_success_at", UtcDateTime),
    Column("last_error_at", UtcDateTime),
    Column("last_error", CleanText),
    # Messages that failed between these are sent at once.
    Column("catch_up_from", UtcDateTime),
    Column("catch_up_to", UtcDateTime),
    _one_of("state", ("enabled", "disabled")),
    CheckConstraint("(state = 'disabled') = (disabled_at IS NOT NULL)", name="disabled_has_a_time"),
    CheckConstraint(
        "(catch_up_from IS NULL) = (catch_up_to IS NULL)", name="catch_up_has_two_ends"
    ),
    postgresql_with=_storage(fillfactor=50),
)

# One event for one endpoint.
messages: Final = Table(
    "messages",
    metadata,
    Column("message_id", CleanText, primary_key=True),
    Column("endpoint_id", CleanText, nullable=False),
    Column("event_id", CleanText, nullable=False),
    Column("event", CleanText, nullable=False),
    Column("run_id", CleanText, nullable=False),
    # The JSON as it is sent.
    Column("body", CleanText, nullable=False),
    # When the event happened, and when the message was made of it.
    Column("event_at", UtcDateTime, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("state", CleanText, nullable=False),
    Column("attempts", Integer, nullable=False),
    # When the schedule of attempts began: null before the first, and after a request to resend it.
    Column("tried_since", UtcDateTime),
    Column("last_attempt_at", UtcDateTime),
    Column("next_attempt_at", UtcDateTime),
    Column("delivered_at", UtcDateTime),
    # The HTTP status of the last attempt; why it failed.
    Column("last_status", Integer),
    Column("last_error", CleanText),
    *_lease(),
    _one_of("event", EventType),
    _one_of("state", MessageState),
    CheckConstraint("attempts >= 0", name="attempts"),
    CheckConstraint("(state = 'pending') = (next_attempt_at IS NOT NULL)", name="pending_is_due"),
    CheckConstraint(
        "(state = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_has_a_time"
    ),
    Index("ix_messages_once", "endpoint_id", "event_id", unique=True),
    _partial("ix_messages_due", "endpoint_id, next_attempt_at", "state = 'pending'"),
    _partial("ix_messages_leased", "endpoint_id", "lease_holder IS NOT NULL"),
    Index("ix_messages_newest", "created_at", "message_id"),
    Index("ix_messages_newest_of_endpoint", "endpoint_id", "created_at", "message_id"),
    _partial(
        "ix_messages_newest_not_delivered", "state, created_at, message_id", "state <> 'delivered'"
    ),
    _partial(
        "ix_messages_newest_not_settled", "event, created_at, message_id", "event <> 'run.settled'"
    ),
    Index("ix_messages_run", "run_id"),
    postgresql_with=_storage(fillfactor=85),
)

message_attempts: Final = Table(
    "message_attempts",
    metadata,
    Column("message_id", ForeignKey("messages.message_id", ondelete="CASCADE"), primary_key=True),
    # From 1.
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("seconds", Double, nullable=False),
    # The HTTP status and the beginning of the answer, if there was one; else why not.
    Column("status", Integer),
    Column("answer", CleanText),
    Column("error", CleanText),
    CheckConstraint("number >= 1", name="number"),
    postgresql_with=_storage(),
)


def rollup_columns() -> list[Column[Any]]:
    """The key of a count, the number of runs, and the sum of their amounts (core.rollup)."""
    texts = ("workspace_id", "technique_id", "status", "word")
    return [
        Column("measure", CleanText, nullable=False),
        Column("since", UtcDateTime, nullable=False),
        *(Column(name, CleanText, nullable=False) for name in texts),
        Column("bucket", Integer, nullable=False),
        Column("runs", BigInteger, nullable=False),
        Column("amount", BigInteger, nullable=False),
    ]


# One process at a time writes to the first table, every writer appends to the second: see
# tracker.store.writing.rollups.
run_tallies: Final = Table(
    "run_tallies",
    metadata,
    *rollup_columns(),
    PrimaryKeyConstraint(*RollupKey._fields),
    # The cost of one tag, among any number of tags.
    _partial("ix_run_tallies_tagged", "word, since", "measure = 'tagged'"),
    sqlite_with_rowid=False,
)

run_tally_changes: Final = Table(
    "run_tally_changes",
    metadata,
    Column("id", SerialId, Identity(), primary_key=True),
    *rollup_columns(),
    # Spending: budgets are checked with each start.
    _partial("ix_run_tally_changes_spent", "measure, word", "measure IN ('spent', 'tagged')"),
    # Emptied every few seconds: dead rows must not be read again and again.
    postgresql_with={"autovacuum_vacuum_scale_factor": "0", "autovacuum_vacuum_threshold": "1000"},
)
