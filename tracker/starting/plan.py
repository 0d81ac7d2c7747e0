"""Plans: what a batch would start now, by its sheet or as it is stored, at no cost.

Columns of a sheet become inputs of its technique, the others are carried. A column is the input
whose id, or else name, it bears, in any case; an explicit mapping comes first. Nothing is guessed
if two columns match.
"""

import asyncio
import difflib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tracker.core.errors import (
    DefinitionChanged,
    FieldFault,
    FloraError,
    InvalidRequest,
    NotFound,
    TrackerError,
)
from tracker.core.starts import (
    Input,
    Port,
    Tags,
    batch_id,
    canonical,
    check,
    check_tags,
    obstacle,
    row_digests,
)
from tracker.flora.parse import ports
from tracker.starting.catalogue import Catalogue
from tracker.starting.rows import BatchPlan, Retry, RowState, kept_rows, run_number_of, states_of
from tracker.starting.sheet import DELIMITERS, Sheet, SheetProblem, SheetRefused, SheetRow
from tracker.store.queries import sheet_rows
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.queries.techniques import TechniqueRow
from tracker.workspaces import Service, Workspace

_LINKS: Final = ("imageUrl", "videoUrl")


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """One column for one input. `type` is `None` if the technique's definition gives it."""

    input_id: str
    column: str
    type: str | None = None

    @property
    def stored(self) -> tuple[str, str, str]:
        """It as batches store it."""
        return self.input_id, self.column, self.type or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """The inputs of one row, and its first line."""

    line: int
    inputs: list[Input]


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetReading:
    """A sheet's rows as inputs. `unmapped` are the columns that are no input."""

    mapping: tuple[ColumnMapping, ...]
    rows: tuple[InputRow, ...]
    unmapped: tuple[str, ...]
    problems: tuple[SheetProblem, ...]


