"""Downloads: which runs, which of their outputs, and what is kept of it, on both engines."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from tests.delivering.far_end import answer, far_end
from tests.support.clocks import HandClock
from tests.support.started import of_start
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tracker.core.errors import DownloadDirectoryError, TrackerError
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed, Record
from tracker.core.run import Output, RunError, RunStatus
from tracker.core.waiting import cancel
from tracker.delivering.downloads import FRUITLESS_READS, DownloadOptions, DownloadReport
from tracker.delivering.files import MANIFEST
from tracker.delivering.saving import DownloadOutcome, DownloadResult, WantedRun, jobs_of
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.start import StartRequest
from tracker.store import schema as tables
from tracker.store.queries import batches, starts
from tracker.store.queries.batches import BatchEntry, BatchRow


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone. Files are fetched and named alike, wherever the outputs were read."""
    return sqlite_url


PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files go: a folder that is not there yet."""
    return tmp_path / "files"


async def settle(services: Services, run_id: str, outputs: Sequence[Output], **shown: Any) -> None:
    """A read shows the end of a run, with these outputs."""
    given: dict[str, Any] = {"status": RunStatus.COMPLETED, "source": Source.POLL}
    observation = Observation(
        run_id=run_id, at=services.clock(), outputs=tuple(outputs), **(given | shown)
    )
    await services.writer.submit(Observed(observation=observation))


async def download(services: Services, folder: Path, *run_ids: str, **order: Any) -> DownloadReport:
    report = DownloadReport()
    source = services.downloader.named(run_ids, watch=False)
    given: dict[str, Any] = {"to": folder, "allow_private": True}
    await services.downloader.download(source, DownloadOptions(**(given | order)), report)
    return report


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)


async def test_the_simulators_files_come_as_they_are(
    services: Services, flora: Simulator, clock: HandClock, folder: Path
) -> None:
    """Every output is a file, named by run and output, and a line in the manifest; a second
    download fetches nothing."""
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    run_id = (await services.starter.start(request)).record.run.run_id
    clock.move(60)
    await services.poller.poll_due()
    report = await download(services, folder, run_id)
    outputs = (await the_run(services, run_id)).run.outputs or ()
    assert len(report.of(DownloadOutcome.FETCHED)) == len(outputs) > 1
    assert files(folder) == sorted(f"{run_id}.{one.output_id}.png" for one in outputs)
    for line in manifest(folder):
        content = (folder / line["file"]).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert line["size"] == len(content)
    before = dict(flora.world.counts)
    again = await download(services, folder, run_id)
    assert len(again.of(DownloadOutcome.PRESENT)) == len(outputs)
    assert again.complete
    assert dict(flora.world.counts) == before
    assert len(manifest(folder)) == len(outputs)


async def test_a_part_is_resumed_at_the_simulator(
    services: Services, flora: Simulator, clock: HandClock, folder: Path
) -> None:
    """The simulator's files know ranges: what a command left is completed by the next one."""
    run = flora.start("icon-pack")
    clock.move(60)
    await services.tracker.track(run.run_id)
    await services.poller.poll_due()
    await download(services, folder, run.run_id)
    [name, *_] = files(folder)
    whole = (folder / name).read_bytes()
    [one] = [line for line in manifest(folder) if line["file"] == name]
    (folder / name).unlink()
    # What an interrupted command leaves behind.
    stem = name.removesuffix(".png")
    link = next(o.url for o in run.outputs if o.output_id == one["output_id"])
    async with httpx.AsyncClient(trust_env=False) as client:
        tag = (await client.get(link)).headers["etag"]
    (folder / f"{stem}.part").write_bytes(whole[:100])
    (folder / f"{stem}.part.json").write_text(json.dumps({"link": link, "validator": tag}))
    report = await download(services, folder, run.run_id)
    assert report.complete
    assert (folder / name).read_bytes() == whole
    assert files(folder) == sorted(f"{run.run_id}.{o.output_id}.png" for o in run.outputs)


