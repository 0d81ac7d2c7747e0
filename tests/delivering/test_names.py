"""Names of files: harmless, apart from each other, with the right ending."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker import views
from tracker.core.errors import InvalidRequest
from tracker.core.run import Output
from tracker.core.starts import Port
from tracker.delivering.fetch import file_ending
from tracker.delivering.saving import (
    LONGEST_RUN,
    file_stem,
    output_names,
    row_names,
    row_numbers,
)
from tracker.flora.parse import ports
from tracker.starting.rows import RowState
from tracker.store.queries.batches import BatchEntry, BatchRow

HOSTILE = ("..", "../../etc/passwd", "/etc/passwd", "a\0b", "", ".", "-rf", "x" * 5000, "a b", "ü")


@given(st.lists(st.text(max_size=300) | st.sampled_from(HOSTILE), min_size=1, max_size=4))
def test_no_name_leaves_its_folder(texts: list[str]) -> None:
    """Whatever the identifiers hold, the name is one harmless name of a bearable length."""
    name = f"{file_stem(*texts)}.part.json"
    assert Path("/folder", name).resolve().parent == Path("/folder")
    assert len(name.encode()) <= 255
    assert name.isascii()
    assert name.isprintable()
    assert not name.startswith((".", "-"))


@given(
    st.lists(st.text(max_size=100), min_size=1, max_size=3),
    st.lists(st.text(max_size=100), min_size=1, max_size=3),
)
def test_two_identifiers_have_two_names(one: list[str], other: list[str]) -> None:
    """What is replaced or cut off does not make two files one."""
    assert (file_stem(*one) == file_stem(*other)) == (one == other)


def test_ordinary_names_stay_readable() -> None:
    """FLORA's own identifiers are in the name as they are."""
    assert file_stem("007", "run_3bb7c905", "image_1") == "007.run_3bb7c905.image_1"


BATCH = BatchRow(
    batch_id="bat_1",
    workspace_id="ws",
    technique_id="tech_1",
    name="products.xlsx",
    created_at=datetime(2026, 7, 1, tzinfo=UTC),
    mapping=[["prompt", "Text", "text"]],
    columns=["SKU"],
)


def rows(*values: str) -> list[RowState]:
    """Rows with these cells in the column SKU, which are their prompts, too."""
    return [
        RowState(
            entry=BatchEntry(
                position=position,
                line=position + 1,
                digest=str(position),
                carried={"SKU": value} if value else {},
                inputs=[{"id": "prompt", "type": "text", "value": value}],
            )
        )
        for position, value in enumerate(values, 1)
    ]


def test_a_row_is_named_by_its_cell() -> None:
    """Readable in any script; a cell that is empty or repeated, in any case, gets the row's number;
    an input can name files, too."""
    found = rows("SKU-0001", "blue hat/17", "", "Größe 5", "x", "X", "../..", "帽子", "nul.a")
    names = ["SKU-0001", "blue_hat_17", "003", "Größe_5", "x_005", "X_006", "007", "帽子", "nul_a"]
    assert row_names(BATCH, found, "SKU") == names
    assert row_names(BATCH, found, "text") == names
    assert row_numbers(found)[:2] == ["001", "002"]
    assert row_numbers(rows(*map(str, range(1000))))[0] == "0001"


def test_an_unknown_column_names_no_files() -> None:
    """The error names the columns that there are."""
    with pytest.raises(InvalidRequest, match="no column 'sku2' to name files by; it has SKU, Text"):
        row_names(BATCH, [], "sku2")


@given(st.lists(st.text(max_size=150) | st.sampled_from([*HOSTILE, "a", "A", "a_001"]), max_size=9))
def test_no_two_rows_share_a_name(values: list[str]) -> None:
    """Whatever the cells hold, names differ in any case, stay in the folder and are short."""
    names = row_names(BATCH, rows(*values), "SKU")
    assert len({name.casefold() for name in names}) == len(values)
    for name in names:
        file = f"{name}_{'r' * LONGEST_RUN}_{'x' * 100}_1_abc123.part.json"
        assert Path("/folder", file).resolve().parent == Path("/folder")
        assert len(file.encode()) <= 255
        assert not name.startswith((".", "-"))


def test_outputs_are_named_and_numbered_in_order() -> None:
    """By the technique's definition; where that does not fit, by their type; ten sort in order."""
    images = [Output(f"o{n}", "imageUrl", "https://a") for n in range(2)]
    defined = [Port(id=f"icon_{n}", type="imageUrl") for n in (1, 2)]
    assert output_names(images, defined) == ["icon_1", "icon_2"]
    assert output_names(images, defined[:1]) == ["image_1", "image_2"]
    named = [Port(id="40039bc", name="Front view"), Port(id="7", name="8")]
    assert output_names(images, named) == ["Front_view_1", "image_2"]
    assert output_names([Output("o", "hologram", "x")], ()) == ["output_1"]
    assert output_names(images * 5, ())[:2] == ["image_01", "image_02"]


def test_pages_name_an_output_as_files_do() -> None:
    """Both take the names of a definition that leaves out a type, and of none without ids."""
    images = [Output(f"o{n}", "imageUrl", "https://a") for n in range(2)]
    definition = [{"id": "front", "name": "Front view"}, {"id": "back", "type": "imageUrl"}]
    assert views.output_names(images, definition) == ["Front view", "back"]
    assert output_names(images, ports(definition)) == ["front_1", "back_2"]
    nameless: list[dict[str, Any]] = [{"type": "imageUrl"}, {"type": "imageUrl"}]
    assert views.output_names(images, nameless) == ["Image 1", "Image 2"]
    assert output_names(images, ports(nameless)) == ["image_1", "image_2"]


@pytest.mark.parametrize(
    ("content_type", "link", "output_type", "expected"),
    [
        ("image/jpeg", "https://x/a.png", "imageUrl", ".jpg"),
        ("Image/PNG; charset=binary", "https://x/a", "imageUrl", ".png"),
        ("video/quicktime", "https://x/a.mp4", "videoUrl", ".mov"),
        ("application/octet-stream", "https://x/a.WEBM?sig=1", "videoUrl", ".webm"),
        (None, "https://x/a%2Ejpeg", "imageUrl", ".jpeg"),
        (None, "https://x/a", "audioUrl", ".wav"),
        ("image/../../../etc", "https://x/a", "imageUrl", ".png"),
        (None, "https://x/a.exe/../b.p/ng", "documentUrl", ".pdf"),
        (None, "https://x/.htaccess", "imageUrl", ".png"),
        (None, "https://x/a.part", "imageUrl", ".png"),  # so a file is called that is not whole
        ("", "https://[broken", "something new", ".bin"),
        # What a double click might run.
        ("text/html; charset=utf-8", "https://x/a.png", "imageUrl", ".bin"),
        ("application/x-sh", "https://x/a", "documentUrl", ".bin"),
        *((None, f"https://x/a.{one}", "imageUrl", ".bin") for one in ("scr", "BAT", "sh", "html")),
        *((None, f"https://x/a.{one}", "videoUrl", ".bin") for one in ("exe", "ps1", "lnk", "jar")),
    ],
)
def test_endings_tell_what_is_inside(
    content_type: str | None, link: str, output_type: str, expected: str
) -> None:
    """The header decides, else the link, else the type of the output."""
    assert file_ending(content_type, link, output_type) == expected
