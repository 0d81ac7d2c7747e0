"""The stream of a tracker of a newer version."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tests.web.serving import serving
from tracker.core.events import EventType
from tracker.delivering.listen import TrackerStream

AT = "2026-06-01T12:00:00.000000Z"


async def test_frames_that_only_a_newer_version_sends_are_passed_over() -> None:
    """So are words that it does not know, in frames that it does; what follows is reported."""

    async def frames() -> AsyncIterator[str]:
        run = {"run_id": "run_1", "tracking": "settled", "settled_at": AT, "status": "nextyear"}
        change = {"id": 6, "at": AT, "source": "nextyear"}
        paused = run | {"tracking": "nextyear"}
        yield 'id: 4\nevent: nextyear\ndata: {"batch": {}}\n\n'
        yield f"id: 5\nevent: run\ndata: {json.dumps({'event': change, 'run': paused})}\n\n"
        yield f"id: 6\nevent: run\ndata: {json.dumps({'event': change, 'run': run})}\n\n"
        await asyncio.sleep(60)

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(frames(), media_type="text/event-stream")

    async def runs(request: Request) -> JSONResponse:
        return JSONResponse({"runs": [], "meta": {"next_cursor": None}})

    app = Starlette(routes=[Route("/api/stream", stream), Route("/api/runs", runs)])
    async with serving(app) as url:
        told = TrackerStream(
            url, None, wanted=[*EventType], notice=lambda line: None, now=lambda: AT
        )
        events = told.events()
        async with asyncio.timeout(20):
            event = await anext(events)
        await events.aclose()
    assert (event.type, event.run["run_id"], event.run["status"]) == (
        EventType.SETTLED,
        "run_1",
        "nextyear",
    )
