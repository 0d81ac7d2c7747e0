"""Columns of a sheet become inputs of a technique; the other columns are carried.

A column is the input whose id, or else name, it bears, in any case; an explicit mapping comes
first. Nothing is guessed if two columns match.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tracker.core.errors import FieldFault
from tracker.core.starts import Input, Port, Tags, canonical, check, check_tags
from tracker.starting.sheets.sheet import DELIMITERS, Sheet, SheetProblem, SheetRow

_LINKS: Final = ("imageUrl", "videoUrl")


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """One column for one input. `type` is `None` if the technique's definition gives it."""

    input_id: str
    column: str
    type: str | None = None


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
        located = _located(faults, row, cells, mappings, reported)
        problems += [one for one in located if (one.line, one.column) not in spoilt]
        rows.append(InputRow(line=row.line, inputs=canonical(inputs)))
    return SheetReading(
        mapping=tuple(mappings),
        rows=tuple(rows),
        unmapped=unmapped,
        problems=tuple(sorted(problems)),
    )


def row_tags(
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


def rows_by(sheet: Sheet, mapping: Sequence[ColumnMapping]) -> list[list[Input]]:
    """The inputs of each row by a complete mapping, unchecked."""
    return [
        canonical(_input(one, value) for one in mapping for value in row.cells.get(one.column, ()))
        for row in sheet.rows
    ]


def mapping_of(
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
    by_id = {port.id: port for port in ports}
    wanted: list[ColumnMapping] = []

    def report(column: str, message: str) -> None:
        problems.append(SheetProblem(sheet.header, column, message))

    for one in explicit:
        if ports and one.input_id not in by_id:
            has = ", ".join(by_id)
            report(one.column, f"the technique has no input {one.input_id!r}; it has {has}")
        elif one.column not in sheet.columns:
            report(one.column, _missing(sheet))
        else:
            wanted.append(one)
    named_ids = {one.input_id for one in explicit}
    for port in (port for port in ports if port.id not in named_ids):
        taken = {one.column for one in wanted}
        column = _column_of(port, [name for name in sheet.columns if name not in taken])
        if column is not None:
            wanted.append(ColumnMapping(port.id, column))
        elif not port.optional and sheet.columns:
            kind = f" ({port.type})" if port.type else ""
            advice = _advice(sheet, port)
            report("", f"there is no column for the input {port.id!r}{kind}; {advice}")
    mappings = []
    for one in wanted:
        kind = one.type or (by_id[one.input_id].type if one.input_id in by_id else "")
        if one.column in sheet.repeated:
            report(one.column, "there are several columns of this name")
        elif not kind:
            option = f"--map {one.input_id}:TYPE={one.column}"
            report(one.column, f"the technique's definition does not give its type: use {option}")
        else:
            mappings.append(replace(one, type=kind))
    return mappings


def _advice(sheet: Sheet, port: Port) -> str:
    for delimiter, name in DELIMITERS.items():
        if len(sheet.columns) == 1 and delimiter in sheet.columns[0]:
            return f"if the cells are separated by {name}, use --delimiter {name}"
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
) -> Iterator[SheetProblem]:
    """The faults of a row's inputs, by column, without inputs that have been `reported`."""
    for fault in faults:
        _, _, name = fault.field.partition("inputs.")
        position, dot, _ = name.partition(".")
        if dot and position.isdecimal() and int(position) < len(cells):
            yield SheetProblem(row.line, cells[int(position)][0].column, fault.message)
        elif name not in reported:
            column = next((one.column for one in mappings if one.input_id == name), "")
            message = f"is empty; the input {name!r} {fault.message}" if column else fault.message
            yield SheetProblem(row.line, column, message)