@dataclass(kw_only=True, eq=False)
class BatchPlanner(Service):
    """Plans batches."""

    catalogue: Catalogue

    async def plan(
        self,
        technique: str,
        sheet: Sheet,
        *,
        name: str,
        explicit: Sequence[ColumnMapping] = (),
        workspace_id: str | None = None,
        again: bool = False,
        retry: Retry | None = None,
        skip_bad_rows: bool = False,
        accept_changes: bool = False,
        tags: Tags | None = None,
        tag_columns: dict[str, str] | None = None,
        source: str = "cli",
    ) -> tuple[BatchPlan, Sequence[SheetProblem]]:
        """What a batch of this sheet would do now, and the problems of the rows that it skips.

        `name` is the name of the sheet, `explicit` maps columns to inputs. `again`
        runs every row once more, `retry` those that failed. `tags` are those of all runs,
        `tag_columns` the columns with further tags, by key. Nothing is started or stored. Raises
        `SheetRefused` with all problems, `InvalidRequest` for the workspace or a technique that
        cannot be started, `DefinitionChanged` if rows would start anew because the technique has
        changed (unless `accept_changes`, or types alone have changed and every row was started),
        `NotFound` if FLORA has no such technique and rows are to be started, and what reading FLORA
        raises.
        """
        planned_at = self.clock()  # what is ordered from now on may be no part of the plan
        workspace = await self.workspaces.pick(workspace_id)
        workspace_id = await self.workspaces.id_of(workspace)
        definition, price_error = await self._priced(workspace, technique)
        needed = ports(definition.inputs)
        if (reason := obstacle(needed)) is not None:
            raise InvalidRequest(f"{technique} cannot be started: {reason}")
        # In a thread: many rows would hold up what else the process does.
        reading = await asyncio.to_thread(read_rows, sheet, needed, explicit)
        tagged, wrong = await asyncio.to_thread(_row_tags, sheet, tag_columns or {}, tags or {})
        problems = sorted([*reading.problems, *wrong])
        rows = _fit_rows(reading.rows, problems, skip=skip_bad_rows, header=sheet.header)
        columns = [name for name in reading.unmapped if name]
        carried = await asyncio.to_thread(_carried, sheet, frozenset(columns))

        async def states() -> tuple[list[RowState], dict[int, int]]:
            """The rows as they are known, and the lines, by position, of those that are new."""
            inputs = [row.inputs for _, row in rows]
            digests = await asyncio.to_thread(row_digests, definition.technique_id, inputs)
            latest = await sheet_rows.latest_run_numbers(self.database, workspace_id, digests)
            entries = [
                BatchEntry(
                    position=position,
                    line=row.line,
                    digest=digest,
                    run_number=run_number_of(latest.get(digest), again=again),
                    inputs=row.inputs,
                    tags=tagged[row.line],
                    carried=carried[position - 1],
                )
                for (position, row), digest in zip(rows, digests, strict=True)
            ]
            new = {one.position: one.line for one in entries if one.digest not in latest}
            return await self._retried(workspace_id, entries, retry), new

        planned, new = await states()
        mapping: Sequence[ColumnMapping] = reading.mapping
        changed: DefinitionChanged | None = None
        if new and not accept_changes:
            mapping, changed = await self._mapping_so_far(
                workspace_id, definition.technique_id, sheet, mapping, new
            )
        if changed is not None:
            rows = await asyncio.to_thread(_reread, sheet, rows, mapping)
            planned, _ = await states()
            if not (changed.is_of_types and all(row.started for row in planned)):
                raise changed
        chosen = [row.entry for row in planned]
        batch = BatchRow(
            batch_id=batch_id(
                workspace_id,
                definition.technique_id,
                [(one.position, one.digest, one.run_number) for one in chosen],
            ),
            workspace_id=workspace_id,
            technique_id=definition.technique_id,
            name=name,
            created_at=planned_at,
            mapping=[list(one.stored) for one in mapping],
            source=source,
            columns=columns,
        )
        plan = BatchPlan(
            batch=batch,
            technique=definition,
            rows=planned,
            unmapped=[one for one in reading.unmapped if one not in (tag_columns or {}).values()],
            price_error=price_error,
            changed=changed,
        )
        return _startable(plan), problems

    async def stored_plan(
        self,
        batch: BatchRow,
        *,
        retry: Retry | None = None,
        only_failed: bool = False,
        wait: bool = True,
    ) -> BatchPlan:
        """What a stored batch would do now, without its sheet.

        `retry` starts failed rows again, `only_failed` leaves rows without a run out; `wait` keeps
        the wait that was advised for retries which are stored and not started. Rows that a version
        before 0015 stored and never started are left out, because only their sheet has their
        inputs. Raises `NotFound` if FLORA has no such technique and rows are to be started, what
        reading FLORA raises, and `TrackerError` if the workspace is not configured.
        """
        workspace = await self.workspace_of(batch)
        definition, price_error = await self._priced(workspace, batch.technique_id)
        entries = []
        for row in await kept_rows(self.database, batch):
            entry, start = row.entry, row.start
            if start is not None and (entry.inputs is None or not start.is_fresh):
                entry = replace(entry, inputs=start.inputs, tags=start.tags or {})
            if entry.inputs is not None:
                entries.append(entry)
        rows = await self._retried(batch.workspace_id, entries, retry, wait=wait)
        plan = BatchPlan(
            batch=batch,
            technique=definition,
            rows=rows,
            only_failed=only_failed,
            price_error=price_error,
        )
        return _startable(plan)

    async def workspace_of(self, batch: BatchRow) -> Workspace:
        """The workspace of a stored batch. Raises `TrackerError` if it is not configured here."""
        found = await self.workspaces.with_id(batch.workspace_id)
        if found is None:
            raise TrackerError(f"workspace {batch.workspace_id} is not configured here")
        return found

    async def _priced(
        self, workspace: Workspace, technique: str
    ) -> tuple[TechniqueRow, FloraError | None]:
        """As `Catalogue.priced`, and the last known definition of a technique that is gone: it
        identifies the rows that were started."""
        try:
            return await self.catalogue.priced(workspace, technique)
        except NotFound as gone:
            known = await self.catalogue.last_known(technique)
            if known is None:
                raise
            return known, gone

    async def _retried(
        self,
        workspace_id: str,
        entries: Sequence[BatchEntry],
        retry: Retry | None,
        *,
        wait: bool = True,
    ) -> list[RowState]:
        """The rows: those that failed for another attempt where `retry` says so, and retries that
        an earlier launch did not start with the rest of their wait."""
        rows = await states_of(self.database, workspace_id, entries)
        if wait and retry is not Retry.ALL:
            failed = {
                row.entry.key: replace(row.entry, run_number=row.entry.run_number.before())
                for row in rows
                if row.entry.run_number.attempt and not row.started
            }
            runs = await states_of(self.database, workspace_id, list(failed.values()))
            waits = dict(zip(failed, (run.retry_not_before for run in runs), strict=True))
            rows = [replace(row, not_before=waits.get(row.entry.key)) for row in rows]
        if retry is None:
            return rows
        retried = [row.retried(retry) for row in rows]
        states = await states_of(self.database, workspace_id, [row.entry for row in retried])
        return [
            replace(state, not_before=row.not_before, pays_again=row.pays_again)
            for state, row in zip(states, retried, strict=True)
        ]

    async def _mapping_so_far(
        self,
        workspace_id: str,
        technique_id: str,
        sheet: Sheet,
        mapping: Sequence[ColumnMapping],
        new: Mapping[int, int],
    ) -> tuple[Sequence[ColumnMapping], DefinitionChanged | None]:
        """This mapping of columns; or another one with which rows were started that would start
        anew with this one, and the error about them. `new` are the lines, by position, of the rows
        that no batch has with this one."""
        now = {one.stored for one in mapping}
        earlier = await sheet_rows.mappings(self.database, workspace_id, technique_id)
        # Batches of versions without mappings: the inputs of their rows show it.
        asked = await sheet_rows.asked_without_mapping(self.database, workspace_id, technique_id)
        for inputs in asked:
            derived = await asyncio.to_thread(_mapping_of, sheet, mapping, inputs)
            earlier.append(tuple(one.stored for one in derived))
        for before in earlier:
            if set(before) == now or any(column not in sheet.columns for _, column, _ in before):
                continue
            read = [ColumnMapping(*one) for one in before]
            digests = await asyncio.to_thread(_digests_by, technique_id, sheet, read)
            old = [(line, digests[position - 1]) for position, line in new.items()]
            known = await sheet_rows.latest_run_numbers(
                self.database, workspace_id, [digest for _, digest in old]
            )
            if anew := [line for line, digest in old if digest in known]:
                return read, DefinitionChanged(
                    new=sorted(now - set(before)), gone=sorted(set(before) - now), lines=anew
                )
        return mapping, None


