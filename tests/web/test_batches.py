"""`/api/batches`: a program starts rows, sees what became of them, and pays each once."""

import csv
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.flora import with_flora
from tracker.simulator import Simulator
from tracker.store.queries import audit
from tracker.worker.scheduler import Worker

ROWS = [{"prompt": f"icon {number}", "sku": number} for number in range(1, 6)]


@asynccontextmanager
async def working(
    serve: Serve, database_url: str, *, worker: bool = True, **options: Any
) -> AsyncIterator[tuple[Site, Simulator]]:
    """A site with a worker in its process."""
    given: dict[str, Any] = {"run_seconds": 0.2, "speed": 10.0} | options
    async with with_flora(serve, database_url, **given) as (site, flora):
        works = Worker(site.services)
        if worker:
            await works.start()
        try:
            yield site, flora
        finally:
            if worker:
                await works.stop()


def body(rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    return {"technique": "icon-pack", "rows": ROWS if rows is None else rows, **more}


async def create(site: Site, status: int, **more: Any) -> dict[str, Any]:
    """The answer to a POST, which has that status."""
    answer = await site.client.post("/api/batches", json=body(**more))
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def shown(site: Site, batch_id: str) -> dict[str, Any]:
    answer = await site.client.get(f"/api/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def rows_of(site: Site, batch_id: str, **query: Any) -> list[dict[str, Any]]:
    answer = await site.client.get(f"/api/batches/{batch_id}/rows", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


async def launched(site: Site, batch_id: str) -> dict[str, Any]:
    """The batch, once no worker starts rows of it any more."""
    found: list[dict[str, Any]] = []

    async def done() -> bool:
        found.append(await shown(site, batch_id))
        return not found[-1]["launching"]

    await eventually(done, timeout=30)
    return found[-1]


def begun(flora: Simulator) -> list[str]:
    return sorted(run.inputs[0]["value"] for run in flora.world.runs.values())


async def test_a_program_gets_from_rows_to_results(serve: Serve, database_url: str) -> None:
    """Rows are stored before the answer and started by the worker; carried fields, tags, costs and
    outputs come back with each row, as JSON and as CSV; the same rows again pay nothing."""
    async with working(serve, database_url) as (site, flora):
        more = {"name": "Spring", "tags": {"client": "acme"}, "tag_columns": {"sku": "sku"}}
        made = await create(site, 201, **more)
        assert (made["name"], made["source"], made["rows"]) == ("Spring", "api", 5)
        batch_id = made["batch_id"]

        async def ended() -> bool:
            return (await shown(site, batch_id))["completed"] == 5

        await eventually(ended, timeout=30)
        assert begun(flora) == [f"icon {number}" for number in range(1, 6)]
        again = await site.client.post("/api/batches", json=body(**more))
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert again.json()["batch_id"] == batch_id
        assert len(flora.world.runs) == 5
        (first, *_) = await rows_of(site, batch_id, limit=2)
        assert first["carried"] == {"sku": "1"}
        assert first["tags"] == {"client": "acme", "sku": "1"}
        assert (first["status"], first["cost"]) == ("completed", 0.25)
        assert first["outputs"][0]["url"].startswith("http")
        answer = await site.client.get(f"/api/batches/{batch_id}/results.csv")
        results = list(csv.DictReader(io.StringIO(answer.text)))
        assert [(row["sku"], row["input.prompt"], row["status"]) for row in results] == [
            (f"{number}", f"icon {number}", "completed") for number in range(1, 6)
        ]
        run = flora.world.runs[first["run_id"]]
        assert run.inputs[0]["value"] == "icon 1"
        await eventually(lambda: is_finished(site, batch_id), timeout=40)
        entries, _ = await audit.list_audit(site.services.database, action="launch", limit=5)
        assert [entry.detail["rows"] for entry in entries] == [5]
        listed = (await site.client.get("/api/batches")).json()["batches"]
        assert [one["batch_id"] for one in listed] == [batch_id]


async def is_finished(site: Site, batch_id: str) -> bool:
    return (await shown(site, batch_id))["finished_at"] is not None
