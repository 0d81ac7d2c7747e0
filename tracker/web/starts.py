"""Starts for API and dashboard, with a log of who asked for them."""

from starlette.types import Scope

from tracker.core.log import get_logger
from tracker.services import Services
from tracker.starting.start import Started, StartRequest
from tracker.web.http.request import peer_of

log = get_logger(__name__)


async def start_logged(services: Services, scope: Scope, start: StartRequest) -> Started:
    """Start a run for the sender of an HTTP request; a run that the key had started before is not
    logged as started. Raises like `Starter.start`."""
    by = {"token": start.started_by, "peer": peer_of(scope)}
    # Before anything is sent: whatever becomes of it, the log has who asked for it.
    log.info("run.start_requested", technique=start.technique, key=start.idempotency_key, **by)
    started = await services.starter.start(start)
    if not started.replayed:
        run = started.record.run
        log.info("run.started", run_id=run.run_id, technique_id=run.technique_id, **by)
    return started
