"""Callbacks received, and events sent: `tracker deliveries`; `endpoints`, `messages`, `listen`."""

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.command import (
    AS_JSON,
    CURSOR,
    LIMIT,
    argument,
    checked,
    configure,
    flag,
    option,
    parse_time,
    print_list,
    run_on_database,
    run_once,
)
from tracker.cli.output import note, plain, print_fields, print_json, print_table
from tracker.core.clock import utc_now
from tracker.core.errors import TrackerError
from tracker.core.events import EventType, MessageState
from tracker.core.formatting import counted, duration, iso_time
from tracker.core.record import DeliveryOutcome

if TYPE_CHECKING:
    from tracker.delivering.listen import StreamedEvent
    from tracker.receiving.apply import Replay
    from tracker.services import Services
    from tracker.store.engine import Database
    from tracker.store.writing.messages import Attempt

deliveries = typer.Typer(
    name="deliveries", help="List, show, replay and acknowledge callbacks.", no_args_is_help=True
)
endpoints = typer.Typer(
    name="endpoints", help="List, test and enable webhook endpoints.", no_args_is_help=True
)
messages = typer.Typer(
    name="messages",
    help="List, show and resend the events sent to endpoints.",
    no_args_is_help=True,
)

ENDPOINT_ID: Final = argument("ENDPOINT_ID", "Its id in the settings, as listed.")
_SENT_BY: Final = "workers send to endpoints that are enabled and in their settings"
_URL: Final = "http://127.0.0.1:8080"
"""Where `tracker serve` listens by default."""