def _startable(plan: BatchPlan) -> BatchPlan:
    """The plan. Raises `NotFound` if it has rows to start and FLORA has no such technique."""
    if plan.missing and isinstance(plan.price_error, NotFound):
        raise plan.price_error
    return plan


def _carried(sheet: Sheet, columns: Container[str]) -> list[dict[str, str]]:
    """The cells of each row that are no input, by column."""
    return [
        {name: ", ".join(values) for name, values in row.cells.items() if name in columns}
        for row in sheet.rows
    ]


def _fit_rows(
    rows: Sequence[InputRow], problems: Sequence[SheetProblem], *, skip: bool, header: int
) -> list[tuple[int, InputRow]]:
    """The rows without problems, with their positions. Raises `SheetRefused` if problems may not be
    skipped, or cannot."""
    bad = {problem.line for problem in problems}
    fit = [(position, row) for position, row in enumerate(rows, 1) if row.line not in bad]
    if problems and (not skip or not fit or header in bad):
        raise SheetRefused(problems)
    return fit


# Columns


def read_rows(
    sheet: Sheet, ports: Sequence[Port], explicit: Sequence[ColumnMapping] = ()
) -> SheetReading:
    """The inputs of each row, by the inputs (`ports`) of a technique's definition.

    An input in the `explicit` mapping takes no other column. Without `ports` (the definition names
    none) it has to map all columns, with their types.
    """
    problems = list(sheet.problems)
    mappings = _assign(sheet, ports, explicit, problems)
    used = {mapping.column for mapping in mappings}
    unmapped = tuple(name for name in sheet.columns if name not in used)
    problems = [one for one in problems if not (one.of_input and one.column in unmapped)]
    if not problems and not mappings:
        message = "no column is an input of the technique; use --map INPUT=COLUMN"
        problems.append(SheetProblem(sheet.header, "", message))
    elif not problems and not sheet.rows:
        problems.append(SheetProblem(sheet.header, "", "the sheet has no rows below its header"))
    reported = {port.id for port in ports if not any(one.input_id == port.id for one in mappings)}
    spoilt = {(problem.line, problem.column) for problem in problems}
    rows = []
    for row in sheet.rows:
        cells = [(one, value) for one in mappings for value in row.cells.get(one.column, ())]
        inputs = [_input(one, value) for one, value in cells]
        faults = check(ports, inputs) if mappings else []
        # Rows that name their own cells may each misspell a name.
        others = [] if sheet.header else [name for name in row.cells if name not in used]
        located = _located(faults, row, cells, mappings, reported, others)
        problems += [one for one in located if (one.line, one.column) not in spoilt]
        rows.append(InputRow(line=row.line, inputs=canonical(inputs)))
    return SheetReading(
        mapping=tuple(mappings),
        rows=tuple(rows),
        unmapped=unmapped,
        problems=tuple(sorted(problems)),
    )


