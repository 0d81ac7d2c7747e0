"""The whole of it: real processes, real HTTP, and what may stand between."""

import asyncio
import json
import secrets
from functools import partial

import pytest
from sqlalchemy import func, select
from starlette.responses import HTMLResponse

from tests.doctor.conftest import Report
from tests.doctor.proxies import Proxy, in_front, moved
from tests.e2e.processes import Sandbox
from tests.support.forked import Forked
from tests.support.waiting import eventually, free_port
from tracker.core.clock import utc_now
from tracker.operations.doctor import Level, database, webhooks
from tracker.operations.doctor.delivery import FLORA_WAITS
from tracker.settings import read_settings
from tracker.simulator import Simulator
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.queries.sweeps import sweep_health
from tracker.store.queries.workspaces import stored_contacts
from tracker.store.schema import deliveries
from tracker.store.url import DatabaseUrl


async def kept(url: str) -> int:
    """How many deliveries are in the database."""
    async with await Database.open(url) as opened, opened.read() as connection:
        return (await connection.execute(select(func.count()).select_from(deliveries))).scalar_one()


async def _check_callbacks(environ: dict[str, str], timeout: float = FLORA_WAITS) -> Report:
    """What the checks of callbacks find. A machine that stands still for a moment is not slow."""
    settings = read_settings(environ).settings
    url = DatabaseUrl.parse(settings.tracker_database_url)
    looking = asyncio.create_task(database.check(url, clock=utc_now))
    findings = await webhooks.check_callbacks(
        settings, looking, clock=utc_now, timeout=timeout, slow=8.0
    )
    await looking
    return Report({one.name: one for one in findings})


async def _at_work(url: str) -> bool:
    async with await Database.open(url) as opened:
        has_asked = bool(await stored_contacts(opened, now=utc_now()))
        return has_asked and any(one.complete_at for one in await sweep_health(opened))


def test_slow_answers_are_a_warning() -> None:
    """From `SLOW` on, the time of the slowest answer is worth a look."""
    assert webhooks._judge_time(webhooks.SLOW).level is Level.WARNING
    assert webhooks._judge_time(webhooks.SLOW - 0.01).level is Level.OK


def _leave_time() -> None:
    """A machine that stands still for a moment makes neither answers nor notifications late."""
    webhooks.check_callbacks = partial(webhooks.check_callbacks, slow=8.0)  # type: ignore[assignment]
    database.check = partial(database.check, patience=6.0)  # type: ignore[assignment]


async def doctor(sandbox: Sandbox, *arguments: str, **env: str) -> tuple[int, str, str]:
    """The command itself: its exit status, and what it prints."""
    output, errors = (
        sandbox.directory / f"{secrets.token_hex(4)}.{name}" for name in ("out", "err")
    )
    process = Forked.begin(
        *("doctor", *arguments),
        env={"PATH": "/usr/bin:/bin", **sandbox.environment, **env},
        output=output,
        errors=errors,
        folder=sandbox.directory,
        prepare=_leave_time,
    )
    status = await process.wait()
    return status, output.read_text(), errors.read_text()


