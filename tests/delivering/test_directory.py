"""The folder and its manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tracker.delivering.files import (
    MANIFEST,
    DownloadDirectory,
    DownloadDirectoryError,
    ManifestEntry,
    digest_of,
)


def entry(file: str = "run_1.a.png", size: int = 3, **other: Any) -> ManifestEntry:
    given: dict[str, Any] = {
        "file": file,
        "row": None,
        "run_id": "run_1",
        "position": 0,
        "output_id": "a",
        "type": "imageUrl",
        "size": size,
        "sha256": "00",
        "content_type": "image/png",
        "at": "2026-07-01T12:00:00Z",
    }
    return ManifestEntry(**(given | other))


def test_what_is_there_whole_is_found_again(tmp_path: Path) -> None:
    """A line and a file of its size are a file; either alone is not."""
    one = entry()
    with DownloadDirectory(tmp_path / "new" / "folder") as directory:
        assert directory.find(one.key) is None
        (directory.folder / one.file).write_bytes(b"abc")
        directory.add(one)
    with DownloadDirectory(tmp_path / "new" / "folder") as directory:
        assert directory.find(one.key) == one
        assert directory.find(("7", *one.key[1:])) is None
        (directory.folder / one.file).write_bytes(b"ab")
        assert directory.find(one.key) is None
        (directory.folder / one.file).unlink()
        assert directory.find(one.key) is None


def test_a_file_whose_line_is_missing_is_found_by_its_name(tmp_path: Path) -> None:
    """A crash between the file's name and its line costs the line alone; a part is no file."""
    (tmp_path / "run_1.a.png").write_bytes(b"abc")
    (tmp_path / "run_1.b.part").write_bytes(b"abc")
    (tmp_path / "run_1.b.part.json").write_bytes(b"{}")
    with DownloadDirectory(tmp_path) as directory:
        assert directory.unlisted("run_1.a") == tmp_path / "run_1.a.png"
        assert directory.unlisted("run_1.b") is None
        assert directory.unlisted("run_1.b.part") is None
        assert directory.unlisted("manifest") is None
    assert digest_of(tmp_path / "run_1.a.png") == (3, hashlib.sha256(b"abc").hexdigest())


def test_a_manifest_that_was_torn_or_changed_does_no_harm(tmp_path: Path) -> None:
    """What is no line of ours is passed over, a torn end is closed, and no line leads elsewhere."""
    (tmp_path / "run_1.a.png").write_bytes(b"abc")
    elsewhere = {name: getattr(entry(), name) for name in ManifestEntry.__dataclass_fields__}
    lines = [
        json.dumps(elsewhere | {"file": "../run_1.a.png"}),
        json.dumps(elsewhere | {"file": ".."}),
        json.dumps(elsewhere | {"run_id": ["no", "id"]}),
        "[]",
        "not JSON",
        '{"file": "torn',
    ]
    (tmp_path / MANIFEST).write_text("\n".join(lines))
    with DownloadDirectory(tmp_path) as directory:
        assert directory.find(entry().key) is None
        directory.add(entry())
    assert json.loads((tmp_path / MANIFEST).read_text().splitlines()[-1])["file"] == "run_1.a.png"
    with DownloadDirectory(tmp_path) as directory:
        assert directory.find(entry().key) == entry()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Two downloads into one folder would write the same parts."""
    with (
        DownloadDirectory(tmp_path),
        pytest.raises(DownloadDirectoryError, match="another process"),
        DownloadDirectory(tmp_path),
    ):
        pass
    with DownloadDirectory(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """The reason stands in one line."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DownloadDirectoryError, match="cannot be written to"),
        DownloadDirectory(tmp_path / "file"),
    ):
        pass
