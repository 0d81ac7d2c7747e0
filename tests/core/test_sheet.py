"""Sheets are read whole: every problem with its line, and no bytes that upset the reader."""

import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.starting.sheet import (
    Sheet,
    SheetProblem,
    SheetRefused,
    problem_lines,
    read_csv,
    read_jsonl,
    read_sheet,
    sheet_of_objects,
)


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
    assert sheet.columns == ("face", "prompt", "column 3")
    assert sheet.header == 1
    assert cells(sheet) == [
        (2, {"face": ("a",), "prompt": ("two\r\nlines",)}),
        (6, {"face": ('say "x"',), "column 3": ("note",)}),
    ]


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a;b\n1;2,3\n", ";"),
        ("a\tb\n1\t2,3\n", "\t"),
        ("a|b\n1|2,3\n", "|"),
        ('"a, or so";b\n1;"2,3"\n', ";"),
        ("sep=;\r\na;b\r\n1;2,3\r\n", ";"),
        ('a,b\n1,"2;3;4"\n', ","),
        ("a\n1\n", ","),
    ],
)
def test_the_delimiter_is_detected(text: str, delimiter: str) -> None:
    """The delimiter is the one that cuts all lines alike; another than the comma is reported."""
    sheet = read_csv(text.encode())
    assert sheet.problems == ()
    assert sheet.delimiter == delimiter
    assert ("delimiter" in sheet.detected) == (delimiter != ",")
    given = read_csv(text.removeprefix("sep=;\r\n").encode(), delimiter=delimiter)
    assert [row.cells for row in given.rows] == [row.cells for row in sheet.rows]
    assert given.detected == ""


@pytest.mark.parametrize(
    ("encoding", "detected"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", "encoding UTF-16"),
        ("utf-16-le", "encoding UTF-16"),
        ("cp1252", "encoding cp1252 (Windows), as in 'Café für 5 €'"),
    ],
)
def test_the_encoding_is_detected(encoding: str, detected: str) -> None:
    """Each encoding that Excel writes gives the same cells; another than UTF-8 is reported, with
    words to check."""
    sheet = read_csv("prompt,SKU,client,number\nCafé für 5 €,1\n".encode(encoding))
    assert cells(sheet) == [(2, {"prompt": ("Café für 5 €",), "SKU": ("1",)})]
    assert sheet.detected == detected
    assert read_csv("a\né\n".encode("cp850"), encoding="cp850").rows[0].cells == {"a": ("é",)}


def test_a_damaged_file_is_not_taken_for_another_encoding() -> None:
    """One character of UTF-8 or another script rules out cp1252, which would start paid runs with
    mangled texts; a wrong --encoding names the line."""
    for encoding, prompt in (("cp1251", "красная шапка"), ("cp1253", "κόκκινο")):
        foreign = read_csv(f"a\n{prompt}\n".encode(encoding))
        assert problems(foreign) == [
            (2, "a", "is not UTF-8: save the sheet as UTF-8, or use --encoding")
        ]
    damaged = read_csv("a\né\nü\n".encode() + b"\xff\n")
    assert [(one.line, one.column) for one in damaged.problems] == [(4, "a")]
    wrong = read_csv("a\nb\né\n".encode("cp1252"), encoding="utf-8")
    assert problems(wrong) == [(3, "", "is not utf-8: use another --encoding")]


def test_columns_of_one_name_are_told_apart() -> None:
    """The second gets a number, so that no cell is dropped; columns without title and cells are
    left out."""
    sheet = read_csv(b"SKU,,SKU,,SKU (2)\n1,,2,3,4\n")
    assert sheet.columns == ("SKU", "SKU (2)", "column 4", "SKU (2) (2)")
    assert list(sheet.rows[0].cells.values()) == [("1",), ("2",), ("3",), ("4",)]
    assert sheet.repeated == {"SKU"}


def test_each_cause_is_one_line() -> None:
    """402 lines with the same problem are one line, with their count and their numbers."""
    sheet = read_csv(b"a,b\n" + b"1;2,3,4,5\n" * 402, delimiter=",")
    assert problem_lines(sheet.problems) == [
        "402 lines: the line has more cells than the header, which has 2 (lines 2-403)"
    ]
    many = [SheetProblem(line, "a", "is empty") for line in range(2, 60, 3)]
    assert problem_lines([*many, SheetProblem(0, "", "c"), SheetProblem(3, "a", "x")]) == [
        "c",
        "20 lines, column 'a': is empty (lines 2, 5, 8, 11, 14, 17, 20, 23, 26, 29 and 10 more)",
        "line 3, column 'a': x",
    ]