async def test_texts_are_text_files(services: Services, folder: Path) -> None:
    """A text stands in place of its link; where it has changed, the file is written anew."""
    await settle(services, "run_1", [Output("poem", "text", "Größe\n\N{OWL}")])
    assert (await download(services, folder, "run_1")).complete
    assert (folder / "run_1.poem.txt").read_bytes() == "Größe\n\N{OWL}".encode()
    assert (await download(services, folder, "run_1")).of(DownloadOutcome.PRESENT)
    await settle(services, "run_1", [Output("poem", "text", "\N{OWL}\N{OWL}")])
    assert (await download(services, folder, "run_1")).of(DownloadOutcome.FETCHED)
    assert (folder / "run_1.poem.txt").read_text(encoding="utf-8") == "\N{OWL}\N{OWL}"


async def test_hostile_identifiers_stay_in_the_folder(services: Services, folder: Path) -> None:
    """Neither a run's id nor an output's leads out of it, and none hides another."""
    outside, folder = folder, folder / "in" / "here"
    ids = ("../../up", "/abs", "a/b", "..", "x" * 400, "", "same", "same")
    run_id = "../run\0?"
    await settle(services, run_id, [Output(one, "text", str(n)) for n, one in enumerate(ids)])
    stored = run_id.replace("\0", "\N{REPLACEMENT CHARACTER}")
    report = await download(services, folder, stored)
    assert report.complete
    assert list(outside.iterdir()) == [outside / "in"]
    assert list((outside / "in").iterdir()) == [folder]
    assert len(files(folder)) == len(ids)
    assert sorted(p.read_text() for p in folder.glob("*.txt")) == [str(n) for n in range(8)]


async def test_what_cannot_be_had_is_reported_and_the_rest_is_fetched(
    services: Services, folder: Path
) -> None:
    """One line for each output that failed, with the reason; the others are there."""
    png = answer(b"png", content_type="image/png")
    async with far_end(png) as good, far_end(answer(b"", "404 Not Found")) as gone:
        outputs = [
            Output("good", "imageUrl", good.url()),
            Output("gone", "imageUrl", gone.url()),
            Output("odd", "videoUrl", "file:///etc/passwd"),
        ]
        await settle(services, "run_1", outputs)
        report = await download(services, folder, "run_1", concurrency=1)
    assert files(folder) == ["run_1.good.png"]
    assert not report.complete
    assert [(one.job.output.output_id, one.error) for one in report.of(DownloadOutcome.FAILED)] == [
        ("gone", "the link has expired, or the file is gone (HTTP 404)"),
        ("odd", "the link is not http(s)"),
    ]


async def test_an_expired_link_is_read_again(
    services: Services, flora: Simulator, clock: HandClock, folder: Path
) -> None:
    """One read of the run brings the links of all its outputs; nothing else of it changes."""
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    run_id = (await services.starter.start(request)).record.run.run_id
    clock.move(60)
    await services.poller.poll_due()
    fresh = (await the_run(services, run_id)).run.outputs or ()
    clock.move(60)
    async with far_end(answer(b"", "403 Forbidden")) as gone:
        await settle(services, run_id, [replace(one, url=gone.url()) for one in fresh])
        before = await the_run(services, run_id)
        clock.move(60)
        report = await download(services, folder, run_id, concurrency=1)
    assert report.complete
    assert len(report.of(DownloadOutcome.FETCHED)) == len(fresh) > 1
    after = await the_run(services, run_id)
    assert after.run.outputs == fresh
    assert after.checks == before.checks + 1
    assert (after.tracking, after.settled_at) == (before.tracking, before.settled_at)


