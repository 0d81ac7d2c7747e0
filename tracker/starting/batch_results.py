"""The results of a batch as CSV, the same from the command, the API and the page.

The carried columns of the sheet come first, with their names and in their order, then the result
of each row, its inputs and its outputs.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Final

from tracker.starting.batch_rows import RowState

RESULT_COLUMNS: Final = (
    *("row", "line", "key", "run_id", "status", "cost", "cost_final", "quoted_cost"),
    *("retry_advice", "error"),
)
BOM: Final = "\ufeff"
"""Lets Excel read CSV as UTF-8."""

_FORMULA: Final = re.compile(r"[=+\-@\t\r]")
_NUMBER: Final = re.compile(r"[+-]?\d[\d.,]*")


def csv_lines(
    rows: Sequence[RowState],
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    bom: bool = False,
) -> Iterator[str]:
    """The results of `rows` as lines of CSV, the header first; `columns` are the carried columns.

    There is a column for each input, and as many for outputs as the longest row has. A cell that a
    spreadsheet would take for a formula gets a `'` in front.
    """
    inputs = dict.fromkeys(one["id"] for row in rows for one in row.inputs or ())
    most = max((len(_links(row)) for row in rows), default=0)
    line = io.StringIO()
    writer = csv.writer(line, delimiter=delimiter, lineterminator="\n")

    def written(cells: Sequence[Any]) -> str:
        line.seek(0)
        line.truncate()
        writer.writerow([safe_cell(cell) for cell in cells])
        return line.getvalue()

    own = [*RESULT_COLUMNS, *(f"input.{name}" for name in inputs)]
    own += [f"output.{number}" for number in range(1, most + 1)]
    header = written([*carried_names(columns, own), *own])
    yield BOM + header if bom else header
    for row in rows:
        values, links = row.inputs or (), _links(row)
        yield written(
            [
                *(row.entry.carried.get(name, "") for name in columns),
                *_result(row),
                *("\n".join(v["value"] for v in values if v["id"] == name) for name in inputs),
                *links,
                *[""] * (most - len(links)),
            ]
        )


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


def safe_cell(value: Any) -> str:
    """A cell of CSV; text that a spreadsheet would take for a formula gets a `'` in front."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _result(row: RowState) -> list[Any]:
    """The cells of `RESULT_COLUMNS`."""
    run = None if row.record is None else row.record.run
    return [
        row.entry.position,
        row.entry.line,
        row.entry.key,
        None if row.start is None else row.start.run_id,
        row.status,
        None if run is None else run.charged_cost,
        row.record is not None and row.record.cost_final,
        None if run is None else run.quoted_cost,
        row.advice,
        row.why,
    ]


def _links(row: RowState) -> list[str]:
    outputs = None if row.record is None else row.record.run.outputs
    return [output.url for output in outputs or ()]
