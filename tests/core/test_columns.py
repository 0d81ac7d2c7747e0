"""Columns become inputs by their names or as they are told, and all that does not fit is named."""

import pytest

from tracker.core.starts import Port
from tracker.starting.plan import ColumnMapping, SheetReading, read_rows
from tracker.starting.sheet import read_csv, read_jsonl

FACE = Port(id="face", type="imageUrl", name="Face photo")
PROMPT = Port(id="prompt", type="text")
STYLE = Port(id="style", type="text", optional=True)
LINK = "https://example.com/a.png"


def reading(text: str, *ports: Port, given: list[ColumnMapping] | None = None) -> SheetReading:
    return read_rows(read_csv(text.encode()), ports, given or [])


def values(found: SheetReading) -> list[dict[str, str]]:
    assert found.problems == ()
    return [{one["id"]: one["value"] for one in row.inputs} for row in found.rows]


def said(found: SheetReading) -> list[str]:
    return [str(problem) for problem in found.problems]


def test_columns_are_inputs_by_id_or_name() -> None:
    """By id, in whatever case, or by the input's name; the rest is told as unmapped."""
    found = reading(f"note,FACE PHOTO,Prompt\nx,{LINK},tools\n", PROMPT, FACE, STYLE)
    assert found.unmapped == ("note",)
    assert [(row.line, row.inputs) for row in found.rows] == [
        (
            2,
            [
                {"id": "face", "type": "imageUrl", "value": LINK},
                {"id": "prompt", "type": "text", "value": "tools"},
            ],
        )
    ]


def test_a_mapping_goes_before_names() -> None:
    """What `--map` names is taken even where another column bears the input's id."""
    given = [ColumnMapping("prompt", "words")]
    found = reading("prompt,words\nold,new\n", PROMPT, given=given)
    assert values(found) == [{"prompt": "new"}]
    assert found.unmapped == ("prompt",)


def test_a_technique_without_a_definition_needs_types() -> None:
    """Where FLORA names no inputs, each is mapped with its type, and nothing else is checked."""
    given = [ColumnMapping("face", "link", "imageUrl"), ColumnMapping("any", "words", "text")]
    found = reading("link,words\n ftp://x ,hi\n", given=given)
    assert [row.inputs for row in found.rows] == [
        [
            {"id": "any", "type": "text", "value": "hi"},
            {"id": "face", "type": "imageUrl", "value": "ftp://x"},
        ]
    ]
    assert said(reading("link\nx\n", given=[ColumnMapping("face", "link")])) == [
        "line 1, column 'link': the technique's definition does not give its type: "
        "use --map face:TYPE=link"
    ]
    assert said(reading("link\nx\n")) == [
        "line 1: no column is an input of the technique; use --map INPUT=COLUMN"
    ]


def test_several_columns_or_values_for_an_input_that_takes_them() -> None:
    """An input that takes several values has them from several columns or a JSON list, in order."""
    assets = Port(id="assets", type="imageUrl", several=True)
    given = [ColumnMapping("assets", "front"), ColumnMapping("assets", "back")]
    found = reading(f"back,front\n{LINK}?2,{LINK}?1\n", assets, given=given)
    expected = [{"id": "assets", "type": "imageUrl", "value": f"{LINK}?{n}"} for n in (1, 2)]
    assert [row.inputs for row in found.rows] == [expected]
    line = f'{{"assets": ["{LINK}?1", "{LINK}?2"]}}'.encode()
    assert [row.inputs for row in read_rows(read_jsonl(line), [assets]).rows] == [expected]
    assert said(read_rows(read_jsonl(line), [Port(id="assets", type="imageUrl")])) == [
        "line 1, column 'assets': assets takes one value only"
    ]


def test_every_row_that_does_not_fit_is_named() -> None:
    """Empty cells and wrong links, each by line and column; what may be empty is left out."""
    found = reading(
        f"face,prompt,style\n{LINK},a,\nftp://x,b,\n,,x\n{LINK},,y\n", FACE, PROMPT, STYLE
    )
    assert said(found) == [
        "line 3, column 'face': face must be an https link",
        "line 4, column 'face': is empty; the input 'face' is required (imageUrl)",
        "line 4, column 'prompt': is empty; the input 'prompt' is required (text)",
        "line 5, column 'prompt': is empty; the input 'prompt' is required (text)",
    ]


