"""Webhooks: callbacks received at `/deliveries`, and events sent at `/endpoints` and `/messages`.

Callbacks that were not understood come first, by cause; they are applied again or acknowledged, one
or many at a time. Messages are sent again.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tracker.core.errors import FieldFault
from tracker.core.events import EventType, MessageState
from tracker.core.formatting import counted, duration
from tracker.core.record import DeliveryOutcome
from tracker.delivering.webhooks import UnknownEndpoint
from tracker.receiving.apply import UnknownDelivery
from tracker.store.queries import endpoints, overview
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import (
    DeliveryRow,
    causes,
    get_delivery,
    list_deliveries,
    unseen_deliveries,
)
from tracker.store.queries.endpoints import Backlog, EndpointRow, MessageRow
from tracker.web.dashboard import (
    PAGE_SIZE,
    PERIOD_NAMES,
    PERIODS,
    FlashMessage,
    PageGroup,
    action,
    page,
    query_field,
    read_filters,
    read_form,
)
from tracker.web.dashboard.render import query
from tracker.web.http.responses import invalid

CAUSES: Final = 10
"""Causes of quarantine that the page shows."""
BULK_SECONDS: Final = 8.0
"""Time after which a bulk replay stops; the page then says how many are left."""
BULK_DELIVERIES: Final = 10_000
"""The most deliveries of one bulk action."""
OUTCOMES: Final = {
    "waiting": "Waiting",
    "applied": "Applied",
    "quarantined": "Quarantined",
    "acknowledged": "Quarantined, acknowledged",
}
FILTERS: Final = {
    "run": None,
    "workspace": None,
    "cause": None,
    "outcome": OUTCOMES,
    "within": PERIODS,
}
LATEST: Final = 10
"""Messages on the page of an endpoint."""
DELAYS_OF: Final = timedelta(days=1)
"""The delays shown are those of messages this young."""
SINCE: Final = {"1": "Last hour", "24": "Last 24 hours", "72": "Last 3 days", "720": "Last 30 days"}
"""How far back failed messages are sent again, in hours."""
HELD: Final = "A disabled endpoint gets nothing until it is enabled."


class DeliveryPages(PageGroup):
    """The list, one delivery, and their actions."""

    @page("/deliveries")
    async def list(self, request: Request, flash: FlashMessage | None = None) -> Response:
        """The problems, and a page of deliveries, newest first."""
        filters, now = read_filters(request, FILTERS), self._services.clock()
        outcome, acknowledged = _wanted(filters["outcome"], filters["cause"])
        rows, next_cursor = await list_deliveries(
            self._database,
            run_id=filters["run"],
            workspace_id=filters["workspace"],
            since=now - PERIODS[filters["within"]] if filters["within"] else None,
            outcome=outcome,
            acknowledged=acknowledged,
            cause=filters["cause"],
            cursor=query_field(request, "cursor"),
            limit=PAGE_SIZE,
        )
        counts = await overview.counts(self._database, now=now)
        oldest = counts.oldest_waiting_at
        return self._list(
            request,
            "deliveries.html",
            next_cursor,
            filters,
            flash=flash,
            filtered=any(filters.values()),
            address=query("/deliveries", **filters),
            rows=rows,
            outcomes=OUTCOMES,
            periods=PERIOD_NAMES,
            workspaces={one: one for one in self._workspace_ids},
            has_secret=any(one.secrets for one in self._services.workspaces),
            callback_url=self._services.settings.callback_url,
            causes=await causes(self._database, limit=CAUSES),
            late=counts.waiting if overview.is_inbox_behind(oldest, now) else 0,
            oldest_waiting_at=oldest,
        )

    @action("/deliveries", list)
    async def act(self, request: Request) -> FlashMessage:
        """Replays or acknowledges the selected deliveries, or those with one cause."""
        form = await read_form(request)
        chosen: Sequence[str] = form.getlist("delivery_id")
        if "cause" in form:
            until = _moment(form.get("until", ""))
            chosen = await unseen_deliveries(
                self._database, cause=form["cause"], until=until, limit=BULK_DELIVERIES
            )
        action = form.get("action")
        if action not in ("replay", "acknowledge"):
            raise invalid(FieldFault("action", "must be one of replay, acknowledge"))
        if not chosen:
            return FlashMessage("warn", "Nothing was selected.")
        if action == "replay":
            return await self._replay_all(chosen)
        done = await self._services.replayer.acknowledge(chosen)
        return FlashMessage("good", f"{_deliveries(len(done))} acknowledged.")

    async def _replay_all(self, delivery_ids: Sequence[str]) -> FlashMessage:
        loop = asyncio.get_running_loop()
        until, applied, bad, left = loop.time() + BULK_SECONDS, 0, 0, len(delivery_ids)
        for delivery_id in delivery_ids:
            if loop.time() >= until:
                break
            left -= 1
            try:
                replay = await self._services.replayer.replay(delivery_id)
            except UnknownDelivery:
                continue  # removed by retention
            applied += replay.outcome is DeliveryOutcome.APPLIED
            bad += replay.outcome is DeliveryOutcome.QUARANTINED
        parts = [f"{_deliveries(applied)} applied"]
        parts += [f"{bad:,} still quarantined"] if bad else []
        parts += [f"{left:,} left: replay them again"] if left else []
        return FlashMessage("warn" if bad or left else "good", f"Replayed: {', '.join(parts)}.")

    @page("/deliveries/{delivery_id:any}")
    async def show(self, request: Request, flash: FlashMessage | None = None) -> Response:
        row = await self._row(request)
        run = await read.get_run(self._database, row.run_id) if row.run_id else None
        return self._render(
            request, "delivery.html", row=row, flash=flash, run_known=run is not None
        )

    @action("/deliveries/{delivery_id:any}/replay", show)
    async def replay(self, request: Request) -> FlashMessage:
        replay = await self._services.replayer.replay((await self._row(request)).delivery_id)
        if replay.already:
            return FlashMessage("good", f"Nothing to do: {replay.reason}.")
        if replay.outcome is DeliveryOutcome.APPLIED:
            return FlashMessage("good", f"Replayed: applied to run {replay.run_id}.")
        return FlashMessage("warn", f"Still quarantined: {replay.reason}.")

    @action("/deliveries/{delivery_id:any}/acknowledge", show)
    async def acknowledge(self, request: Request) -> FlashMessage:
        row = await self._row(request)
        done = await self._services.replayer.acknowledge([row.delivery_id])
        return FlashMessage("good", "Acknowledged." if done else "Nothing to do.")

    async def _row(self, request: Request) -> DeliveryRow:
        return await self._stored(request, get_delivery, "Delivery {} is not stored here.")


def _wanted(outcome: str | None, cause: str | None) -> tuple[str | None, bool | None]:
    """A choice of `OUTCOMES`: the outcome, and if acknowledged. Only quarantine has causes."""
    if outcome in ("quarantined", "acknowledged"):
        return "quarantined", outcome == "acknowledged"
    return outcome or ("quarantined" if cause else None), None


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise invalid(FieldFault("until", "must be a time with its zone"))
    return moment


def _deliveries(count: int) -> str:
    return counted(count, "delivery", "deliveries")


class WebhookPages(PageGroup):
    """The lists of endpoints and messages, one of each, and their actions."""

    @page("/endpoints")
    async def list_endpoints(self, request: Request) -> Response:
        since = self._services.clock() - DELAYS_OF
        rows = await endpoints.list_states(self._database, since=since)
        return self._render(request, "endpoints.html", rows=rows)

    @page("/endpoints/{endpoint_id:any}")
    async def show_endpoint(self, request: Request, flash: FlashMessage | None = None) -> Response:
        db, row = self._database, await self._endpoint(request)
        since = self._services.clock() - DELAYS_OF
        latest, _ = await endpoints.list_messages(db, endpoint_id=row.endpoint_id, limit=LATEST)
        return self._render(
            request,
            "endpoint.html",
            row=row,
            flash=flash,
            backlog=(await endpoints.backlogs(db)).get(row.endpoint_id, Backlog()),
            delays=await endpoints.delays(db, row.endpoint_id, since=since),
            latest=latest,
            since=SINCE,
        )

    @action("/endpoints/{endpoint_id:any}/test", show_endpoint)
    async def test(self, request: Request) -> FlashMessage:
        row = await self._endpoint(request)
        try:
            attempt = await self._services.webhooks.test(row.endpoint_id)
        except UnknownEndpoint as error:
            return FlashMessage("bad", f"{error}")
        took = duration(attempt.seconds)
        if attempt.error is None:
            return FlashMessage("good", f"Test event answered {attempt.status} in {took}.")
        return FlashMessage("bad", f"Test event failed after {took}: {attempt.error}.")

    @action("/endpoints/{endpoint_id:any}/enable", show_endpoint)
    async def enable(self, request: Request) -> FlashMessage:
        row = await self._endpoint(request)
        await self._services.webhooks.enable(row.endpoint_id)
        return FlashMessage("good", "Enabled. What waits for it is sent now.")

    @action("/endpoints/{endpoint_id:any}/recover", show_endpoint)
    async def recover(self, request: Request) -> FlashMessage:
        """Sends the failed messages of an endpoint again."""
        form = await read_form(request)
        row = await self._endpoint(request)
        hours = form.get("since", "")
        if hours not in SINCE:
            raise invalid(FieldFault("since", f"must be one of {', '.join(SINCE)}"))
        since = self._services.clock() - timedelta(hours=int(hours))
        count = await self._services.webhooks.recover(row.endpoint_id, since=since)
        return FlashMessage("good", f"Made due now: {counted(count, 'failed message')}. {HELD}")

    @page("/messages")
    async def list_messages(self, request: Request) -> Response:
        filters = read_filters(
            request, {"endpoint": None, "state": MessageState, "event": EventType, "run": None}
        )
        rows, next_cursor = await endpoints.list_messages(
            self._database,
            endpoint_id=filters["endpoint"],
            state=filters["state"],
            event=filters["event"],
            run_id=filters["run"],
            cursor=query_field(request, "cursor"),
            limit=PAGE_SIZE,
        )
        known = [one.endpoint_id for one in await endpoints.list_endpoints(self._database)]
        return self._list(
            request,
            "messages.html",
            next_cursor,
            filters,
            rows=rows,
            endpoints=dict(zip(known, known, strict=True)),
            events={one.value: one.value for one in EventType},
        )

    @page("/messages/{message_id:any}")
    async def show_message(self, request: Request, flash: FlashMessage | None = None) -> Response:
        row = await self._message(request)
        endpoint = await endpoints.get_endpoint(self._database, row.endpoint_id)
        return self._render(
            request,
            "message.html",
            row=row,
            flash=flash,
            attempts=await endpoints.list_attempts(self._database, row.message_id),
            is_handler=endpoint is not None and endpoint.is_handler,
        )

    @action("/messages/{message_id:any}/resend", show_message)
    async def resend(self, request: Request) -> FlashMessage:
        await self._services.webhooks.resend((await self._message(request)).message_id)
        return FlashMessage("good", f"It is due now. {HELD}")

    async def _endpoint(self, request: Request) -> EndpointRow:
        return await self._stored(request, endpoints.get_endpoint, "There is no endpoint {}.")

    async def _message(self, request: Request) -> MessageRow:
        return await self._stored(request, endpoints.get_message, "There is no message {}.")
