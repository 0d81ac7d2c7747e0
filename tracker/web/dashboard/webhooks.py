"""`/endpoints` and `/messages`: where events are sent, how that goes, and sending them again."""

from datetime import timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tracker.core.errors import FieldFault
from tracker.core.events import EventType, MessageState
from tracker.core.formatting import counted, duration
from tracker.delivering.webhooks import UnknownEndpoint
from tracker.store.queries import endpoints
from tracker.store.queries.endpoints import Backlog, EndpointRow, MessageRow
from tracker.web.dashboard.forms import query_field, read_filters, read_form
from tracker.web.dashboard.render import FlashMessage, PageGroup, action, page
from tracker.web.http.responses import invalid

PAGE_SIZE: Final = 50
LATEST: Final = 10
"""Messages on the page of an endpoint."""
DELAYS_OF: Final = timedelta(days=1)
"""The delays shown are those of messages this young."""
SINCE: Final = {"1": "Last hour", "24": "Last 24 hours", "72": "Last 3 days", "720": "Last 30 days"}
"""How far back failed messages are sent again, in hours."""
HELD: Final = "A disabled endpoint gets nothing until it is enabled."


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
