"""`/runs/RUN_ID`: one run with its outputs and timeline, "Check now", and starting it again."""

import hashlib
from decimal import Decimal
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tracker.core.formatting import money
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.run import RetryAdvice, Tracking
from tracker.starting.catalogue import definition_of
from tracker.starting.start import StartRequest
from tracker.store.queries import runs as read
from tracker.store.queries import starts, techniques
from tracker.store.queries.overview import technique_names
from tracker.store.queries.sheet_rows import RowOfBatch, rows_of_start
from tracker.web.auth import actor_of
from tracker.web.dashboard.forms import read_form
from tracker.web.dashboard.media import output_views, web_link
from tracker.web.dashboard.render import FlashMessage, PageGroup, action, page
from tracker.web.http.request import peer_of

MAX_SHOWN: Final = 300
"""Outputs, inputs and sentences (the newest ones) on the page of a run."""
_PASSING: Final = (RetryAdvice.RETRY_NOW, RetryAdvice.RETRY_LATER)

log = get_logger(__name__)


class Again(NamedTuple):
    """What a failed run offers: a start of the same inputs at `cost` USD, once; or the run that was
    started again before."""

    cost: Decimal | None
    run_id: str | None

    @property
    def question(self) -> str:
        """What the button does."""
        return f"Start again{'' if self.cost is None else f', up to {money(self.cost)}'}"


class RunPages(PageGroup):
    """One run, and its actions."""

    @page("/runs/{run_id:any}")
    async def show(self, request: Request) -> Response:
        return await self._page(request, await self._record(request))

    @action("/runs/{run_id:any}/check")
    async def check(self, request: Request) -> Response:
        """Polls the run now and shows it."""
        before = await self._record(request)
        if before.tracking is Tracking.SETTLED:  # the button of an older page
            final = "Final" if before.recheck_at is None else "Settled; the bill is checked again."
            return await self._page(request, before, flash=FlashMessage("good", final))
        if not self._can_poll(before):
            reason = "No FLORA API key is set for this workspace."
            return await self._page(request, before, flash=FlashMessage("bad", reason))
        after = await self._services.poller.read_now(before)
        return await self._page(request, after, flash=_check_result(before, after))

    @action("/runs/{run_id:any}/retry")
    async def retry(self, request: Request) -> Response:
        """Starts the same inputs again, once for each run, and shows the new run."""
        form = await read_form(request)
        record = await self._record(request)
        again = await self._again(record, await self._rows(record))
        if again is None:
            reason = "This run cannot be started again here."
            return await self._page(request, record, flash=FlashMessage("bad", reason))
        if again.run_id is not None:
            return _to_run(again.run_id)
        if form.get("cost", "") != ("" if again.cost is None else str(again.cost)):
            changed = FlashMessage("warn", "The price has changed. Nothing was started.")
            return await self._page(request, record, flash=changed)
        run = record.run
        by = {"token": actor_of(request.scope).name, "peer": peer_of(request.scope)}
        start = StartRequest(
            technique=run.technique_id or "",
            inputs=record.inputs or [],
            workspace_id=run.workspace_id,
            idempotency_key=_retry_key(run.run_id),
            started_by=by["token"],
            tags=record.tags,
        )
        # Before anything is sent: whatever becomes of it, the log has who asked for it.
        log.info("run.start_requested", technique=start.technique, key=start.idempotency_key, **by)
        started = (await self._services.starter.start(start)).record.run
        log.info("run.started", run_id=started.run_id, technique_id=started.technique_id, **by)
        return _to_run(started.run_id)

    async def _page(
        self, request: Request, record: Record, *, flash: FlashMessage | None = None
    ) -> Response:
        database, run = self._database, record.run
        explanation = await self._services.explainer.explain(run.run_id)
        outputs = run.outputs or ()
        technique = run.technique_id and await techniques.get(database, run.technique_id)
        rows = await self._rows(record)
        sentences = explanation.sentences if explanation else ()
        return self._render(
            request,
            "run.html",
            record=record,
            names=await technique_names(database, [run.technique_id] if run.technique_id else []),
            flash=flash,
            can_check=record.tracking is not Tracking.SETTLED and self._can_poll(record),
            views=output_views(
                outputs, technique.outputs if technique else (), media_origin=self._media_origin
            )[:MAX_SHOWN],
            inputs=[_input(one) for one in (record.inputs or ())[:MAX_SHOWN]],
            rows=rows,
            again=await self._again(record, rows),
            sentences=sentences[-MAX_SHOWN:],
            truncated=max(len(sentences), len(outputs)) > MAX_SHOWN,
        )

    async def _record(self, request: Request) -> Record:
        return await self._stored(
            request,
            read.get_run,
            "Run {} is not tracked here. If it was started elsewhere, track it with the command "
            "tracker runs track.",
        )

    async def _rows(self, record: Record) -> list[RowOfBatch]:
        """The rows of batches that the run was started for."""
        start = await starts.of_run(self._database, record.run.run_id)
        return [] if start is None else await rows_of_start(self._database, start)

    async def _again(self, record: Record, rows: list[RowOfBatch]) -> Again | None:
        """Whether the run can be started again here. A batch starts its rows again itself."""
        run = record.run
        if rows or not record.inputs or run.technique_id is None or run.workspace_id is None:
            return None
        if run.retry_advice not in _PASSING or not self._can_poll(record):
            return None
        key = _retry_key(run.run_id)
        before = (await starts.of_keys(self._database, run.workspace_id, [key])).get(key)
        row = await techniques.get(self._database, run.technique_id)
        cost = None if row is None else definition_of(row).cost_of(record.inputs)
        return Again(cost, None if before is None else before.run_id)

    def _can_poll(self, record: Record) -> bool:
        workspace = self._services.workspaces.of(record.run.workspace_id)
        return workspace is not None and workspace.client is not None


def _to_run(run_id: str) -> Response:
    return RedirectResponse(f"/runs/{quote(run_id, safe='')}", status_code=303)


def _retry_key(run_id: str) -> str:
    """The idempotency key of starting a run again: the same for the same run, so that it is started
    again once, however often the button is pressed."""
    return f"retry-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}"


def _check_result(before: Record, after: Record) -> FlashMessage:
    run = after.run
    if after.last_error is not None and after.checks >= before.checks and not run.settled:
        return FlashMessage("bad", f"The check failed: {after.last_error}")
    if run.settled:
        return FlashMessage("good", f"FLORA reports {run.status}. All details are fetched.")
    if run == before.run:
        return FlashMessage("good", f"No change: FLORA reports {run.status}.")
    return FlashMessage("good", f"FLORA reports {run.status}, at {run.progress:g} %.")


def _input(values: dict[str, Any]) -> dict[str, Any]:
    value = str(values.get("value", ""))
    return {
        "id": str(values.get("id", "")),
        "type": str(values.get("type", "")),
        "value": value,
        "link": web_link(value) if values.get("type") != "text" else None,
    }