async def test_flora_is_not_asked_for_ever_for_other_links(
    services: Services, flora: Simulator, clock: HandClock, folder: Path
) -> None:
    """A run whose files are gone is read once, however many there are, and other runs are read
    nevertheless; where no run shows a new link, a few reads are enough."""
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    renewed = (await services.starter.start(request)).record.run.run_id
    clock.move(60)
    await services.poller.poll_due()
    clock.move(60)
    fresh = (await the_run(services, renewed)).run.outputs or ()
    gone_ids = [f"run_{number}" for number in range(FRUITLESS_READS + 3)]

    async def reads() -> list[bool]:
        return [(await the_run(services, run_id)).checks > 0 for run_id in gone_ids]

    async with far_end(answer(b"", "404 Not Found")) as gone:
        for run_id in gone_ids:
            outputs = [Output(f"o{number}", "imageUrl", gone.url()) for number in range(4)]
            await settle(services, run_id, outputs)
        await settle(services, renewed, [replace(one, url=gone.url()) for one in fresh])
        clock.move(60)
        flora.world.change({"history_outputs": False})  # so that only a single read shows a link
        report = await download(services, folder, gone_ids[0], renewed, concurrency=1)
        assert len(report.of(DownloadOutcome.FETCHED)) == len(fresh)
        assert len(report.of(DownloadOutcome.FAILED)) == len(outputs)
        once = (await the_run(services, gone_ids[0])).checks
        assert sum(await reads()) == 1
        await download(services, folder, *gone_ids, concurrency=1)
    assert (await the_run(services, gone_ids[0])).checks == 2 * once
    assert await reads() == [True] * FRUITLESS_READS + [False] * 3


async def test_links_into_this_machine_are_refused(services: Services, folder: Path) -> None:
    """Unless that is allowed, nothing is sent there."""
    async with far_end(answer(b"secret")) as end:
        await settle(services, "run_1", [Output("a", "imageUrl", end.url())])
        report = await download(services, folder, "run_1", allow_private=False)
    [failed] = report.of(DownloadOutcome.FAILED)
    assert "not a public address" in (failed.error or "")
    assert end.asked == []


