"""`tracker listen`: forwards the events of a running tracker to a local address."""

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.options import checked, flag, option
from tracker.cli.output import note, plain
from tracker.cli.setup import configure
from tracker.core.clock import utc_now
from tracker.core.events import EventType
from tracker.core.formatting import duration, iso_time

if TYPE_CHECKING:
    from tracker.delivering.listen import StreamedEvent
    from tracker.store.writing.messages import Attempt

_URL: Final = "http://127.0.0.1:8080"
"""Where `tracker serve` listens by default."""


def listen(
    forward_to: str | None = option("Address to send events to.", "--forward-to", metavar="URL"),
    event: list[EventType] | None = option("Events to forward. Repeatable.", show_default="all"),
    only_print: bool = flag("--print", "Show events; forward nothing."),
    url: str | None = option(
        "Root of the tracker.",
        metavar="TRACKER",
        show_default="TRACKER_PUBLIC_URL, else http://127.0.0.1:8080",
    ),
    token: str | None = option(
        "API token with the scope read.", show_default="that of TRACKER_API_TOKEN"
    ),
    secret: str | None = option(
        "Signing secret (whsec_…).", metavar="WHSEC", show_default="a new one, shown"
    ),
    json_lines: bool = flag("--json-lines", "Print a line of JSON for each event."),
) -> None:
    """Forward the events of a running tracker to a local address, while you develop.

    Events are sent as an endpoint receives them, from now on, until the command is interrupted. A
    failed answer is shown and not tried again.
    """
    if (forward_to is None) != only_print:
        raise typer.BadParameter("give either an address or --print", param_hint="--forward-to")
    settings = configure()
    from tracker.delivering.signing import check_secret, new_secret
    from tracker.settings.values import check_endpoint_url, check_root_url

    root = checked(check_root_url, url or settings.tracker_public_url or _URL, "--url")
    target = None if forward_to is None else checked(check_endpoint_url, forward_to, "--forward-to")
    key = new_secret() if secret is None else checked(check_secret, secret, "--secret")
    if token is None and settings.tracker_api_token:
        token = settings.tracker_api_token[0].get_secret_value()
    wanted = list(event or EventType)
    if target is not None:
        signed = key if secret is None else "the secret of --secret"
        note(f"Forwarding {', '.join(wanted)} to {target}, signed with {signed}")

    async def work() -> None:
        from tracker.delivering.listen import TrackerStream, forward, local_client

        stream = TrackerStream(
            root, token, wanted=wanted, notice=note, now=lambda: iso_time(utc_now())
        )
        async with aclosing(stream.events()) as events, AsyncExitStack() as stack:
            client = None
            if target is not None:
                client = await stack.enter_async_context(aclosing(local_client(target, key)))
            async for one in events:
                answer = None if client is None else await forward(client, one)
                typer.echo(_json(one, answer) if json_lines else _line(one, answer))

    asyncio.run(work())


def _line(event: "StreamedEvent", answer: "Attempt | None") -> str:
    """Time, event, run and status, then the answer."""
    run = event.run
    text = f"{event.at[:19]}Z {event.type} {run['run_id']} {run['status']}"
    if answer is None:
        return plain(text)
    took = duration(answer.seconds)
    result = answer.error if answer.status is None else f"{answer.status} in {took}"
    return plain(f"{text} → {result}")


def _json(event: "StreamedEvent", answer: "Attempt | None") -> str:
    shown: dict[str, Any] = {"message_id": event.message_id, **json.loads(event.body)}
    if answer is not None:
        error = answer.error if answer.status is None else None
        shown |= {"status": answer.status, "error": error}
    return json.dumps(shown, separators=(",", ":"))
