"""The rows of a batch: what each is planned to be, its state, and its line in the results."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from tracker.core.errors import (
    DefinitionChanged,
    FieldFault,
    FloraError,
    MaxCostReached,
    TrackerError,
)
from tracker.core.formatting import counted, csv_text, money
from tracker.core.record import Record
from tracker.core.run import Output, RetryAdvice, RunStatus
from tracker.core.starts import RunNumber, Tags, TechniqueDefinition
from tracker.flora.parse import cost_of
from tracker.store.engine import Database
from tracker.store.queries import batches, starts
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.queries.sheet_rows import LatestRunNumber, deciding
from tracker.store.queries.starts import StartRow, StartState

RETRY_LATER_AFTER: Final = timedelta(minutes=1)
LONGEST_RETRY_LATER: Final = timedelta(minutes=10)
"""How long after its end a run that failed because of an overloaded provider is started again:
doubling with each attempt, from the first to the second."""


_WITHOUT_RUN: Final[dict[str, str]] = {
    StartState.STORED: "not_started",
    StartState.SENT: "sending",
    StartState.IN_DOUBT: "in_doubt",
    StartState.REFUSED: "refused",
    StartState.UNRESOLVED: "unresolved",
    StartState.STARTED: "forgotten",
}
"""The status of a row without a run, by the state of its start."""


class Retry(StrEnum):
    """Which failed rows are started again. A retry is a new run, and is charged."""

    FAILED = "failed"
    """Those for which FLORA's codes advise it: a temporary fault once, an overload after a wait."""
    ALL = "all"
    """All of them, at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """The state of a row: its start, if it was tried, and its runs, if it started: one, or several
    if an input has several values. `records` are those that are known and stored, the first first.

    `error` is why the last launch could not start it. It is not started before `not_before`, UTC,
    if a wait was advised. `pays_again` is true for a retry that starts completed runs of the row
    once more: FLORA starts a row as a whole.
    """

    entry: BatchEntry
    start: StartRow | None = None
    records: Sequence[Record] = ()
    error: str | None = None
    not_before: datetime | None = None
    pays_again: bool = False

    @property
    def record(self) -> Record | None:
        """The run that decides its outcome and advice: see `sheet_rows.deciding`."""
        return deciding(self.records)

    @property
    def _shown(self) -> Record | None:
        """The run whose status and error are the row's: one that has not ended, else the first that
        did not complete. `record` may have ended, and wait for its details."""
        return min(self.records, key=_rank_of_status, default=None)

    @property
    def run_ids(self) -> list[str]:
        """The ids of its known runs, the first first, which retention may have removed."""
        ids = dict.fromkeys(record.run.run_id for record in self.records)
        if self.start is not None and self.start.run_id is not None:
            ids = {self.start.run_id: None} | ids
        return [*ids]

    @property
    def missing_runs(self) -> int:
        """How many of its runs are not known here."""
        return 0 if self.start is None else self.start.missing_runs

    @property
    def outputs(self) -> list[Output]:
        """The outputs of its runs, run by run."""
        return [output for record in self.records for output in record.run.outputs or ()]

    @property
    def cost(self) -> Decimal | None:
        """The sum of the bills of its runs, in USD; `None` until each is known. A failed run may
        have none."""
        records = self.records
        costs = [one.run.charged_cost for one in records if one.run.charged_cost is not None]
        billed = all(one.run.charged_cost is not None or one.cost_final for one in records)
        return sum(costs, Decimal(0)) if costs and billed else None

    @property
    def cost_final(self) -> bool:
        """Whether no bill may change any more, and all its runs are known."""
        is_known = bool(self.records) and not self.missing_runs
        return is_known and all(record.cost_final for record in self.records)

    @property
    def quoted_cost(self) -> Decimal | None:
        """The sum of FLORA's quotes for its runs, in USD; `None` if one has none."""
        quotes = [record.run.quoted_cost for record in self.records]
        known = [quote for quote in quotes if quote is not None]
        return sum(known, Decimal(0)) if known and len(known) == len(quotes) else None

    @property
    def inputs(self) -> list[dict[str, Any]] | None:
        """Its inputs; `None` for a row that a version before 0015 stored and never tried."""
        return self.entry.inputs if self.start is None else self.start.inputs

    @property
    def tags(self) -> Tags:
        """Its tags: those that it was sent with, if it was. They do not change any more."""
        if self.start is None or self.start.is_fresh:
            return self.entry.tags
        return self.start.tags or {}

    @property
    def status(self) -> str:
        """FLORA's status of its runs: of one in progress while there is one, `completed` once all
        have; `not_started`, `sending`, `in_doubt`, `refused` or
        `unresolved` before there is one; `lost` or `forgotten` if there is none any more."""
        if self._shown is not None:
            return self._shown.shown_status
        if self.start is None:
            return "not_started"
        return _WITHOUT_RUN.get(self.start.state, self.start.state)

    @property
    def started(self) -> bool:
        """Whether it is known to be a run."""
        return self.start is not None and self.start.state is StartState.STARTED

    @property
    def is_retry(self) -> bool:
        """Whether it is another attempt of a row whose run failed."""
        return self.entry.run_number.attempt > 0

    @property
    def done(self) -> bool:
        """Whether its runs completed and are settled."""
        record = self.record
        return record is not None and record.run.settled and self.status == RunStatus.COMPLETED

    @property
    def advice(self) -> RetryAdvice | None:
        """Whether to start a failed row again; `None` for any other."""
        run = None if self.record is None else self.record.run
        return run.retry_advice if run is not None and run.settled else None

    @property
    def retryable(self) -> bool:
        """Whether FLORA's codes advise another attempt of a failed row: a temporary fault once, an
        overload always."""
        once = self.advice is RetryAdvice.RETRY_NOW and not self.is_retry
        return once or self.advice is RetryAdvice.RETRY_LATER

    def retried(self, retry: Retry) -> "RowState":
        """The row for another attempt, if its run failed and is to be tried again."""
        if self.advice is None or (retry is Retry.FAILED and not self.retryable):
            return self
        not_before = self.retry_not_before if retry is Retry.FAILED else None
        entry = replace(self.entry, run_number=self.entry.run_number.retried())
        pays_again = any(one.run.status is RunStatus.COMPLETED for one in self.records)
        return RowState(entry=entry, not_before=not_before, pays_again=pays_again)

    @property
    def retry_not_before(self) -> datetime | None:
        """When a row can be started again that failed because of an overloaded provider."""
        if self.advice is not RetryAdvice.RETRY_LATER or self.record is None:
            return None
        wait = RETRY_LATER_AFTER * 2 ** min(self.entry.run_number.attempt, 10)
        ended = self.record.end_seen_at
        return ended and ended + min(wait, LONGEST_RETRY_LATER)

    @property
    def why(self) -> str | None:
        """What went wrong with it, for a person."""
        if (shown := self._shown) is not None:
            run, error = shown.run, shown.run.error
            if not run.precedence.ended or run.status is RunStatus.COMPLETED:
                return shown.last_error
            return f"{error.code}: {error.message}".strip(": ") if error else str(run.status)
        refused = self.start is not None and self.start.state is StartState.REFUSED
        if self.start is None or (self.error is not None and not refused):
            return self.error
        return _kept_error(self.start.error or {}) or self.error

    @property
    def result(self) -> dict[str, Any]:
        """The values of `RESULT_COLUMNS`, by name."""
        return {
            "row": self.entry.position,
            "line": self.entry.line,
            "key": self.entry.key,
            "run_id": None if self.start is None else self.start.run_id,
            "status": self.status,
            "cost": self.cost,
            "cost_final": self.cost_final,
            "quoted_cost": self.quoted_cost,
            "retry_advice": self.advice,
            "error": self.why,
        }


