"""`tracker runs download`: download the outputs of runs as files."""

import asyncio
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.command import AS_JSON, argument, check_run_ids, flag, option, run_once
from tracker.cli.output import note, plain, print_json, screen
from tracker.cli.runs import require_known
from tracker.core.formatting import counted, line_numbers
from tracker.core.formatting import size as size_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.progress import Task

    from tracker.delivering.downloads import DownloadReport, RunWithoutOutputs
    from tracker.delivering.saving import DownloadJob, DownloadResult, WantedRun
    from tracker.polling.follow import Notify
    from tracker.services import Services

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(?:i?b)?|b|bytes)?", re.IGNORECASE)
_NAMED: Final = 20
"""How many runs without outputs are named; the rest is counted."""


NAME_BY: Final = option(
    "Name the files of a batch by this column of its sheet, not by the row's number.",
    metavar="COLUMN",
)
ALLOW_PRIVATE: Final = flag(
    "--allow-private",
    "Allow links to this machine and private networks (a local FLORA always may).",
)


def parse_size(text: str | int) -> int:
    """A number of bytes, as in 500000, 500M or 2GiB; K, M, G and T are powers of 1024."""
    found = _SIZE.fullmatch(str(text).strip())
    size = 0 if found is None else float(found[1])
    if found is None or size <= 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 500000, 500M or 2GiB")
    return int(size * 1024 ** (" kmgt".index((found[2] or " ").lower())))


def download(
    run_ids: list[str] = argument(
        "RUN_ID", "FLORA's run_… identifiers.", default=[], callback=check_run_ids
    ),
    batch: str | None = option("The runs of a batch.", "--batch", metavar="ID"),
    all_settled: bool = flag("--all-settled", "Every settled run."),
    technique: str | None = option(
        "With --all-settled: filter by technique (id or slug).", metavar="T"
    ),
    to: Path = option("Directory for the files.", "--to", metavar="DIR", default=Path("downloads")),
    watch: bool = flag("--watch", "Wait for runs, and download each as it settles."),
    name_by: str | None = NAME_BY,
    allow_private: bool = ALLOW_PRIVATE,
    max_bytes: int = option(
        "Maximum size of a file, as in 500M.",
        metavar="SIZE",
        default=2 * 1024**3,
        parser=parse_size,
        show_default="2GiB",
    ),
    concurrency: int = option("Concurrent downloads.", default=4, min=1, max=32),
    as_json: bool = AS_JSON,
) -> int:
    """Download the outputs of runs as files. Files that exist already are not downloaded again.

    Files are named by row (of a batch) or run, and output; manifest.jsonl in DIR lists each with
    its size and SHA-256. Exit status 1 if a download failed.
    """
    if bool(run_ids) + (batch is not None) + all_settled != 1:
        raise typer.BadParameter("give run ids, or --batch, or --all-settled")
    if technique is not None and not all_settled:
        raise typer.BadParameter("goes with --all-settled only", param_hint="--technique")
    if name_by is not None and batch is None:
        raise typer.BadParameter("goes with --batch only", param_hint="--name-by")

    async def find(services: "Services", notify: "Notify") -> "AsyncIterator[WantedRun]":
        downloader = services.downloader
        if all_settled:
            from tracker.store.queries import techniques

            technique_id = await techniques.id_of(services.database, technique)
            return downloader.settled(technique_id=technique_id, watch=watch, notify=notify)
        if batch is not None:
            return downloader.batch(batch, watch=watch, name_by=name_by, notify=notify)
        await require_known(services, run_ids)
        return downloader.named(run_ids, watch=watch, notify=notify)

    async def work(services: "Services") -> "DownloadReport":
        from tracker.delivering.downloads import DownloadOptions, DownloadReport

        options = DownloadOptions(
            to=to,
            allow_private=allow_private or services.settings.flora_is_local,
            max_bytes=max_bytes,
            concurrency=concurrency,
        )
        report = DownloadReport()
        try:
            with screen() as shown:

                def show_bytes(job: "DownloadJob", done: int, total: int | None) -> None:
                    shown.bar(job.name, done=done, total=total, text=_bytes)

                def show_result(result: "DownloadResult") -> None:
                    shown.remove(result.job.name)
                    if (line := _line(result)) is not None:
                        shown.line(line)

                async with services.signals:
                    await services.downloader.download(
                        await find(services, shown.notice),
                        options,
                        report,
                        on_bytes=show_bytes,
                        on_result=show_result,
                    )
        except asyncio.CancelledError:
            note(_summary(report, to))
            note("tracker: interrupted; unfinished files are kept and continued next time")
            raise
        return report

    report = run_once(work)
    _report_absent(report, named=not all_settled)
    if as_json:
        print_json(report_json(report, to))
    else:
        typer.echo(plain(_summary(report, to)))
    return 0 if report.complete else 1


