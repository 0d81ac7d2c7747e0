"""Plans: what a batch would start now, by its sheet or as it is stored, at no cost."""

import asyncio
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from tracker.core.errors import DefinitionChanged, InvalidRequest, TrackerError
from tracker.core.starts import Tags, batch_id, obstacle, row_digests
from tracker.flora.parse import ports
from tracker.starting.batches.rows import (
    BatchPlan,
    Retry,
    RowState,
    kept_rows,
    run_number_of,
    states_of,
)
from tracker.starting.catalogue import Catalogue
from tracker.starting.sheets.columns import (
    ColumnMapping,
    InputRow,
    SheetReading,
    mapping_of,
    read_rows,
    row_tags,
    rows_by,
)
from tracker.starting.sheets.sheet import Sheet, SheetProblem, SheetRefused, SheetRow
from tracker.store.queries import sheet_rows
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.workspaces import Service, Workspace


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
        changed (unless `accept_changes`), and what reading FLORA raises.
        """
        workspace = await self.workspaces.pick(workspace_id)
        workspace_id = await self.workspaces.id_of(workspace)
        definition, price_error = await self.catalogue.priced(workspace, technique)
        needed = ports(definition.inputs)
        if (reason := obstacle(needed)) is not None:
            raise InvalidRequest(f"{technique} cannot be started: {reason}")
        # In a thread: many rows would hold up what else the process does.
        reading = await asyncio.to_thread(read_rows, sheet, needed, explicit)
        tagged, wrong = row_tags(sheet, tag_columns or {}, tags or {})
        problems = sorted([*reading.problems, *wrong])
        rows = _fit_rows(reading.rows, problems, skip=skip_bad_rows, header=sheet.header)
        inputs = [row.inputs for _, row in rows]
        digests = await asyncio.to_thread(row_digests, definition.technique_id, inputs)
        latest = await sheet_rows.latest_run_numbers(self.database, workspace_id, digests)
        if not accept_changes:
            await self._check_mapping(workspace_id, definition.technique_id, sheet, reading, latest)
        columns = [name for name in reading.unmapped if name]
        carried = frozenset(columns)
        entries = [
            BatchEntry(
                position=position,
                line=row.line,
                digest=digest,
                run_number=run_number_of(latest.get(digest), again=again),
                inputs=row.inputs,
                tags=tagged[row.line],
                carried=_carried(sheet.rows[position - 1], carried),
            )
            for (position, row), digest in zip(rows, digests, strict=True)
        ]
        planned = await self._retried(workspace_id, entries, retry)
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
            created_at=self.clock(),
            mapping=[[one.input_id, one.column, one.type or ""] for one in reading.mapping],
            source=source,
            columns=columns,
        )
        plan = BatchPlan(
            batch=batch,
            technique=definition,
            rows=planned,
            unmapped=[one for one in reading.unmapped if one not in (tag_columns or {}).values()],
            price_error=price_error,
        )
        return plan, problems

    async def stored_plan(
        self, batch: BatchRow, *, retry: Retry | None = None, wait: bool = True
    ) -> BatchPlan:
        """What a stored batch would do now, without its sheet.

        `retry` starts failed rows again; `wait` keeps the wait that was advised for retries which
        are stored and not started. Rows that a version before 0015 stored and never started are
        left out, because only their sheet has their inputs. Raises what reading FLORA raises, and
        `TrackerError` if the workspace is not configured.
        """
        workspace = await self.workspace_of(batch)
        definition, price_error = await self.catalogue.priced(workspace, batch.technique_id)
        entries = []
        for row in await kept_rows(self.database, batch):
            entry, start = row.entry, row.start
            if start is not None and (entry.inputs is None or not start.is_fresh):
                entry = replace(entry, inputs=start.inputs, tags=start.tags or {})
            if entry.inputs is not None:
                entries.append(entry)
        rows = await self._retried(batch.workspace_id, entries, retry, wait=wait)
        return BatchPlan(batch=batch, technique=definition, rows=rows, price_error=price_error)

    async def workspace_of(self, batch: BatchRow) -> Workspace:
        """The workspace of a stored batch. Raises `TrackerError` if it is not configured here."""
        found = await self.workspaces.with_id(batch.workspace_id)
        if found is None:
            raise TrackerError(f"workspace {batch.workspace_id} is not configured here")
        return found

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
            replace(state, not_before=row.not_before)
            for state, row in zip(states, retried, strict=True)
        ]

    async def _check_mapping(
        self,
        workspace_id: str,
        technique_id: str,
        sheet: Sheet,
        reading: SheetReading,
        latest: Container[str],
    ) -> None:
        """Raise `DefinitionChanged` if rows that were started with another mapping of columns would
        start anew with this one."""
        now = {(one.input_id, one.column, one.type or "") for one in reading.mapping}
        digests = row_digests(technique_id, [row.inputs for row in reading.rows])
        if all(digest in latest for digest in digests):
            return
        mappings = await sheet_rows.mappings(self.database, workspace_id, technique_id)
        # Batches of versions without mappings: the inputs of their rows show it.
        asked = await sheet_rows.asked_without_mapping(self.database, workspace_id, technique_id)
        for inputs in asked:
            derived = mapping_of(sheet, reading.mapping, inputs)
            mappings.append(tuple((one.input_id, one.column, one.type or "") for one in derived))
        for before in mappings:
            if set(before) == now or any(column not in sheet.columns for _, column, _ in before):
                continue
            rows = rows_by(sheet, [ColumnMapping(*one) for one in before])
            old = row_digests(technique_id, rows)
            known = await sheet_rows.latest_run_numbers(self.database, workspace_id, old)
            anew = [
                row.line
                for row, was, is_now in zip(reading.rows, old, digests, strict=True)
                if was in known and is_now not in latest
            ]
            if anew:
                raise DefinitionChanged(
                    new=sorted(now - set(before)), gone=sorted(set(before) - now), lines=anew
                )


def _carried(row: SheetRow, columns: Container[str]) -> dict[str, str]:
    """The cells of a row that are no input, by column."""
    return {name: ", ".join(values) for name, values in row.cells.items() if name in columns}


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