def _row_tags(
    sheet: Sheet, columns: Mapping[str, str], tags: Tags
) -> tuple[dict[int, Tags], list[SheetProblem]]:
    """The tags of each row, by its line, and their problems: `tags`, and the cells that are not
    empty in `columns` (column by key)."""
    problems = [
        SheetProblem(sheet.header, column, _missing(sheet, " for tags"))
        for column in columns.values()
        if column not in sheet.columns
    ]
    found: dict[int, Tags] = {}
    for row in sheet.rows:
        cells = {key: row.cells.get(column) or () for key, column in columns.items()}
        own = {key: values[0].strip() for key, values in cells.items() if values}
        try:
            found[row.line] = check_tags(tags | own)
        except ValueError as error:
            problems.append(SheetProblem(row.line, "", str(error)))
    return found, problems


def _digests_by(technique_id: str, sheet: Sheet, mapping: Sequence[ColumnMapping]) -> list[str]:
    """The digest of each row by a complete mapping, unchecked."""
    return row_digests(technique_id, (_inputs_by(row, mapping) for row in sheet.rows))


def _inputs_by(row: SheetRow, mapping: Sequence[ColumnMapping]) -> list[Input]:
    cells = [(one, value) for one in mapping for value in row.cells.get(one.column, ())]
    return canonical(_input(one, value) for one, value in cells)


def _reread(
    sheet: Sheet, rows: Sequence[tuple[int, InputRow]], mapping: Sequence[ColumnMapping]
) -> list[tuple[int, InputRow]]:
    """Rows of a sheet by another mapping, unchecked."""
    of = sheet.rows
    return [
        (position, replace(row, inputs=_inputs_by(of[position - 1], mapping)))
        for position, row in rows
    ]


