"""FLORA's official SDK works against the simulator, unchanged."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tracker.simulator import Options, Simulator, running
from tracker.simulator.catalogue import load_catalogue

HERE = Path(__file__).parent / "sdk"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "@flora-ai" / "flora").is_dir(),
        reason="FLORA's SDK is not installed: `make install` does it where npm is",
    ),
]


async def _tour(simulator: Simulator) -> dict[str, Any]:
    """What the SDK sees."""
    process = await asyncio.create_subprocess_exec(
        str(NODE),
        "tour.mjs",
        cwd=HERE,
        env={"PATH": os.environ["PATH"]} | simulator.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    seen: dict[str, Any] = json.loads(output)
    return seen


async def test_the_official_sdk_works_unchanged() -> None:
    """Lists, reads, starts, pages, errors and callbacks are what the SDK expects of FLORA."""
    async with running(Options(speed=100, failures=0.4)) as simulator:
        seen = await _tour(simulator)
        await simulator.quiet()
        records = {run["run_id"]: run for run in simulator.world.records()}
        deliveries = simulator.world.deliveries

    assert seen["techniques"] == list(load_catalogue())
    assert seen["searched"] == ["tech_mugshot"]
    assert seen["technique"] == load_catalogue()["tech_icon-pack"].definition()

    started = [run["run_id"] for run in seen["started"]]
    ends = [records[run_id]["end"] for run_id in started]
    assert {run["status"] for run in seen["started"]} == {"pending"}
    assert seen["ended"] == ends
    assert {end["status"] for end in ends} == {"completed", "failed"}
    assert seen["replay"] == {"run_id": seen["first"], "replayed": "true"}

    for callback, end in zip(seen["callbacks"], ends, strict=True):
        assert callback["event"]["type"] == f"run.{end['status']}"
        assert callback["event"]["data"]["run_id"] == end["run_id"]
        assert callback["event"]["data"].get("error_code") == end.get("error_code")
        assert callback["mirrored"]
        assert callback["wrong"] == "WebhookVerificationError"
    assert [sent.status for sent in deliveries] == [204] * 6

    listed = [item["technique_run_id"] for item in seen["history"]]
    assert listed == [seen["first"], *reversed(started)]

    generation = seen["generation"]["run_id"]
    assert seen["generationCallback"]["event"]["data"]["run_type"] == "generation"
    assert seen["generationRead"] == records[generation]["end"]
    assert [item["generation_id"] for item in seen["generations"]] == [generation]

    errors = seen["errors"]
    assert {name: (error["type"], error["status"]) for name, error in errors.items()} == {
        "badInput": ("BadRequestError", 400),
        "unknown": ("NotFoundError", 404),
        "badKey": ("AuthenticationError", 401),
        "usedKey": ("UnprocessableEntityError", 422),
    }
    assert errors["badInput"]["error"]["fields"][0]["field"] == "inputs"
    assert errors["badKey"]["error"]["code"] == "invalid_api_key"
    assert all(error["requestId"].startswith("req_") for error in errors.values())


async def test_the_official_sdk_copes_with_faults() -> None:
    """With rate limits, server errors and forged callbacks the SDK's own retries suffice."""
    options = Options(
        seed=7, speed=100, rate_limit=0.06, errors=0.06, retry_after=0, bad_signature=0.5
    )
    async with running(options) as simulator:
        seen = await _tour(simulator)
        assert any(status in (429, 500, 503) for _, status in simulator.world.counts)
        assert any(
            sent.kind == "forged" and sent.status == 401 for sent in simulator.world.deliveries
        )
        started = [run["run_id"] for run in seen["started"]]
        ends = {run["run_id"]: run["end"] for run in simulator.world.records()}
    assert seen["ended"] == [ends[run_id] for run_id in started]
