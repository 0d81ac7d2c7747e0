"""A tracker beside a local FLORA, for a first try: `tracker serve --simulate`.

FLORA's settings are replaced by those of the local FLORA, so that nothing reaches the real one.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from pydantic import SecretStr

from tracker.core.errors import SettingsError
from tracker.core.net import is_loopback_url
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running

FLORA: Final = Options(seed=1, run_seconds=5, failures=0.1)
"""Runs of some seconds, of which few fail."""


def check_apart(settings: Settings) -> None:
    """Raise `SettingsError` where a key of the real FLORA is set.

    Its runs and those of the local FLORA must not get into one database.
    """
    real = any(one.api_key for one in settings.all_workspaces)
    if settings.workspaces or (real and not is_loopback_url(settings.flora_base_url)):
        raise SettingsError(
            f"an API key is set for {settings.flora_base_url}, and --simulate would mix its runs "
            "with those of the local FLORA: unset FLORA_API_KEY and TRACKER_CONFIG for it"
        )


def flora_fields(simulator: Simulator) -> dict[str, Any]:
    """The fields of `Settings` with which a tracker uses the local FLORA."""
    options = simulator.world.options
    return {
        "flora_api_key": SecretStr(options.api_key),
        "flora_base_url": simulator.base_url,
        "flora_workspace_id": options.workspace_id,
        "flora_webhook_secret": (SecretStr(options.webhook_secret),),
    }


@asynccontextmanager
async def open_simulated(
    settings: Settings, on_ready: Callable[[Simulator], None]
) -> AsyncIterator[Services]:
    """A local FLORA, and the services that use it; `on_ready` is called once both are open."""
    async with running(FLORA) as simulator:
        own = settings.model_copy(update=flora_fields(simulator))
        async with open_services(own, background=True) as services:
            on_ready(simulator)
            yield services
