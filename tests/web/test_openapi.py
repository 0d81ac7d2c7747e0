"""`/openapi.json`: it describes what there is, and the service keeps to it."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.routing import Route

from tests.support.shares import share_of
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.described import check_described
from tests.web.flora import START, with_flora
from tracker.core.errors import FieldFault
from tracker.web.api import Operation, document, responses
from tracker.web.api.routes import OPERATIONS
from tracker.web.app import build_app
from tracker.web.http.responses import invalid

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
TOKEN = "a-token-for-tests"


async def test_every_route_of_the_api_is_described(small_site: Site) -> None:
    """What is served below /api and what the document lists are the same."""
    served = {
        (method, route.path)
        for route in build_app(small_site.services).routes
        if isinstance(route, Route) and route.path.startswith("/api")
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = (await small_site.client.get("/openapi.json")).json()
    assert served == {
        (method.upper(), path) for path, methods in described["paths"].items() for method in methods
    }


async def test_parameters_keep_their_order(small_site: Site) -> None:
    """Some generated clients have them by position: filters first, then the page."""
    described = (await small_site.client.get("/openapi.json")).json()["paths"]
    parameters = described["/api/starts"]["get"]["parameters"]
    assert [one["name"] for one in parameters] == ["state", "workspace_id", "cursor", "limit"]


async def test_the_document_needs_the_token_too(serve: Serve, sqlite_url: str) -> None:
    """With a token set it is told only to those who have it, and says that it is needed."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        assert (await site.client.get("/openapi.json")).status_code == 401
        shown = await site.client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
        assert shown.json()["security"] == [{"token": []}]
        assert TOKEN not in shown.text


async def test_without_a_token_only_this_machine_is_reported(small_site: Site) -> None:
    """A page whose name was pointed at this machine does not read it."""
    told = await small_site.client.get("/openapi.json", headers={"Host": "evil.example"})
    assert told.status_code == 403
    assert "security" not in (await small_site.client.get("/openapi.json")).json()


def _examples(operation: Operation) -> list[tuple[Any, Any]]:
    """The models that the operation names, each with the examples that it gives."""
    models = [operation.body, *(answer.model for answer in operation.answers.values())]
    return [
        (model, example)
        for model in models
        if model is not None
        for example in model.model_json_schema().get("examples", [])
    ]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_examples_are_valid(operation: Operation) -> None:
    """What the document shows as an example is what its own schema allows."""
    for model, example in _examples(operation):
        model.model_validate(example)


def test_requests_and_answers_have_examples() -> None:
    """A run, an event, a technique, an error and both bodies are shown by example."""
    schemas = document(OPERATIONS, with_token=False)["components"]["schemas"]
    for name in ("Run", "Event", "Technique", "Error", "StartBody", "TrackBody"):
        assert schemas[name]["examples"]


async def test_answers_have_the_described_shape(serve: Serve, sqlite_url: str) -> None:
    """Each field that is shown is described, and each that is described is shown: the client of a
    `Site` checks that of every answer."""
    async with with_flora(serve, sqlite_url) as (site, _):
        run = (await site.client.post("/api/runs", json=START)).json()
        body = event(run["run_id"])
        await site.client.post(PATH, content=body, headers=signed(body))
        run_path = f"/api/runs/{run['run_id']}"
        for path in (run_path, f"{run_path}/events", "/api/runs", "/api/techniques"):
            assert (await site.client.get(path)).status_code == 200, path
        shown = await site.client.get("/api/techniques/icon-pack")
        for wrong in ({**shown.json(), "more": 1}, {"technique_id": "tech_1"}):
            answer = httpx.Response(200, json=wrong, request=shown.request)
            with pytest.raises(ValidationError):
                await check_described(answer)


def test_errors_have_the_described_shape() -> None:
    """With fields and without."""
    responses.Error.model_validate(invalid(FieldFault("a", "b")).body())
    assert responses.Error.model_validate(invalid().body()).error.fields == []


async def _schemathesis(site: Site, folder: Path, *options: str) -> str:
    """Run schemathesis against the service; its report, where it found something."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"),
        *(f"{site.base_url}/openapi.json", "--no-color", *options),
        cwd=folder,
        env={
            "HOME": str(folder),
            "COLUMNS": "100",
            # What Hypothesis has worked out about Unicode: it takes seconds.
            "HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / ".hypothesis"),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    report, _ = await process.communicate()
    return "" if process.returncode == 0 else report.decode()


@pytest.mark.timeout(180)  # a quarter of a minute where the machine has nothing else to do
async def test_the_service_keeps_to_its_description(
    serve: Serve, sqlite_url: str, tmp_path: Path, thorough: bool
) -> None:
    """Schemathesis finds no answer that is not described, and nothing wrong that is accepted: in
    all its phases where that is thorough, else in the one that goes through every constraint, for a
    quarter of the operations."""
    async with with_flora(serve, sqlite_url, run_seconds=0.5) as (site, _):
        await site.services.catalogue_sync.sync()
        options: tuple[str, ...] = ()
        if not thorough:
            names = share_of([one.name for one in OPERATIONS if one.name != "followRuns"], of=4)
            included = (part for name in names for part in ("--include-operation-id", name))
            options = ("--phases", "examples,coverage", *included)
        assert await _schemathesis(site, tmp_path, *options) == ""


@pytest.mark.thorough
@pytest.mark.timeout(180)
async def test_the_service_keeps_to_its_description_with_a_token(
    serve: Serve, sqlite_url: str, tmp_path: Path
) -> None:
    """The same holds where a token is needed, and without it nothing is let in. (What is
    behind the gate: test_auth.py.)"""
    async with with_flora(serve, sqlite_url, token=TOKEN) as (site, _):
        found = await _schemathesis(
            *(site, tmp_path, "-H", f"Authorization: Bearer {TOKEN}"),
            *("--phases", "examples,fuzzing", "-n", "5"),
            # Of all, more wrong tokens would come than one address may send at once.
            *("--include-tag", "runs"),
        )
        assert found == ""
