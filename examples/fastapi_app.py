"""A FastAPI application that starts a run for each order and keeps the result in its own table.

    pip install fastapi uvicorn
    export FLORA_API_KEY=sk_live_… FLORA_WEBHOOK_SECRET=whsec_…
    export TRACKER_PUBLIC_URL=https://shop.example.com/flora TRACKER_API_TOKEN=…
    uvicorn fastapi_app:app

    curl -X POST "http://127.0.0.1:8000/orders/17?prompt=garden+tools"
    curl http://127.0.0.1:8000/orders/17

FLORA's callbacks arrive under /flora/callbacks/flora, and the dashboard is at /flora/. Without
TRACKER_PUBLIC_URL there are no callbacks, and runs are polled.
"""

import json
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from typing import Any

from fastapi import FastAPI, HTTPException

from tracker import RunEvent, Tracker

tracker = Tracker.from_env()


def shop() -> closing[sqlite3.Connection]:
    """The application's own database."""
    return closing(sqlite3.connect("shop.db", isolation_level=None))


@tracker.on("run.settled", name="store-result")
def store_result(event: RunEvent) -> None:
    """Store the result. It is called at least once for each run, so it may replace a row."""
    run = event.run
    urls = json.dumps([output.url for output in run.outputs])
    with shop() as database:
        database.execute(
            "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)",
            (run.tags["order"], run.status, str(run.charged_cost), urls),
        )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open the tracker with the application, and close it with it."""
    with shop() as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS results (order_id PRIMARY KEY, status, cost, urls)"
        )
    async with tracker:  # handlers, polling and callbacks run from here to the end
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/flora", tracker.asgi())


@app.post("/orders/{order}", status_code=202)
async def start(order: str, prompt: str) -> dict[str, Any]:
    """Start the order's run. Repeated for the same order, it returns the same run."""
    run = await tracker.start(
        "icon-pack", {"prompt": prompt}, idempotency_key=f"order-{order}", tags={"order": order}
    )
    return {"run_id": run.run_id, "status": run.status}


@app.get("/orders/{order}")
def show(order: str) -> dict[str, Any]:
    """The stored result of the order."""
    with shop() as database:
        row = database.execute(
            "SELECT status, cost, urls FROM results WHERE order_id = ?", (order,)
        ).fetchone()
    if row is None:
        raise HTTPException(404, "no result yet")
    status, cost, urls = row
    return {"status": status, "cost_usd": cost, "urls": json.loads(urls)}
