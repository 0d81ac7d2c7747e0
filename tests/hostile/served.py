"""The targets behind HTTP routes and a database: callbacks, and all other routes."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from tests.hostile import reference
from tests.hostile.asgi import Answer, ask, headers_of, split
from tests.hostile.parsers import NOW, SECRETS, TOLERANCE
from tracker.core.record import TEST_DELIVERY, DeliveryOutcome
from tracker.flora.callback import sign
from tracker.services import Services
from tracker.store.queries import overview
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import get_delivery
from tracker.web.app import build_app
from tracker.web.http import Limits

WORKSPACE = "ws_1"
TOKEN = "a-token-of-the-tests"
Asks = Callable[[bytes], Awaitable[None]]


# --- callback: headers, an empty line, the body; signed unless the headers have a signature


def callback(services: Services) -> Asks:
    """Every authentic callback is stored byte for byte when it is answered, and nothing else."""
    app, limit = build_app(services), Limits().callback_bytes

    async def check(data: bytes) -> None:
        lines, body = split(data)
        headers = headers_of(lines)
        signatures = [value for name, value in headers if name == b"flora-signature"]
        if not signatures:
            headers.append((b"flora-signature", sign(body, SECRETS[1], at=NOW).encode()))
        signed = not signatures or isinstance(
            reference.verdict(
                b",".join(signatures), body, SECRETS, now=int(NOW.timestamp()), tolerance=TOLERANCE
            ),
            int,
        )
        if len(body) > limit or not signed:
            await services.applier.drain()
            kept = await overview.counts(services.database, now=NOW)
            answer = await ask(app, "POST", b"/callbacks/flora", headers, body)
            assert answer.status == (413 if len(body) > limit else 401), answer
            assert await overview.counts(services.database, now=NOW) == kept
            return
        answer = await ask(app, "POST", b"/callbacks/flora", headers, body)
        assert answer.status == 200, answer
        await services.applier.drain()
        ids = [value.decode("latin-1") for name, value in headers if name == b"flora-webhook-id"]
        await _is_kept(services, body, ids[-1] if ids else None, json.loads(answer.body))

    return check


async def _is_kept(
    services: Services, body: bytes, webhook_id: str | None, answer: dict[str, Any]
) -> None:
    expected = reference.reading(body, webhook_id, workspace_id=WORKSPACE)
    if reference.nesting(body) > 500:  # the depth at which a parser gives up may differ
        return
    row = await get_delivery(services.database, expected.delivery_id)
    if row is not None and row.body != body:
        row = await get_delivery(services.database, expected.digest)
    assert row is not None, expected
    assert (row.body, row.run_id) == (body, expected.run_id)
    # A new delivery waits; a repeated one is answered with its outcome.
    assert answer["outcome"] == (row.outcome.value if answer["repeated"] else "waiting"), row
    assert answer["repeated"] is (row.receipts > 1), row
    if expected.ends_run:
        assert expected.run_id is not None
        record = await read.get_run(services.database, expected.run_id)
        assert record is not None
        assert record.run.precedence.ended, record
    test = row.event_type == TEST_DELIVERY
    assert (row.outcome is DeliveryOutcome.APPLIED) is (expected.ends_run or test), row


# --- api: `METHOD target`, headers, an empty line, the body; with the token unless they have one


def api(services: Services) -> Asks:
    """No request is answered 500, redirected to another site, or signed in."""
    app = build_app(services)

    async def check(data: bytes) -> None:
        lines, body = split(data)
        method, _, target = (lines or [b"POST /api/runs"])[0].partition(b" ")
        target = re.sub(
            rb"[^!-~]", lambda found: b"%%%02X" % found[0][0], target.partition(b" ")[0]
        )
        headers = headers_of(lines[1:])
        names = {name for name, _ in headers}
        if not names & {b"authorization", b"cookie"}:
            headers.append((b"authorization", b"Bearer " + TOKEN.encode()))
        verb = method.decode("latin-1").upper()
        verb = verb if re.fullmatch(r"[A-Z]{1,20}", verb) else "GET"
        target = target if target.startswith(b"/") else b"/" + target
        answer = await ask(app, verb, target, headers, body)
        _is_proper(answer, target, body)

    return check


def _is_proper(answer: Answer, target: bytes, body: bytes) -> None:
    assert answer.status < 500 or answer.status == 503, answer
    assert answer.header("x-content-type-options") == "nosniff"
    assert "frame-ancestors 'none'" in (answer.header("content-security-policy") or "")
    for name, value in answer.headers:
        assert not re.search(r"[\0\r\n]", name + value), (name, value)
    for name in ("location", "hx-redirect"):
        where = answer.header(name)
        assert where is None or re.match(r"/(?![/\\])", where), where
    if answer.header("set-cookie") is not None:
        assert target.startswith((b"/login", b"/logout")), target
        assert answer.status == 303
    if answer.status >= 400 and target.startswith(b"/api/"):
        error = json.loads(answer.body)["error"]
        assert error["code"]
        assert error["message"]
    assert TOKEN.encode() not in answer.body or TOKEN.encode() in target + body
