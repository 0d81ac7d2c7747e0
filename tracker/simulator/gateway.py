"""A gateway in front of FLORA that answers in its place while the work behind it may go on."""

import asyncio
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from random import Random
from typing import Any, Final, Literal

from starlette.responses import Response

from tracker.simulator.background import Background
from tracker.simulator.options import Options

Kind = Literal["starts", "reads", "pages"]

_REASONS: Final = {
    "502": "Bad Gateway",
    "503": "Service Temporarily Unavailable",
    "504": "Gateway Time-out",
    "404": "Not Found",
    "page": "Welcome",
}


def kind_of(route: str) -> Kind:
    """What kind of request a route takes."""
    if route.endswith(".start"):
        return "starts"
    return "pages" if route.endswith(".list") else "reads"


class GatewayFault:
    """What the gateway does with one request: it lets it pass, or answers itself."""

    def __init__(self, options: Options, route: str, number: int) -> None:
        rate: float = max(options.gateway, getattr(options, f"gateway_{kind_of(route)}"))
        self.strikes = False
        if not rate:
            return
        random = Random(f"{options.seed}/gateway/{number}")
        self.strikes = random.random() < rate
        self._works = random.random() < options.gateway_works
        self._answer = random.choice(options.gateway_answers or ("502",))
        seconds = options.gateway_seconds
        self._patience = None if seconds is None else seconds / options.speed

    async def answer(
        self,
        work: Callable[[], Coroutine[Any, Any, object]],
        background: Background,
        now_ms: int,
    ) -> Response:
        """The gateway's answer; the work goes on behind it where its request reaches FLORA."""
        if self._works:
            await asyncio.wait({background.run(work())}, timeout=self._patience)
        headers = {"date": formatdate(now_ms / 1000, usegmt=True), "server": "nginx"}
        if self._answer == "empty":
            return Response(status_code=200, headers=headers)
        status = 200 if self._answer == "page" else int(self._answer)
        reason = _REASONS[self._answer]
        title = reason if status == 200 else f"{status} {reason}"
        html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
        return Response(html, status, headers, media_type="text/html")