def _mapping_of(
    sheet: Sheet, now: Sequence[ColumnMapping], asked: Sequence[Sequence[Input]]
) -> list[ColumnMapping]:
    """The mapping of earlier rows with these inputs, if it was not stored.

    An input's column is the one that has most of its values; of several, today's. An input whose
    values are in no column is left out.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for one in (one for inputs in asked for one in inputs):
        values.setdefault((one["id"], one["type"]), set()).add(one["value"])
    found = []
    for (input_id, kind), wanted in sorted(values.items()):
        today = [one.column for one in now if one.input_id == input_id]
        candidates = [ColumnMapping(input_id, name, kind) for name in (*today, *sheet.columns)]
        shares = [len(wanted.intersection(_values(sheet, one))) for one in candidates]
        if max(shares) > 0:
            found.append(candidates[shares.index(max(shares))])
    return found


def _values(sheet: Sheet, mapping: ColumnMapping) -> set[str]:
    cells = (value for row in sheet.rows for value in row.cells.get(mapping.column, ()))
    return {_input(mapping, value)["value"] for value in cells}


def _missing(sheet: Sheet, use: str = "") -> str:
    named = ", ".join(sheet.columns) or "none"
    if sheet.header:
        return f"the sheet has no such column{use}; it has {named}"
    return f"no row has this field{use}; there are {named}"


def _assign(
    sheet: Sheet,
    ports: Sequence[Port],
    explicit: Sequence[ColumnMapping],
    problems: list[SheetProblem],
) -> list[ColumnMapping]:
    """The columns that are inputs, each with its type."""
    types = {port.id: port.type for port in ports}
    wanted: list[ColumnMapping] = []

    def report(column: str, message: str) -> None:
        problems.append(SheetProblem(sheet.header, column, message))

    for one in explicit:
        if ports and one.input_id not in types:
            has = ", ".join(types)
            report(one.column, f"the technique has no input {one.input_id!r}; it has {has}")
        elif one.column not in sheet.columns:
            report(one.column, _missing(sheet))
        else:
            wanted.append(replace(one, type=one.type or types.get(one.input_id)))
    named_ids = {one.input_id for one in explicit}
    for port in (port for port in ports if port.id not in named_ids):
        taken = {one.column for one in wanted}
        column = _column_of(port, [name for name in sheet.columns if name not in taken])
        if column is not None:
            wanted.append(ColumnMapping(port.id, column, port.type))
        elif not port.optional and sheet.columns:
            kind = f" ({port.type})" if port.type else ""
            advice = _advice(sheet, port)
            report("", f"there is no column for the input {port.id!r}{kind}; {advice}")
    for one in wanted:
        if one.column in sheet.repeated:
            report(one.column, "there are several columns of this name")
        elif not one.type:
            option = f"--map {one.input_id}:TYPE={one.column}"
            report(one.column, f"the technique's definition does not give its type: use {option}")
    return [one for one in wanted if one.type and one.column not in sheet.repeated]


_LINES_OF_TITLES: Final = 20
"""Lines below the first in which the header is looked for, for advice."""


def _advice(sheet: Sheet, port: Port) -> str:
    for delimiter, name in DELIMITERS.items():
        if len(sheet.columns) == 1 and delimiter in sheet.columns[0]:
            return f"if the cells are separated by {name}, use --delimiter {name}"
    for row in sheet.rows[:_LINES_OF_TITLES] if sheet.header else ():
        cells = [value.strip() for values in row.cells.values() for value in values]
        if _column_of(port, cells) is not None:
            return f"line {row.line} names it: delete the lines above"
    return f"use --map {port.id}=COLUMN, where COLUMN is one of {', '.join(sheet.columns)}"


def _column_of(port: Port, columns: Sequence[str]) -> str | None:
    """The column with the input's id or name; `None` if there is none, or several."""
    if port.id in columns:
        return port.id
    for name in (port.id, port.name):
        fitting = [column for column in columns if column and column.casefold() == name.casefold()]
        if fitting:
            return fitting[0] if len(set(fitting)) == 1 else None
    return None


def _input(mapping: ColumnMapping, value: str) -> Input:
    kind = mapping.type or ""
    # Line ends within a cell and blanks around a link do not count: a sheet that was only saved
    # again has the same inputs.
    value = value.strip() if kind in _LINKS else value.replace("\r\n", "\n")
    return {"id": mapping.input_id, "type": kind, "value": value}


def _located(
    faults: Iterable[FieldFault],
    row: SheetRow,
    cells: Sequence[tuple[ColumnMapping, Any]],
    mappings: Sequence[ColumnMapping],
    reported: set[str],
    others: Sequence[str],
) -> Iterator[SheetProblem]:
    """The faults of a row's inputs, by column, without inputs that have been `reported`. A missing
    input may be one of the row's `others`, misspelt."""
    for fault in faults:
        _, _, name = fault.field.partition("inputs.")
        position, dot, _ = name.partition(".")
        if dot and position.isdecimal() and int(position) < len(cells):
            yield SheetProblem(row.line, cells[int(position)][0].column, fault.message)
        elif name not in reported:
            column = next((one.column for one in mappings if one.input_id == name), "")
            message = f"is empty; the input {name!r} {fault.message}" if column else fault.message
            if (misspelt := _closest(column, others)) is not None:
                message = f"is no input: did you mean {column!r}, which {fault.message}?"
                column = misspelt
            yield SheetProblem(row.line, column, message)


def _closest(name: str, others: Sequence[str]) -> str | None:
    """The one of `others` that may be `name`, misspelt."""
    names = {other.casefold(): other for other in others}
    close = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.75)
    return names[close[0]] if close else None