async def test_a_sound_deployment_is_all_ok(sandbox: Sandbox, flora: Simulator) -> None:
    """Every line is ok, exit status 0, the log stays silent, and nothing is left behind."""
    await sandbox.serve()
    await eventually(lambda: _at_work(sandbox.database_url))
    status, out, err = await doctor(sandbox, "--json")
    report = json.loads(out)
    assert [one for one in report["findings"] if one["level"] != "ok"] == []
    assert (status, report["level"], err) == (0, "ok", "")
    names = [one["name"] for one in report["findings"]]
    assert ("notifications" in names) == sandbox.database_url.startswith("postgres")
    assert await kept(sandbox.database_url) == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_stands_in_front_is_distinguished_from_the_tracker(sandbox: Sandbox) -> None:
    """Each thing that keeps callbacks from coming is named, with what to do about that one."""
    await sandbox.serve("--no-worker")
    up = sandbox.tracker
    html = "<title>Sign in</title>"
    cases: dict[str, tuple[Proxy, str, str, str]] = {
        "redirect": (
            Proxy(upstream=up, answers=moved("https://tracker.example.com")),
            "callbacks",
            "308, a redirect to https://tracker.example.com/callbacks/flora/, and FLORA follows",
            "Set TRACKER_PUBLIC_URL to the address",
        ),
        "wrong path": (
            Proxy(upstream=up, path="/flora"),
            "callbacks",
            "arrives at the tracker, but not as POST /callbacks/flora (404)",
            "forward method and path unchanged",
        ),
        "other site": (
            Proxy(upstream=up, answers=HTMLResponse(html)),
            "callbacks",
            "200 by something in front of the tracker, and does not reach it",
            "forward POST /callbacks/flora to",
        ),
        "no route": (
            Proxy(upstream=up, answers=HTMLResponse(html, 404)),
            "callbacks",
            "404 by something in front",
            "fix the name, port or path in TRACKER_PUBLIC_URL",
        ),
        "sign-in": (
            Proxy(upstream=up, answers=HTMLResponse(html, 401)),
            "callbacks",
            "401 by something in front",
            "without a sign-in",
        ),
        "nobody behind": (
            Proxy(upstream=f"http://127.0.0.1:{free_port()}"),
            "callbacks",
            "502 by something in front of the tracker, which does not reach it",
            "Start `tracker serve`",
        ),
        "slow": (
            Proxy(upstream=up, wait=20),
            "callbacks",
            "gets no answer within 1 s",
            "that `tracker serve` runs and answers",
        ),
        "drops the signature": (
            Proxy(upstream=up, drops="flora-signature"),
            "callbacks",
            "arrives without its Flora-Signature header",
            "forward all request headers",
        ),
        "changes the body": (
            Proxy(upstream=up, changes=True),
            "callbacks",
            "401 by the tracker: The signature is wrong",
            "restart it with the same settings",
        ),
        "takes no body": (
            Proxy(upstream=up, limit=10),
            "callbacks",
            "413 by something in front",
            "client_max_body_size",
        ),
        "takes small bodies": (
            Proxy(upstream=up, limit=4096),
            "body limit",
            "A delivery of 16 KiB is answered 413",
            "client_max_body_size",
        ),
        "takes larger bodies": (
            Proxy(upstream=up, limit=100_000),
            "body limit",
            "A delivery of 256 KiB is answered 413",
            "client_max_body_size",
        ),
    }

    async def one(case: str) -> str | None:
        proxy, name, seen, advice = cases[case]
        async with in_front(proxy) as root:
            environ = sandbox.environment | {"TRACKER_PUBLIC_URL": root}
            found = (await _check_callbacks(environ, 1.0 if proxy.wait else FLORA_WAITS))[name]
        level = Level.WARNING if case == "takes larger bodies" else Level.FAILED
        right = found.level is level and seen in found.seen and advice in found.advice
        assert "hidden" not in found.seen + found.advice
        return None if right else f"{case}: {found}"

    wrong = [await one(case) for case in cases]
    assert [each for each in wrong if each] == []
    assert await kept(sandbox.database_url) == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_interrupted_doctor_deletes_its_deliveries(sandbox: Sandbox) -> None:
    """What is stored and not answered yet is deleted as well on Ctrl-C."""
    await sandbox.serve("--no-worker")
    proxy = Proxy(upstream=sandbox.tracker, holds=True)
    async with in_front(proxy) as root:
        environ = sandbox.environment | {"TRACKER_PUBLIC_URL": root}
        looking = asyncio.create_task(_check_callbacks(environ))
        await eventually(lambda: kept(sandbox.database_url))
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled()
        assert await kept(sandbox.database_url) == 0


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_tracker_with_other_settings_is_detected(
    sandbox: Sandbox, flora: Simulator, empty_sqlite_url: str
) -> None:
    """A process that keeps another database, knows another secret or none, or closes the path for
    want of a token, is told from one that has the doctor's own settings."""
    await migrate.upgrade(empty_sqlite_url)
    secret = {"FLORA_WEBHOOK_SECRET": "whsec_of_another"}
    cases: list[tuple[dict[str, str], dict[str, str], str, str]] = [
        ({}, {"TRACKER_DATABASE_URL": empty_sqlite_url}, "in another database", "DATABASE_URL"),
        ({}, secret, "401 by the tracker: The signature is wrong", "restart it"),
        (
            {},
            {"FLORA_WEBHOOK_SECRET": "whsec_simulator whsec_of_another"},
            "signed with secret 2 is answered 401",
            "restart it",
        ),
        ({"FLORA_WEBHOOK_SECRET": ""}, {}, "has no signing secret", "Set FLORA_WEBHOOK_SECRET"),
        (
            {"TRACKER_API_TOKEN": "a" * 32},
            {"TRACKER_PUBLIC_URL": f"{sandbox.tracker}/taken/off"},
            "not as POST /callbacks/flora (303)",
            "adding or removing a prefix",
        ),
    ]
    serving: dict[str, str] | None = None
    process = None
    for served, looked, seen, advice in cases:
        if served != serving:
            if process is not None:
                await process.end()
            process = await sandbox.serve("--no-worker", **served)
            serving = served
        found = (await _check_callbacks(sandbox.environment | looked))["callbacks"]
        assert found.level is Level.FAILED
        assert seen in found.seen, found
        assert advice in found.advice, found
    assert await kept(sandbox.database_url) == 1, "the one of the tracker with another database"