def test_a_misspelt_field_of_a_row_is_named() -> None:
    """With the input that it is close to; a row without any such field has an empty input."""
    rows = b'{"prompt": "a", "sku": 1}\n{"promt": "b", "sku": 2}\n{"PROMPT": "c"}\n{"sku": 3}'
    meant = "is no input: did you mean 'prompt', which is required (text)?"
    assert said(read_rows(read_jsonl(rows), [PROMPT])) == [
        f"line 2, column 'promt': {meant}",
        f"line 3, column 'PROMPT': {meant}",
        "line 4, column 'prompt': is empty; the input 'prompt' is required (text)",
    ]


def test_a_missing_column_is_named_once() -> None:
    """Not once for each row, and with what to do; what may be left out is not missed."""
    assert said(reading("a,b\n1,2\n3,4\n", FACE, STYLE)) == [
        "line 1: there is no column for the input 'face' (imageUrl); use "
        "--map face=COLUMN, where COLUMN is one of a, b"
    ]
    assert said(read_rows(read_csv(b"a;face\n1;x\n", delimiter=","), [FACE])) == [
        "line 1: there is no column for the input 'face' (imageUrl); "
        "if the cells are separated by ';', use --delimiter ';'"
    ]


@pytest.mark.parametrize("title", ["Products 2026", "Products 2026,,", "Products,2026,"])
def test_a_title_above_the_names_is_pointed_out(title: str) -> None:
    """No column of such a sheet is the right one for `--map`."""
    found = reading(f"{title}\nSKU,Face photo,prompt\n1,{LINK},a\n", FACE, PROMPT)
    assert said(found)[:2] == [
        f"line 1: there is no column for the input {name}; line 2 names it: delete the lines above"
        for name in ("'face' (imageUrl)", "'prompt' (text)")
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ColumnMapping("fase", "b"),
            "column 'b': the technique has no input 'fase'; it has prompt",
        ),
        (
            ColumnMapping("prompt", "c"),
            "column 'c': the sheet has no such column; it has prompt, b, b (2)",
        ),
        (ColumnMapping("prompt", "b"), "column 'b': there are several columns of this name"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(given: ColumnMapping, expected: str) -> None:
    """An unknown input, an unknown column, and a name that two columns bear."""
    found = reading("prompt,b,b\nx,y,z\n", PROMPT, given=[given])
    assert said(found) == [f"line 1, {expected}"]


def test_columns_that_both_fit_are_not_guessed() -> None:
    """Where two columns would do, none is taken."""
    found = reading("PROMPT,Prompt\nx,y\n", PROMPT)
    assert len(found.problems) == 1
    assert "no column for the input 'prompt'" in said(found)[0]


def test_a_cell_that_cannot_be_read_is_named_once() -> None:
    """What is wrong with a cell as such is not followed by complaints about its input."""
    sheet = read_jsonl(b'{"prompt": {}, "note": {}}\n{"prompt": "ok"}\n')
    assert said(read_rows(sheet, [PROMPT])) == [
        "line 1, column 'prompt': must be text, not an object"
    ]


def test_a_sheet_saved_again_asks_for_the_same() -> None:
    """How lines end within a cell and blanks around a link do not make another row."""
    one = reading(f'face,prompt\n{LINK},"a\nb"\n', FACE, PROMPT)
    two = reading(f'face,prompt\r\n {LINK} ,"a\r\nb"\r\n', FACE, PROMPT)
    assert values(one) == values(two) == [{"face": LINK, "prompt": "a\nb"}]


def test_a_sheet_without_rows_is_a_problem() -> None:
    """A header alone starts nothing, and says so."""
    assert said(reading("prompt\n", PROMPT)) == ["line 1: the sheet has no rows below its header"]
