"""Names of files: harmless, apart from each other, with the right ending."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.delivering.downloads import file_stem
from tracker.delivering.fetch import file_ending

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