def test_every_problem_of_a_csv_is_named() -> None:
    """Too many cells, bytes that are no UTF-8 and an open quote, each with its line."""
    sheet = read_csv("a,b\n1,2,3\né,".encode() + b'\xff\n5,6,,\n7,\0\n8,"open\n9,10\n')
    assert problems(sheet) == [
        (2, "", "the line has more cells than the header, which has 2"),
        (3, "b", "is not UTF-8: save the sheet as UTF-8, or use --encoding"),
        (5, "b", "contains a NUL character"),
        (6, "", "the line is not CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the sheet is empty: its first line names the columns"),
        (b"\n , \n", "the sheet is empty: its first line names the columns"),
        (b"PK\x03\x04\x14\x00", "the file is a workbook, not text: leave out --format"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1",
            "the file is an old Excel workbook (.xls) or has a password: save it as .xlsx",
        ),
        (b"<html><table>", "the file is HTML or XML: open it in Excel and save it as .xlsx"),
    ],
)
def test_what_is_no_sheet_is_said(data: bytes, said: str) -> None:
    """An empty file and each kind of workbook are reported as what they are."""
    assert [problem.message for problem in read_csv(data).problems] == [said]


def test_json_lines_are_read() -> None:
    """Each line is an object; what is null, empty or blank is not there; a list is several."""
    sheet = read_jsonl(
        b'\xef\xbb\xbf{"face": "a", "prompt": "two\\nlines"}\r\n\n'
        b'{"face": ["b", "c"], "prompt": null, "more": " ", "none": []}\n'
        b'{"face": 17, "prompt": [0.10, true]}\n'
    )
    assert sheet.columns == ("face", "prompt", "more", "none")
    assert sheet.header == 0
    assert cells(sheet) == [
        (1, {"face": ("a",), "prompt": ("two\nlines",)}),
        (3, {"face": ("b", "c")}),
        (4, {"face": ("17",), "prompt": ("0.10", "true")}),
    ]


def test_every_problem_of_json_lines_is_named() -> None:
    """Values that are no text or number, names that stand twice, and lines that are no object."""
    sheet = read_jsonl(
        b'{"a": 1, "b": true, "c": {"d": "e"}, "f": [["g"]]}\n'
        b'{"a": "x", "a": "y"}\n["a"]\n{"a": \n{"a": "\\ud800"}\n{"a": "\\u0000"}\n'
        + b'{"a": '
        + b"[" * 100_000
        + b"\n"
    )
    assert problems(sheet) == [
        (1, "c", "must be text, not an object"),
        (1, "f", "must be text, not a list in a list"),
        (2, "", "'a' occurs twice in one object"),
        (3, "", "the line is not a JSON object"),
        (4, "", "the line is not JSON: Expecting value"),
        (5, "a", "holds half a character (a lone surrogate)"),
        (6, "a", "contains a NUL character"),
        (7, "", "the line is nested too deeply"),
    ]


def test_a_repeated_header_is_no_row() -> None:
    """Where sheets were put one below the other, no run is paid for the second header."""
    sheet = read_csv(b"sku,prompt\n1,a\nsku, prompt ,\n2,prompt\n")
    assert problems(sheet) == [(3, "", "the line repeats the header: delete it")]


def test_rows_of_a_program_are_a_sheet() -> None:
    """Objects become cells as the lines of a file do; what cannot be kept exactly is a problem."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    rows: list[dict[str, Any]] = [{"a": "x", "b": [1, 0.5], "c": {"d": None}}]
    rows += [{"a": 2.0**53}, {"a": [float("nan")]}, {"b": deep}]
    sheet = sheet_of_objects(enumerate(rows, 1))
    assert sheet.rows[0].cells == {"a": ("x",), "b": ("1", "0.5"), "c": ('{"d": null}',)}
    assert problems(sheet) == [
        (1, "c", "must be text, not an object"),
        (2, "a", "is no number that can be kept exactly: write it as a text"),
        (3, "a", "is no number that can be kept exactly: write it as a text"),
        (4, "b", "must be text, not a list in a list"),
        (4, "b", "is nested too deeply"),
    ]
    wide = ((n, {f"{n} {field}": "x" for field in range(20)}) for n in range(1, 99))
    assert problems(sheet_of_objects(wide)) == [
        (0, "", "the rows have 1960 different fields; 1000 are possible")
    ]


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_upset_the_reader(data: bytes) -> None:
    """Whatever a file holds is a sheet, or a sheet with problems, never an error."""
    for sheet in (read_sheet(data), read_csv(data), read_jsonl(data)):
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
    sheet = read_csv(text.getvalue().encode(), delimiter=",")
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
