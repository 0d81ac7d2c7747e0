"""The served application with a FLORA behind it that spends nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.waiting import NO_SWEEPS
from tests.web.conftest import Serve, Site
from tracker.simulator import Options, Simulator, running
from tracker.web.http import Limits

START = {
    "technique": "icon-pack",
    "inputs": [{"id": "prompt", "type": "text", "value": "tools"}],
}


@asynccontextmanager
async def with_flora(
    serve: Serve,
    database_url: str,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Site, Simulator]]:
    """A site, and its FLORA, whose runs do not fail unless `options` say so."""
    async with (
        running(Options(**({"failures": 0} | options))) as flora,
        serve(
            database_url,
            limits=limits,
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            flora_workspace_id=flora.world.options.workspace_id,
            tracker_api_token=token,
            tracker_poll_interval=0.2,
            tracker_reconcile_cron=NO_SWEEPS,
        ) as site,
    ):
        yield site, flora
