"""Endpoints: a test event to each, and what its answer means."""

import asyncio
from typing import Any

import pytest

from tests.support.endpoint import SECRET, Receiver
from tests.support.waiting import eventually, free_port, let_pass
from tracker.core.clock import utc_now
from tracker.delivering.endpoints import send_test
from tracker.operations.doctor import Finding, Level, webhooks
from tracker.settings import EndpointSettings, Settings
from tracker.store.writing.messages import Attempt


def endpoint(id_: str, url: str, *, allow_private: bool = True) -> EndpointSettings:
    """An endpoint with the secret of the receivers."""
    return EndpointSettings(id=id_, url=url, secrets=[SECRET], allow_private=allow_private)


async def findings(*configured: EndpointSettings) -> list[Finding]:
    """What the doctor says of them."""
    return await webhooks.check_endpoints(Settings(endpoints=configured), clock=utc_now)


async def test_an_endpoint_that_answers_is_sound() -> None:
    """It got one test event, signed; without endpoints there is no line."""
    async with Receiver(status=204) as receiver:
        [finding] = await findings(endpoint("shop", receiver.url))
    assert finding.level is Level.OK
    assert finding.seen.startswith("shop answered a test event with 204 in ")
    [got] = receiver.got
    assert (got.event, got.verified) == ("tracker.test", True)
    assert await findings() == []


async def test_what_is_wrong_is_named_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, no answer in time, a refused signature, a private address; all at once, and
    none hides another or shows a secret."""
    done: list[Attempt] = []

    async def noted(*what: Any, **how: Any) -> Attempt:
        done.append(await send_test(*what, **how))
        return done[-1]

    monkeypatch.setattr(webhooks, "send_test", noted)
    async with Receiver(silent=True) as silent, Receiver(status=401) as strict:
        finding = asyncio.create_task(
            findings(
                endpoint("refused", f"http://127.0.0.1:{free_port()}/hook"),
                endpoint("late", silent.url),
                endpoint("unsigned", f"{strict.url}?key=of-the-query"),
                endpoint("private", strict.url.replace("http:", "https:"), allow_private=False),
            )
        )
        await eventually(lambda: silent.got and len(done) == 3)
        let_pass(15)
        refused, late, unsigned, private = await finding
    assert {one.level for one in (refused, late, unsigned, private)} == {Level.FAILED}
    assert "no answer within 15 s" in late.seen
    assert "HTTP 401" in unsigned.seen
    assert "the same secret" in unsigned.advice
    assert "not a public address" in private.seen
    texts = "".join(one.seen + one.advice for one in (refused, late, unsigned, private))
    assert "of-the-query" not in texts
    assert SECRET not in texts
