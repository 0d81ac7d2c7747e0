"""Sheets are read whole: every problem with its line, and no bytes that upset the reader."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.starting.sheet import Sheet, SheetProblem, SheetRefused, read_csv, read_jsonl


def cells(sheet: Sheet) -> list[tuple[int, dict[str, tuple[str, ...]]]]:
    assert sheet.problems == ()
    return [(row.line, row.cells) for row in sheet.rows]


def problems(sheet: Sheet) -> list[tuple[int, str, str]]:
    return [(one.line, one.column, one.message) for one in sheet.problems]


def test_csv_is_read_with_the_line_of_each_row() -> None:
    """A byte order mark, blank lines, quoted line ends and Windows line ends are no trouble."""
    sheet = read_csv(
        b'\xef\xbb\xbf face ,prompt,\r\na,"two\r\nlines",\r\n\r\n , ,\r\n"say ""x""",,note\r\n'
    )
    assert sheet.columns == ("face", "prompt", "")
    assert sheet.header == 1
    assert cells(sheet) == [
        (2, {"face": ("a",), "prompt": ("two\r\nlines",)}),
        (6, {"face": ('say "x"',), "": ("note",)}),
    ]


@pytest.mark.parametrize(("delimiter", "text"), [(";", b"a;b\n1;2,3\n"), ("\t", b"a\tb\n1\t2,3\n")])
def test_csv_may_have_other_delimiters(delimiter: str, text: bytes) -> None:
    """What parts the cells is told."""
    assert cells(read_csv(text, delimiter=delimiter)) == [(2, {"a": ("1",), "b": ("2,3",)})]


def test_every_problem_of_a_csv_is_named() -> None:
    """Too many cells, bytes that are no UTF-8 and an open quote, each with its line."""
    sheet = read_csv(b'a,b\n1,2,3\n4,\xff\n5,6,,\n7,\0\n8,"open\n9,10\n')
    assert problems(sheet) == [
        (2, "", "the line has 3 cells, the header only 2"),
        (3, "b", "is not UTF-8: save the sheet as UTF-8"),
        (5, "b", "contains a NUL character"),
        (6, "", "the line is not CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the sheet is empty: its first line names the columns"),
        (b"\n , \n", "the sheet is empty: its first line names the columns"),
        (b"PK\x03\x04\x14\x00", "the file is a workbook, not text: export it as CSV in UTF-8"),
        ("a,b\n".encode("utf-16"), "the file is UTF-16: save it as UTF-8"),
    ],
)
def test_what_is_no_sheet_is_said(data: bytes, said: str) -> None:
    """An empty file, a workbook and UTF-16 are each told as what they are."""
    assert [problem.message for problem in read_csv(data).problems] == [said]


def test_json_lines_are_read() -> None:
    """Each line is an object; what is null, empty or blank is not there; a list is several."""
    sheet = read_jsonl(
        b'\xef\xbb\xbf{"face": "a", "prompt": "two\\nlines"}\r\n\n'
        b'{"face": ["b", "c"], "prompt": null, "more": " ", "none": []}\n'
    )
    assert sheet.columns == ("face", "prompt", "more", "none")
    assert sheet.header == 0
    assert cells(sheet) == [
        (1, {"face": ("a",), "prompt": ("two\nlines",)}),
        (3, {"face": ("b", "c")}),
    ]


def test_every_problem_of_json_lines_is_named() -> None:
    """Values that are no text, names that stand twice, and lines that are no object."""
    sheet = read_jsonl(
        b'{"a": 1, "b": true, "c": {"d": "e"}, "f": [["g"]]}\n'
        b'{"a": "x", "a": "y"}\n["a"]\n{"a": \n{"a": "\\ud800"}\n{"a": "\\u0000"}\n'
        + b'{"a": '
        + b"[" * 100_000
        + b"\n"
    )
    assert problems(sheet) == [
        (1, "a", "must be text, not a number"),
        (1, "b", "must be text, not true or false"),
        (1, "c", "must be text, not an object"),
        (1, "f", "must be text, not a list in a list"),
        (2, "", "'a' occurs twice in one object"),
        (3, "", "the line is not a JSON object"),
        (4, "", "the line is not JSON: Expecting value"),
        (5, "a", "holds half a character (a lone surrogate)"),
        (6, "a", "contains a NUL character"),
        (7, "", "the line is nested too deeply"),
    ]


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_upset_the_reader(data: bytes) -> None:
    """Whatever a file holds is a sheet, or a sheet with problems, never an error."""
    for sheet in (read_csv(data), read_jsonl(data)):
        assert all(problem.line >= 0 and problem.message for problem in sheet.problems)
        assert all(row.line >= 1 for row in sheet.rows)


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))] * 2)
    )
)
def test_what_was_written_is_read(rows: list[tuple[str, str]]) -> None:
    """What a program writes as CSV comes back as it was, cell by cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *rows])
    sheet = read_csv(text.getvalue().encode())
    assert sheet.problems == ()
    expected = [
        {name: (value,) for name, value in zip("ab", row, strict=True) if value.strip()}
        for row in rows
    ]
    assert [row.cells for row in sheet.rows] == [one for one in expected if one]


def test_a_refusal_names_all_by_line() -> None:
    """The problems of a sheet are in the order of its lines; the message counts them."""
    refused = SheetRefused(
        [SheetProblem(3, "", "b"), SheetProblem(2, "face", "a"), SheetProblem(0, "", "c")]
    )
    assert [str(one) for one in refused.problems] == [
        "c",
        "line 2, column 'face': a",
        "line 3: b",
    ]
    assert str(refused) == "3 problems in the sheet; nothing was started"
    assert str(SheetRefused([SheetProblem(3, "", "b")])).startswith("1 problem in")
