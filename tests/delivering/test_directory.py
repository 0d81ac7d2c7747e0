"""The folder and its manifest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tracker.core.errors import DownloadDirectoryError
from tracker.delivering.files import MANIFEST, DownloadDirectory, ManifestEntry


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
        assert directory.find(("run_7", *one.key[1:])) is None
        (directory.folder / one.file).write_bytes(b"ab")
        assert directory.find(one.key) is None
        (directory.folder / one.file).unlink()
        assert directory.find(one.key) is None


def test_no_file_takes_the_name_of_another(tmp_path: Path) -> None:
    """A file of another output, or of someone else, keeps its name, in any case; the new one gets
    six characters more, and the same ones each time."""
    (tmp_path / "Hat_image_1.jpg").write_bytes(b"abc")
    (tmp_path / "cap_image_1.part").write_bytes(b"abc")
    key = ("run_2", 0, "a")
    with DownloadDirectory(tmp_path) as directory:
        directory.add(entry(file="tie_image_1.png"))
        assert directory.reserve(entry().key, "tie_image_1") == "tie_image_1"
        assert directory.reserve(key, "cap_image_1") == "cap_image_1"
        names = [directory.reserve(key, one) for one in ("hat_image_1", "tie_image_1")]
    assert [len(name) for name in names] == [18, 18]
    with DownloadDirectory(tmp_path) as directory:
        assert [directory.reserve(key, one) for one in ("hat_image_1", "tie_image_1")] == names


def test_a_crash_before_the_file_has_its_name_costs_the_name_nothing(tmp_path: Path) -> None:
    """Its line is there and the file is not: it is fetched again, under the same name."""
    with DownloadDirectory(tmp_path) as directory:
        directory.add(entry(file="001_image_1.png"))
    with DownloadDirectory(tmp_path) as directory:
        assert directory.find(entry().key) is None
        assert directory.reserve(entry().key, "001_image_1") == "001_image_1"


def test_a_file_gets_another_name(tmp_path: Path) -> None:
    """With its line in the manifest; one that has the name stays as it is."""
    (tmp_path / "001_image_1.png").write_bytes(b"abc")
    with DownloadDirectory(tmp_path) as directory:
        directory.add(entry(file="001_image_1.png"))
        renamed = directory.rename(entry(file="001_image_1.png"), "Hat_image_1")
        assert directory.rename(renamed, "Hat_image_1") == renamed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Hat_image_1.png", MANIFEST]
    with DownloadDirectory(tmp_path) as directory:
        assert directory.find(entry().key) == renamed


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


FULL = """
import asyncio, resource, sys
from pathlib import Path
from tracker.core.clock import utc_now
from tracker.core.run import Output
from tracker.delivering.files import DownloadDirectory
from tracker.delivering.saving import DownloadJob, OutputSaver

async def save_three(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    with DownloadDirectory(folder) as directory:
        saver = OutputSaver(directory, None, utc_now, None)
        for name in ("a", "b", "c" * 20):
            output = Output(output_id=name, type="text", url="a text")
            job = DownloadJob(run_id="run_1", position=0, output=output, row=None, name=name)
            print((await saver.save(job, None)).outcome)

asyncio.run(save_three(Path(sys.argv[1])))
"""


def test_a_full_disk_is_a_result_and_leaves_no_half_line(tmp_path: Path) -> None:
    """Here the manifest may not grow: what does not fit is not written again when it is closed."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (
        *(0, ["fetched", "fetched", "failed"]),
        "",
    )
    lines = (tmp_path / "folder" / MANIFEST).read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["file"] for line in lines] == ["a.txt", "b.txt"]
    assert lines[-1].endswith(b"\n")