@deliveries.command("list")
def list_deliveries(
    outcome: DeliveryOutcome | None = option("Filter by outcome."),
    run: str | None = option("Filter by run.", metavar="RUN_ID"),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List callbacks, newest first."""
    from tracker.store.queries import deliveries as read
    from tracker.views import delivery_json

    print_list(
        "deliveries",
        partial(read.list_deliveries, outcome=outcome, run_id=run, cursor=cursor, limit=limit),
        delivery_json,
        {
            "delivery": "delivery_id",
            "run": "run_id",
            "event": "event_type",
            "outcome": "outcome",
            "receipts": "receipts",
            "received": "received_at",
            "reason": "reason",
        },
        as_json=as_json,
        hide=("receipts", "event", "reason", "received"),
    )


@deliveries.command("show")
def show_delivery(
    delivery_id: str = argument("DELIVERY_ID", "FLORA's whd_… identifier, as listed."),
    as_json: bool = AS_JSON,
) -> None:
    """Show a callback with its raw body."""
    from tracker.store.queries.deliveries import get_delivery
    from tracker.views import delivery_json

    row = run_on_database(lambda database: get_delivery(database, delivery_id))
    if row is None:
        raise TrackerError(f"delivery {delivery_id} is not known")
    shown = delivery_json(row)
    if as_json:
        print_json(shown)
        return
    print_fields(shown)
    if row.body_removed_at is not None:
        note("Retention has removed its body.")


@deliveries.command()
def replay(
    delivery_ids: list[str] = argument("DELIVERY_ID", "Deliveries to replay.", default=[]),
    every: bool = flag("--all", "Replay all quarantined deliveries, oldest first."),
    as_json: bool = AS_JSON,
) -> int:
    """Apply quarantined callbacks again. Exit status 1 if one is still quarantined."""
    if bool(delivery_ids) == every:
        raise typer.BadParameter("give DELIVERY_IDs, or --all", param_hint="DELIVERY_ID")

    async def work(services: "Services") -> "list[Replay]":
        chosen = delivery_ids or await _quarantined(services)
        return [await services.replayer.replay(one) for one in chosen]

    done = run_once(work)
    if as_json:
        print_json({"deliveries": [asdict(one) for one in done]})
    elif not done:
        note("No delivery is quarantined.")
    else:
        print_table(
            ("delivery", "run", "outcome", "reason"),
            [(one.delivery_id, one.run_id, one.outcome, one.reason) for one in done],
        )
    return 1 if any(one.outcome is DeliveryOutcome.QUARANTINED for one in done) else 0


@deliveries.command()
def acknowledge(
    delivery_ids: list[str] = argument("DELIVERY_ID", "Deliveries to acknowledge.", default=[]),
    every: bool = flag("--all", "Acknowledge all quarantined deliveries."),
    as_json: bool = AS_JSON,
) -> None:
    """Mark quarantined callbacks as seen: pages and alerts stop counting them.

    They stay quarantined, and can still be replayed.
    """
    if bool(delivery_ids) == every:
        raise typer.BadParameter("give DELIVERY_IDs, or --all", param_hint="DELIVERY_ID")

    async def work(services: "Services") -> list[str]:
        from tracker.store.queries.deliveries import get_delivery

        for one in delivery_ids:
            if await get_delivery(services.database, one) is None:
                raise TrackerError(f"delivery {one} is not known")
        chosen = delivery_ids or await _quarantined(services)
        return await services.replayer.acknowledge(chosen)

    done = run_once(work)
    if as_json:
        print_json({"acknowledged": done})
    else:
        note(f"{counted(len(done), 'delivery', 'deliveries')} acknowledged.")


async def _quarantined(services: "Services") -> list[str]:
    from tracker.store.queries import deliveries as read

    found: list[str] = []
    cursor = None
    while True:
        rows, cursor = await read.list_deliveries(
            services.database, outcome=DeliveryOutcome.QUARANTINED, cursor=cursor, limit=100
        )
        found += [row.delivery_id for row in rows]
        if cursor is None:
            return found[::-1]


@endpoints.command("list")
def list_endpoints(as_json: bool = AS_JSON) -> None:
    """List endpoints with their backlog and delays.

    The delays are those of the last day: from an event to the endpoint's 2xx.
    """
    from tracker.views import endpoint_json

    unused = {one.id for one in configure().endpoints}

    async def find(database: "Database") -> tuple[list[dict[str, Any]], None]:
        from tracker.store.queries import endpoints as read

        now = utc_now()
        found = await read.list_states(database, since=now - timedelta(days=1))
        unused.difference_update(one[0].endpoint_id for one in found)
        return [endpoint_json(*one) | {"health": one[0].health(now)} for one in found], None

    print_list(
        "endpoints",
        find,
        dict,
        {
            "endpoint": "endpoint_id",
            "health": "health",
            "pending": "pending",
            "failed": "failed",
            "p95": lambda one: one["delay_p95"] and duration(one["delay_p95"]),
            "url": "url",
            "events": lambda one: ", ".join(one["events"]),
            "last error": "last_error",
        },
        as_json=as_json,
        hide=("events", "p95", "url"),
    )
    if unused:
        names = ", ".join(sorted(unused))
        note(f"tracker: no process sends events to {names} yet: restart those with a worker")


@endpoints.command("test")
def send_test(endpoint_id: str = ENDPOINT_ID, as_json: bool = AS_JSON) -> int:
    """Send a signed test event (tracker.test) to an endpoint of the settings.

    Exit status 1 if the answer is not 2xx.
    """
    attempt = run_once(lambda services: services.webhooks.test(endpoint_id))
    took = duration(attempt.seconds)
    if as_json:
        from tracker.views import values_of

        shown = values_of(attempt, "status", "seconds", "answer", "error")
        print_json({"endpoint_id": endpoint_id} | shown)
    elif attempt.error is None:
        typer.echo(f"{plain(endpoint_id)} answered {attempt.status} in {took}")
    else:
        note(f"tracker: {endpoint_id} failed after {took}: {attempt.error}")
    return 0 if attempt.error is None else 1


@endpoints.command()
def enable(endpoint_id: str = ENDPOINT_ID, as_json: bool = AS_JSON) -> None:
    """Enable a disabled endpoint. What waits for it is sent at once."""
    run_once(lambda services: services.webhooks.enable(endpoint_id))
    if as_json:
        print_json({"endpoint_id": endpoint_id, "state": "enabled"})
    else:
        typer.echo(f"{plain(endpoint_id)} is enabled; workers send what waits for it")


@messages.command("list")
def list_messages(
    endpoint: str | None = option("Filter by endpoint.", metavar="ID"),
    state: MessageState | None = option("Filter by state."),
    event: EventType | None = option("Filter by event."),
    run: str | None = option("Filter by run.", metavar="RUN_ID"),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List messages, newest first."""
    from tracker.store.queries import endpoints as read
    from tracker.views import message_json

    print_list(
        "messages",
        partial(
            read.list_messages,
            endpoint_id=endpoint,
            state=state,
            event=event,
            run_id=run,
            cursor=cursor,
            limit=limit,
        ),
        message_json,
        {
            "message": "message_id",
            "state": "state",
            "event": "event",
            "run": "run_id",
            "endpoint": "endpoint_id",
            "attempts": "attempts",
            "status": "last_status",
            "created": "created_at",
            "next attempt": "next_attempt_at",
            "error": "last_error",
        },
        as_json=as_json,
        hide=("event", "attempts", "status", "endpoint", "next attempt", "created", "error"),
    )


@messages.command("show")
def show_message(
    message_id: str = argument("MESSAGE_ID", "The webhook-id."),
    as_json: bool = AS_JSON,
) -> None:
    """Show a message with its body and its attempts."""
    from tracker.views import message_json

    async def work(database: "Database") -> dict[str, Any] | None:
        from tracker.store.queries import endpoints as read

        row = await read.get_message(database, message_id)
        if row is None:
            return None
        return message_json(row, await read.list_attempts(database, message_id))

    shown = run_on_database(work)
    if shown is None:
        raise TrackerError(f"message {message_id} is not known")
    if as_json:
        print_json(shown)
        return
    attempts = shown.pop("attempt_log")
    body = shown.pop("body")
    print_fields(shown)
    if attempts:
        typer.echo()
        print_table(
            ("attempt", "at", "took", "status", "error", "answer"),
            [
                (
                    *(one["number"], f"{one['at'][:19]}Z", duration(one["seconds"])),
                    *(one["status"], one["error"], one["answer"]),
                )
                for one in attempts
            ],
        )
    typer.echo()
    print_json(body)


@messages.command()
def resend(
    message_ids: list[str] = argument("MESSAGE_ID", "The webhook-ids of the messages."),
    as_json: bool = AS_JSON,
) -> None:
    """Send messages again, whatever their state, under the same webhook-id."""

    async def work(services: "Services") -> None:
        for message_id in message_ids:
            await services.webhooks.resend(message_id)

    run_once(work)
    if as_json:
        print_json({"messages": message_ids})
    else:
        typer.echo(f"{counted(len(message_ids), 'message')} due now; {_SENT_BY}")


@messages.command()
def recover(
    endpoint: str = option("The endpoint.", metavar="ID", default=...),
    since: datetime = option(
        "Messages created since then: an age (24h, 3d) or a time (2026-11-28T03:00Z).",
        metavar="T",
        default=...,
        parser=parse_time,
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Send the failed messages of an endpoint again, after an outage.

    What is still pending for it is sent at once as well.
    """
    count = run_once(lambda services: services.webhooks.recover(endpoint, since=since))
    if as_json:
        print_json({"endpoint_id": endpoint, "failed": count})
    else:
        typer.echo(f"{counted(count, 'failed message')} due now; {_SENT_BY}")


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
    from tracker.core.events import check_secret, new_secret
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
                typer.echo(_event_json(one, answer) if json_lines else _event_line(one, answer))

    asyncio.run(work())


def _event_line(event: "StreamedEvent", answer: "Attempt | None") -> str:
    """Time, event, run and status, then the answer."""
    run = event.run
    text = f"{event.at[:19]}Z {event.type} {run['run_id']} {run['status']}"
    if answer is None:
        return plain(text)
    took = duration(answer.seconds)
    result = answer.error if answer.status is None else f"{answer.status} in {took}"
    return plain(f"{text} → {result}")


def _event_json(event: "StreamedEvent", answer: "Attempt | None") -> str:
    shown: dict[str, Any] = {"message_id": event.message_id, **json.loads(event.body)}
    if answer is not None:
        error = answer.error if answer.status is None else None
        shown |= {"status": answer.status, "error": error}
    return json.dumps(shown, separators=(",", ":"))