async def test_so_many_at_a_time(services: Services, folder: Path) -> None:
    """No more files than asked for are under way at the same time."""
    now, most, waiting = 0, 0, asyncio.Event()

    async def reply(asked: Any, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if most == 3:
            waiting.set()
        await waiting.wait()
        now -= 1
        writer.write(answer(b"x"))

    async with far_end(reply) as end:
        outputs = [Output(f"o{n}", "imageUrl", end.url(f"/{n}")) for n in range(9)]
        await settle(services, "run_1", outputs)
        report = await download(services, folder, "run_1", concurrency=3)
    assert report.complete
    assert most == 3


async def test_runs_without_outputs_are_reported_apart(services: Services, folder: Path) -> None:
    """A run that has not settled is missing; one that failed has nothing to fetch."""
    error = RunError("model_timeout", "")
    await settle(services, "run_failed", [], status=RunStatus.FAILED, error=error)
    await settle(services, "run_busy", [], status=RunStatus.RUNNING)
    report = await download(services, folder, "run_failed")
    assert report.complete
    assert [one.status for one in report.absent] == ["failed"]
    report = await download(services, folder, "run_failed", "run_busy")
    assert not report.complete
    assert [(one.run_id, one.status) for one in report.absent if not one.harmless] == [
        ("run_busy", "running")
    ]


async def test_outputs_that_come_later_are_awaited(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, folder: Path
) -> None:
    """A completed run that shows no outputs at first is missing until FLORA shows them or was asked
    for the last time, and a download that goes on fetches them then."""
    async with make_flora(late_outputs=1.0, outputs_seconds=50) as flora:
        services: Services = await open_on(flora)
        request = StartRequest(technique="icon-pack", inputs=PROMPT)
        run_id = (await services.starter.start(request)).record.run.run_id
        while (due := await services.poller.next_due_at()) is not None:
            clock.move(max((due - clock()).total_seconds(), 1))
            await services.poller.poll_due()
        report = await download(services, folder, run_id)
        assert not report.complete
        assert [(one.harmless, one.awaited) for one in report.absent] == [(False, True)]
        report, options = DownloadReport(), DownloadOptions(to=folder, allow_private=True)
        source = services.downloader.settled(technique_id=None, watch=True)
        going = asyncio.create_task(services.downloader.download(source, options, report))
        await eventually(lambda: report.absent)
        clock.move(61)
        await services.poller.recheck_due()
        outputs = flora.world.runs[run_id].outputs
        await eventually(lambda: len(report.of(DownloadOutcome.FETCHED)) == len(outputs) > 0)
        await cancel(going)
        assert report.complete


async def test_two_downloads_do_not_share_a_folder(services: Services, folder: Path) -> None:
    """The second one says so and fetches nothing."""
    hold = asyncio.Event()

    async def reply(asked: Any, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.write(answer(b"x"))

    async with far_end(reply) as end:
        await settle(services, "run_1", [Output("a", "imageUrl", end.url())])
        first = asyncio.create_task(download(services, folder, "run_1"))
        await eventually(lambda: end.asked)
        with pytest.raises(DownloadDirectoryError, match="another process is downloading"):
            await download(services, folder, "run_1")
        hold.set()
        assert (await first).complete


async def collect(source: Any, into: list[WantedRun]) -> None:
    async for wanted in source:
        into.append(wanted)


async def test_all_that_settles_is_found(services: Services) -> None:
    """All settled runs come newest first, then each that settles, as it does."""
    await settle(services, "run_1", [], technique_id="tech_a")
    await settle(services, "run_2", [], technique_id="tech_b")
    await settle(services, "run_3", [], status=RunStatus.RUNNING, technique_id="tech_a")
    found: list[WantedRun] = []
    source = services.downloader.settled(technique_id="tech_a", watch=True)
    task = asyncio.create_task(collect(source, found))
    ids = lambda: {one.record.run.run_id for one in found if one.record}  # noqa: E731
    await eventually(lambda: ids() == {"run_1"})
    await settle(services, "run_3", [], technique_id="tech_a")
    await settle(services, "run_4", [], technique_id="tech_b")
    await settle(services, "run_5", [], technique_id="tech_a")
    await eventually(lambda: ids() == {"run_1", "run_3", "run_5"})
    task.cancel()
    await asyncio.wait([task])


async def test_named_runs_come_as_they_settle(services: Services) -> None:
    """Watched runs end the search once all have ended, also where one is lost."""
    await settle(services, "run_1", [])
    await settle(services, "run_2", [], status=RunStatus.RUNNING)
    found: list[WantedRun] = []
    source = services.downloader.named(["run_1", "run_2"], watch=True)
    task = asyncio.create_task(collect(source, found))
    await eventually(lambda: len(found) == 1)
    assert not task.done()
    await settle(services, "run_2", [])
    async with asyncio.timeout(30):
        await task
    assert [one.record.run.run_id for one in found if one.record] == ["run_1", "run_2"]


async def keep_batch(services: Services, rows: int) -> tuple[BatchRow, list[BatchEntry]]:
    """A batch of that many rows, none of which is started."""
    batch = BatchRow(
        batch_id="bat_1",
        workspace_id="ws_simulator",
        technique_id="tech_icon-pack",
        name="sheet.csv",
        created_at=services.clock(),
    )
    entries = [BatchEntry(position=n, line=n + 1, digest=f"{n:064}") for n in range(1, rows + 1)]
    await batches.keep(services.database, batch, entries)
    return batch, entries


async def start_row(services: Services, entry: BatchEntry, run_id: str) -> None:
    """A row's start became that run, which has not ended."""
    await starts.reserve(
        services.database,
        starts.StartRow(
            workspace_id="ws_simulator",
            idempotency_key=entry.key,
            technique_id="tech_icon-pack",
            fingerprint="f",
            inputs=PROMPT,
            created_at=services.clock(),
        ),
    )
    at, workspace_id = services.clock(), "ws_simulator"
    seen = Observation(run_id=run_id, source=Source.START, at=at, workspace_id=workspace_id)
    entered = of_start(
        Observed(observation=seen), workspace_id=workspace_id, idempotency_key=entry.key
    )
    await services.writer.submit(entered)


async def test_a_batch_names_its_files_by_row(services: Services, folder: Path) -> None:
    """Rows are numbered in the sheet's order; one without a run is reported."""
    _, entries = await keep_batch(services, 10)
    for entry, run_id in zip(entries, ("run_b", "run_a"), strict=False):
        await start_row(services, entry, run_id)
    await settle(services, "run_b", [Output("poem", "text", "b")])
    report = DownloadReport()
    source = services.downloader.batch("bat_1", watch=False)
    await services.downloader.download(source, DownloadOptions(to=folder), report)
    assert files(folder) == ["001_text_1.txt"]
    assert [line["row"] for line in manifest(folder)] == ["001"]
    told = {one.row: one.status for one in report.absent}
    assert told["002"] == "pending"
    assert told["010"] == "not_started"
    assert not report.complete


async def test_the_runs_of_a_row_keep_their_names(services: Services, folder: Path) -> None:
    """In whatever order they end and become known."""
    _, (entry,) = await keep_batch(services, 1)
    for run_id in ("run_1", "run_3", "run_2"):
        await start_row(services, entry, run_id)
        await settle(services, run_id, [Output("poem", "text", run_id)])
        source = services.downloader.batch("bat_1", watch=False)
        await services.downloader.download(source, DownloadOptions(to=folder), DownloadReport())
    names = ("001_text_1.txt", "001_run_2_text_1.txt", "001_run_3_text_1.txt")
    assert files(folder) == sorted(names)
    assert [(folder / name).read_text() for name in names] == ["run_1", "run_2", "run_3"]


async def test_a_watch_awaits_the_further_runs_of_a_row(services: Services) -> None:
    """Until their callbacks are late: FLORA's answer names the first alone."""
    batch, (entry,) = await keep_batch(services, 1)
    await start_row(services, entry, "run_1")
    url = {"callback_token": "own", "callback_url": "https://tracker.example/callbacks/flora/own"}
    values = sa.update(tables.starts).values(reserved_runs=3, **url)
    await services.database.execute(values)
    await batches.finish(services.database, batch, services.clock())
    await settle(services, "run_1", [])
    found: list[WantedRun] = []
    task = asyncio.create_task(collect(services.downloader.batch("bat_1", watch=True), found))
    await eventually(lambda: found)
    await start_row(services, entry, "run_2")
    await settle(services, "run_2", [])
    await eventually(lambda: len(found) == 2)
    assert [one.run_id for one in found] == ["run_1", "run_2"]
    assert not task.done()
    ended = sa.update(tables.runs).values(end_seen_at=services.clock() - timedelta(minutes=3))
    await services.database.execute(ended)
    async with asyncio.timeout(30):
        await task


async def test_files_of_a_batch_are_reported_also_if_the_folder_is_gone_at_the_end(
    services: Services, folder: Path
) -> None:
    """What was downloaded while the batch ran is in the report, with the runs that have no outputs;
    it is not complete."""
    batch, entries = await keep_batch(services, 2)
    for number, entry in enumerate(entries, 1):
        await start_row(services, entry, f"run_{number}")
    begun, come = asyncio.Event(), list[DownloadResult]()

    async def run_batch() -> str:
        begun.set()
        await settle(services, "run_1", [Output("poem", "text", "a")])
        await eventually(lambda: come)
        folder.rename(folder.with_name("away"))
        folder.write_text("")
        return "outcome"

    report = DownloadReport()
    outcome = await services.downloader.alongside(
        run_batch(),
        batch.batch_id,
        DownloadOptions(to=folder),
        report,
        begun=begun,
        on_result=come.append,
    )
    assert outcome == "outcome"
    assert "cannot be written to" in (report.failure or "")
    assert [(one.job.run_id, one.outcome) for one in report.results] == [("run_1", "fetched")]
    assert [(one.run_id, one.status) for one in report.absent] == [("run_2", "pending")]
    assert not report.complete


async def test_a_batch_is_watched_to_its_end(services: Services) -> None:
    """Rows that another command starts meanwhile are waited for, until that has seen its end."""
    batch, entries = await keep_batch(services, 2)
    await start_row(services, entries[0], "run_1")
    await settle(services, "run_1", [])
    found: list[WantedRun] = []
    told: list[str] = []
    read, watched = services.follower.read, set[str]()

    async def noted(run_ids: Sequence[str]) -> dict[str, Record]:
        watched.update(run_ids)
        return await read(run_ids)

    services.follower.read = noted  # type: ignore[method-assign]
    source = services.downloader.batch("bat_1", watch=True, notify=told.append)
    task = asyncio.create_task(collect(source, found))
    await eventually(lambda: len(found) == 1)
    await eventually(lambda: told)
    assert told == ["1 row is not started yet: `tracker batch` starts them"]
    await start_row(services, entries[1], "run_2")
    await eventually(lambda: "run_2" in watched)  # while it is pending
    await settle(services, "run_2", [])
    await eventually(lambda: len(found) == 2)
    await batches.finish(services.database, batch, services.clock())
    async with asyncio.timeout(30):
        await task
    assert [(one.row, one.status) for one in found] == [("001", "completed"), ("002", "completed")]


async def test_an_unknown_batch_is_an_error(services: Services) -> None:
    """Its id is told."""
    with pytest.raises(TrackerError, match="batch bat_none is not known"):
        await collect(services.downloader.batch("bat_none", watch=False), [])


async def test_an_interrupt_keeps_what_has_come(services: Services, folder: Path) -> None:
    """A download that is broken off leaves its part, and the next one goes on with it."""
    whole = b"x" * 90_000
    hold = asyncio.Event()

    async def reply(asked: Any, writer: asyncio.StreamWriter) -> None:
        if "range" in asked:
            part = f"bytes 50000-{len(whole) - 1}/{len(whole)}"
            writer.write(
                answer(whole[50_000:], "206 Partial Content", etag='"1"', content_range=part)
            )
            return
        writer.write(answer(whole[:50_000], length=len(whole), etag='"1"'))
        await writer.drain()
        await hold.wait()

    def has_come() -> bool:
        parts = list(folder.glob("*.part"))
        return bool(progress) and bool(parts)

    progress: list[int] = []
    async with far_end(reply) as end:
        await settle(services, "run_1", [Output("a", "imageUrl", end.url())])
        task = asyncio.create_task(
            services.downloader.download(
                services.downloader.named(["run_1"], watch=False),
                DownloadOptions(to=folder, allow_private=True),
                DownloadReport(),
                on_bytes=lambda job, size, whole: progress.append(size),
            )
        )
        await eventually(lambda: has_come() and progress[-1] == 50_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.set()
        report = await download(services, folder, "run_1")
    assert report.complete
    assert end.asked[-1]["range"] == "bytes=50000-"
    assert (folder / "run_1.a.png").read_bytes() == whole


async def test_names_hold_the_position_where_ids_repeat(services: Services) -> None:
    """Two outputs of one name are two files."""
    await settle(services, "run_1", [Output("a", "text", "1"), Output("a", "text", "2")])
    wanted = WantedRun(record=await the_run(services, "run_1"), row="3")
    assert [job.name for job in jobs_of(wanted)] == ["3_text_1", "3_text_2"]
    one = replace(wanted, row=None)
    assert [job.name for job in jobs_of(one)] == ["run_1.a.0", "run_1.a.1"]