def _bytes(task: "Task") -> tuple[str]:
    of = "" if task.total is None else f" of {size_text(int(task.total))}"
    speed = "" if task.speed is None else f", {size_text(int(task.speed))}/s"
    return (f"{size_text(int(task.completed))}{of}{speed}",)


def _line(result: "DownloadResult") -> str | None:
    """A line for a file that was downloaded or failed; none for one that was there already."""
    job = result.job
    if result.error is not None:
        output = f"{job.output.output_id or job.position} of run {job.run_id}"
        row = "" if job.row is None else f" (row {job.row})"
        return f"tracker: output {output}{row}: {result.error}"
    if result.outcome == "present" or result.entry is None:
        return None
    return f"{result.entry.file}  {size_text(result.entry.size)}"


def _summary(report: "DownloadReport", to: Path) -> str:
    from tracker.delivering.saving import DownloadOutcome

    fetched = report.of(DownloadOutcome.FETCHED)
    size = sum(one.entry.size for one in fetched if one.entry is not None)
    parts = [f"{counted(len(fetched), 'file')} downloaded to {to} ({size_text(size)})"]
    if present := len(report.of(DownloadOutcome.PRESENT)):
        parts.append(f"{present} existed already")
    if failed := len(report.of(DownloadOutcome.FAILED)):
        parts.append(f"{counted(failed, 'download')} failed")
    return ", ".join(parts)


def report_files(report: "DownloadReport", to: Path) -> bool:
    """Report the files of a batch, and each cause of failure, on stderr.

    Returns whether a file is, or may be, missing.
    """
    from tracker.delivering.saving import DownloadOutcome

    causes: defaultdict[str, set[int]] = defaultdict(set)
    for one in report.of(DownloadOutcome.FAILED):
        causes[one.error or ""].add(int(one.job.row or 0))
    for absent in report.absent:
        if absent.awaited:
            causes["FLORA shows no outputs yet"].add(int(absent.row or 0))
    for error, rows in causes.items():
        note(f"tracker: not downloaded: {error} ({line_numbers(list(rows), 'row')})")
    entries = [one.entry for one in report.results if one.entry is not None]
    size = size_text(sum(entry.size for entry in entries))
    files = counted(len(entries), "file")
    if report.failure is not None:
        note(f"tracker: not downloaded: {report.failure}")
        note(f"{files} downloaded before that ({size}).")
        return True
    note(f"{files} in {to} ({size}).")
    return bool(causes)


def _report_absent(report: "DownloadReport", *, named: bool) -> None:
    """Report runs without files; failed runs only where they were `named`."""
    shown = [one for one in report.absent if named or not one.harmless]
    for one in shown[:_NAMED]:
        note(f"tracker: {_reason(one)}")
    counts = Counter(one.status for one in shown[_NAMED:])
    for status, count in counts.items():
        note(f"tracker: {count} more without outputs: {status}")


def _reason(one: "RunWithoutOutputs") -> str:
    which = " ".join(
        part for part in (one.row and f"row {one.row}", one.run_id and f"run {one.run_id}") if part
    )
    if one.status == "lost":
        return f"{which} was not found at FLORA"
    if one.harmless:
        return f"{which} has no outputs ({one.status})"
    if one.awaited:
        return f"{which} shows no outputs yet ({one.status}): repeat the command later"
    if one.run_id is not None:
        return f"{which} has not settled yet ({one.status}): --watch waits for it"
    return f"{which} has no run ({one.status})"


def report_json(report: "DownloadReport", to: Path) -> dict[str, Any]:
    """The files, failures and runs without outputs as JSON values."""
    results = sorted(
        report.results, key=lambda one: (one.job.row or "", one.job.run_id, one.job.position)
    )
    return {
        "to": str(to),
        "files": [
            {**asdict(one.entry), "outcome": one.outcome.value}
            for one in results
            if one.entry is not None
        ],
        "failures": [
            {
                "row": one.job.row,
                "run_id": one.job.run_id,
                "output_id": one.job.output.output_id,
                "error": one.error,
            }
            for one in results
            if one.error is not None
        ],
        "absent": [asdict(one) for one in report.absent],
        **({} if report.failure is None else {"error": report.failure}),
    }
