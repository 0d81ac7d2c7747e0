"""The stream of a tracker of a newer version, and of one that counts its events anew."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.web.serving import serving
from tracker.core.events import EventType
from tracker.delivering.listen import TrackerStream

AT = "2026-06-01T12:00:00.000000Z"


async def _no_runs(request: Request) -> JSONResponse:
    return JSONResponse({"runs": [], "meta": {"next_cursor": None}})


def _frame(number: int, run_id: str) -> str:
    """The change that settled a run."""
    run = {"run_id": run_id, "tracking": "settled", "settled_at": AT}
    data = {"event": {"id": number, "at": AT, "source": "poll"}, "run": run}
    return f"id: {number}\nevent: run\ndata: {json.dumps(data)}\n\n"


async def test_a_stream_that_counts_anew_is_followed_by_its_new_numbers() -> None:
    """As after another database took the place of the first: a reader is reset to the last event of
    that, and goes on there after the next cut."""
    connections = [
        _frame(9, "run_1"),
        "id: 3\nevent: reset\ndata: {}\n\n",
        _frame(4, "run_2"),
    ]
    positions: list[str | None] = []

    async def stream(request: Request) -> Response:
        positions.append(request.headers.get("last-event-id"))
        return Response(connections[len(positions) - 1], media_type="text/event-stream")

    app = Starlette(routes=[Route("/api/stream", stream), Route("/api/runs", _no_runs)])
    lines: list[str] = []
    async with serving(app) as url:
        told = TrackerStream(url, None, wanted=[*EventType], notice=lines.append, now=lambda: AT)
        events = told.events()
        async with asyncio.timeout(20):
            run_ids = [(await anext(events)).run["run_id"] for _ in range(2)]
        await events.aclose()
    assert run_ids == ["run_1", "run_2"]
    assert positions == [None, "9", "3"]
    assert sum("counts its events anew" in line for line in lines) == 1


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

    app = Starlette(routes=[Route("/api/stream", stream), Route("/api/runs", _no_runs)])
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