def _rank_of_status(record: Record) -> int:
    if record.shown_status == RunStatus.COMPLETED:
        return 2
    return int(record.run.precedence.ended or record.lost)


def _kept_error(error: dict[str, Any]) -> str:
    """An error of the start log in words, with the fields that FLORA names."""
    words = [": ".join(str(error[name]) for name in ("code", "message") if error.get(name))]
    for one in error.get("fields") or ():
        values = tuple(one.get("valid_values") or ())
        words.append(str(FieldFault(str(one.get("field")), str(one.get("message")), values)))
    return "; ".join(filter(None, words))


class RowsLeftOut(TrackerError):
    """A launch started all rows that it was to start, and left out those without a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What a batch is to do; `rows` are all its rows.

    `only_failed` leaves rows out that have no run yet. `unmapped` are the columns of its sheet that
    are no input. `price_error` is why the price could not be read now. `changed` is set if the
    types of inputs have changed since its rows were started, all of them, so that none starts.
    """

    batch: BatchRow
    technique: TechniqueDefinition
    rows: Sequence[RowState]
    only_failed: bool = False
    unmapped: Sequence[str] = ()
    price_error: FloraError | None = None
    changed: DefinitionChanged | None = None

    @property
    def to_change(self) -> list[RowState]:
        """The rows that failed because of their inputs, which have to be changed first."""
        return [row for row in self.rows if row.advice is RetryAdvice.CHANGE_INPUT]

    @property
    def paid_again(self) -> int:
        """How many of the rows to start have completed runs, which are paid again."""
        return sum(row.pays_again for row in self.missing)

    @property
    def missing(self) -> list[RowState]:
        """The rows to start."""
        return [row for row in self._unstarted if row.is_retry or not self.only_failed]

    @property
    def left_out(self) -> int:
        """How many rows without a run are left out, so that the batch does not end with these."""
        return len(self._unstarted) - len(self.missing)

    def stopped_by(self, error: TrackerError | None) -> TrackerError | None:
        """Why a launch did not start all rows: the `error` that ended it, or rows left out."""
        if error is not None or not self.left_out:
            return error
        return RowsLeftOut("only failed rows were to be started")

    @property
    def _unstarted(self) -> list[RowState]:
        return [row for row in self.rows if not row.started]

    @property
    def cost(self) -> Decimal | None:
        """The price of starting them, in USD; `None` if FLORA names none."""
        costs = [self.cost_of(row) for row in self.missing]
        known = [cost for cost in costs if cost is not None]
        return sum(known, Decimal(0)) if len(known) == len(costs) else None

    def check_cost(self, limit: Decimal | None, *, name: str) -> None:
        """Raise `MaxCostReached` if starting them could cost more than `limit`, in USD.

        `name` is what the limit is called.
        """
        if limit is None or not self.missing:
            return
        if self.cost is None:
            raise MaxCostReached(
                f"FLORA shows no price for {self.technique.technique_id} to compare with {name} "
                f"{money(limit)}; nothing was started"
            )
        if self.cost > limit:
            raise MaxCostReached(
                f"starting {counted(len(self.missing), 'row')} could cost {money(self.cost)}, more "
                f"than {name} {money(limit)}; nothing was started"
            )

    def cost_of(self, row: RowState) -> Decimal | None:
        """The price of starting that row, in USD; `None` if FLORA names none."""
        return cost_of(self.technique, row.entry.inputs or [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is ordered, beside the rows.

    `started_by` is stored with each start. `max_cost` is the most that they may cost, in USD;
    `wait_for_budget` waits for a budget to renew if it has no room for the next row. `at_once`
    starts retries without the wait that was advised; `only_failed`, as the plan has it, leaves rows
    without a run out.
    """

    started_by: str
    ordered_at: datetime
    max_cost: Decimal | None = None
    wait_for_budget: bool = False
    at_once: bool = False
    only_failed: bool = False

    @classmethod
    def of(cls, batch: BatchRow) -> "Order":
        """The order of a stored batch that has one."""
        stored: dict[str, Any] = batch.launch or {}
        ordered_at, max_cost = stored.get("ordered_at"), stored.get("max_cost")
        return cls(
            started_by=stored.get("started_by", ""),
            ordered_at=datetime.fromisoformat(ordered_at) if ordered_at else batch.created_at,
            max_cost=Decimal(max_cost) if max_cost else None,
            wait_for_budget=stored.get("wait_for_budget", False),
            at_once=stored.get("at_once", False),
            only_failed=stored.get("only_failed", False),
        )

    @classmethod
    def unknown(cls, batch: BatchRow) -> list[str]:
        """The options of its order that only a newer version knows."""
        return sorted((batch.launch or {}).keys() - cls.__slots__)

    def as_json(self) -> dict[str, Any]:
        """The order as it is stored."""
        max_cost = None if self.max_cost is None else str(self.max_cost)
        stored = asdict(self) | {"ordered_at": self.ordered_at.isoformat(), "max_cost": max_cost}
        if not self.only_failed:
            del stored["only_failed"]  # which an older worker would not launch
        return stored

    def is_like(self, other: "Order") -> bool:
        """Whether both order the same, whoever did and when."""
        return self == replace(other, started_by=self.started_by, ordered_at=self.ordered_at)


def run_number_of(latest: LatestRunNumber | None, *, again: bool) -> RunNumber:
    """The number of a row's run now.

    An unfinished rerun is resumed: repeating the command after an interruption, with `again` or
    without, never begins another.
    """
    if latest is None:
        return RunNumber()
    return latest.run_number.again() if again and latest.finished else latest.run_number


async def states_of(
    db: Database, workspace_id: str, entries: Sequence[BatchEntry]
) -> list[RowState]:
    """The states of these rows, in their order."""
    found = await starts.of_keys(db, workspace_id, (entry.key for entry in entries))
    records = await starts.runs_of(db, found.values())
    return [
        RowState(
            entry=one,
            start=found.get(one.key),
            records=records.get(one.key, ()),
            error=one.error,
        )
        for one in entries
    ]


async def kept_rows(db: Database, batch: BatchRow, **chosen: Any) -> list[RowState]:
    """The states of the rows of a stored batch, in the order of its sheet; `chosen` are the
    conditions of `batches.entries`."""
    entries = await batches.entries(db, batch.batch_id, **chosen)
    return await states_of(db, batch.workspace_id, entries)


# The results of a batch as CSV, the same from the command, the API and the page.
#
# The carried columns of the sheet come first, with their names and in their order, then the result
# of each row, its inputs and its outputs.

RESULT_COLUMNS: Final = (
    *("row", "line", "key", "run_id", "status", "cost", "cost_final", "quoted_cost"),
    *("retry_advice", "error"),
)
"""Costs are USD."""
BOM: Final = "\ufeff"
"""Lets Excel read CSV as UTF-8."""


def csv_lines(
    rows: Sequence[RowState],
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    bom: bool = False,
) -> Iterator[str]:
    """The results of `rows` as lines of CSV, the header first; `columns` are the carried columns.

    There is a column for each input, and as many for outputs, and for runs after the first, as the
    longest row has. A cell that a
    spreadsheet would take for a formula gets a `'` in front.
    """
    inputs = dict.fromkeys(one["id"] for row in rows for one in row.inputs or ())
    most = max((len(row.outputs) for row in rows), default=0)
    runs = max((len(row.run_ids) for row in rows), default=0)
    further = [f"run_id.{number}" for number in range(2, runs + 1)]
    own = [*RESULT_COLUMNS, *further, *(f"input.{name}" for name in inputs)]
    own += [f"output.{number}" for number in range(1, most + 1)]
    header = csv_text([[*carried_names(columns, own), *own]], delimiter=delimiter)
    yield BOM + header if bom else header
    for row in rows:
        values, links = row.inputs or (), [output.url for output in row.outputs]
        others = row.run_ids[1:]
        cells = [
            *(row.entry.carried.get(name, "") for name in columns),
            *map(row.result.get, RESULT_COLUMNS),
            *others,
            *[""] * (len(further) - len(others)),
            *("\n".join(v["value"] for v in values if v["id"] == name) for name in inputs),
            *links,
            *[""] * (most - len(links)),
        ]
        yield csv_text([cells], delimiter=delimiter)


def carried_names(columns: Sequence[str], results: Sequence[str] = RESULT_COLUMNS) -> list[str]:
    """The names of carried columns in the results: `sheet.NAME` where a result has that name."""
    taken, names = {*results, *columns}, []
    for name in columns:
        if name in results:
            while name in taken:
                name = f"sheet.{name}"
            taken.add(name)
        names.append(name)
    return names
