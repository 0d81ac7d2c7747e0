"""Files are for their owner alone, and a link that was put in their place leads nowhere."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivering.far_end import answer, far_end
from tests.delivering.test_directory import entry
from tracker.core.errors import DownloadDirectoryError
from tracker.delivering.fetch import Fetcher
from tracker.delivering.files import (
    MANIFEST,
    DownloadDirectory,
    PartialFile,
    ResumeKey,
    write_whole,
)
from tracker.store.engine import migration_engine
from tracker.store.url import DatabaseUrl

VICTIM = "not to be touched"


@pytest.fixture(params=[0o022, 0o277])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process's umask: the usual one, and one that hinders even the owner."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def link_to(path: Path) -> Path:
    link = path.with_name("link")
    link.symlink_to(path)
    return link


def modes(folder: Path) -> dict[str, str]:
    return {
        str(one.relative_to(folder)): f"{one.stat().st_mode & 0o777:o}"
        for one in sorted(folder.rglob("*"))
    }


async def test_what_is_written_is_for_its_owner_alone(umask: None, tmp_path: Path) -> None:
    """Downloads, parts of them, manifests, results and the database, with all that is beside it."""
    folder = tmp_path / "new" / "downloads"
    with DownloadDirectory(folder) as directory:
        async with far_end(answer(b"abc")) as end:
            await Fetcher(allow_private=True).fetch(end.url(), folder, "run_1.a")
        directory.add(entry())
        part = PartialFile(folder, "run_1.b")
        part.start(ResumeKey("https://a.test/b", '"1"'))
        part.write(b"ab")
        part.close()
    write_whole(tmp_path / "results.csv", "row\n")
    engine = migration_engine(DatabaseUrl.parse(f"sqlite:///{tmp_path}/tracker.db"))
    async with engine.begin() as database:
        await database.exec_driver_sql("CREATE TABLE one (number int)")
        found = modes(tmp_path)
    await engine.dispose()
    assert found.pop("new") == found.pop("new/downloads") == "700"
    assert set(found.values()) == {"600"}
    assert {"tracker.db", "results.csv", f"new/downloads/{MANIFEST}"} <= set(found)
    assert "tracker.db-wal" in found


@pytest.mark.parametrize("planted", ["link", "second name", "pipe"])
async def test_what_others_put_in_place_of_a_part_is_not_written_to(
    planted: str, tmp_path: Path
) -> None:
    """Neither a part that is begun nor one that is resumed changes a file somewhere else."""
    victim = tmp_path / "victim"
    victim.write_text(VICTIM)
    folder = tmp_path / "downloads"
    folder.mkdir()

    def plant(name: str) -> Path:
        path = folder / name
        if planted == "link":
            path.symlink_to(victim)
        elif planted == "second name":
            path.hardlink_to(victim)
        else:
            os.mkfifo(path)
        return path

    for stem in ("run_1.a", "run_1.b"):
        plant(f"{stem}.part")
    plant("run_1.a.part.json")
    part = PartialFile(folder, "run_1.a")
    part.start(ResumeKey("https://a.test/a", '"1"'))
    part.write(b"abc")
    part.finish(folder / "run_1.a.png")
    assert (folder / "run_1.a.png").read_bytes() == b"abc"
    other = PartialFile(folder, "run_1.b")
    if planted == "link":
        assert other.resumable() is None
    with pytest.raises(OSError, match=r"run_1\.b\.part"):
        other.resume()
    plant(MANIFEST)
    with (
        pytest.raises(DownloadDirectoryError, match="cannot be written to"),
        DownloadDirectory(folder),
    ):
        pass
    assert victim.read_text() == VICTIM


def test_a_link_is_no_file_that_is_there(tmp_path: Path) -> None:
    """A name of ours that leads elsewhere counts as missing, so that the file is fetched."""
    (tmp_path / "victim").write_bytes(b"abc")
    folder = tmp_path / "downloads"
    with DownloadDirectory(folder) as directory:
        directory.add(entry(size=3))
        (folder / "run_1.a.png").symlink_to(tmp_path / "victim")
        assert directory.find(entry().key) is None
    (folder / MANIFEST).unlink()
    with DownloadDirectory(folder) as directory:
        assert directory.reserve(entry().key, "run_1.a") != "run_1.a"


def test_results_go_where_the_user_says(tmp_path: Path) -> None:
    """A link is followed and stays, what is there keeps its mode, and nothing else is left."""
    target = tmp_path / "there" / "results.csv"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link.csv"
    link.symlink_to(target)
    write_whole(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    assert modes(target.parent) == {"results.csv": "640"}


def test_a_device_or_a_pipe_is_written_to(tmp_path: Path) -> None:
    """And is one afterwards, also for root."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link_to(pipe)):
        write_whole(path, "row\n")
        assert os.read(reader, 100) == b"row\n"
    os.close(reader)
    assert pipe.is_fifo()
    if os.geteuid() == 0:  # a device of the test's own: the machine needs its /dev/null
        null = tmp_path / "null"
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        write_whole(null, "gone")
        assert null.is_char_device()
        assert [one.name for one in tmp_path.iterdir() if "null." in one.name] == []
