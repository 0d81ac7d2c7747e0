"""Endpoints: a signed test event to each of the settings, and what its answer means."""

import asyncio
from typing import Final

from tracker.core.clock import Clock
from tracker.core.formatting import duration
from tracker.delivering.endpoint_client import ANSWER_SECONDS, endpoint_of, send_test
from tracker.operations.doctor import Finding, failed, ok
from tracker.settings import EndpointSettings, Settings

_REFUSED: Final = {
    400: "the signature",
    401: "the signature",
    403: "the signature",
    404: "the path of the url",
    405: "the path of the url",
    410: "whether it is still wanted: 410 disables it",
}
"""What to compare, by the status of an answer."""


async def check(
    settings: Settings, *, clock: Clock, seconds: float = ANSWER_SECONDS
) -> list[Finding]:
    """Send each endpoint a test event, all at once; each answer may take `seconds`."""
    return await asyncio.gather(*(_check(one, clock, seconds) for one in settings.endpoints))


async def _check(configured: EndpointSettings, clock: Clock, seconds: float) -> Finding:
    attempt = await send_test(endpoint_of(configured), clock=clock, answer_seconds=seconds)
    name, took = configured.id, duration(attempt.seconds)
    if attempt.error is None:
        return ok("endpoints", f"{name} answered a test event with {attempt.status} in {took}.")
    if attempt.status is None:
        advice = (
            "Check its url in [[endpoints]], that its server runs and has a valid certificate, and "
            "that this machine may reach it."
        )
    else:
        compare = _REFUSED.get(attempt.status, "its log")
        advice = f"Check {compare}, and that it answers 2xx to events of an unknown type."
        if compare == "the signature":
            advice += (
                " It must have the same secret, and its clock may be off by five minutes at most."
            )
    return failed("endpoints", f"{name} refused a test event: {attempt.error}.", advice)
