"""A FLORA that lies, breaks off and holds back: no end is stored that it did not tell of the run
that was asked for, no run is lost, and the truth is read as soon as it is told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.store.making import merge_timeline
from tests.support.clocks import HandClock
from tests.support.waiting import send_once
from tests.worker.conftest import MakeFlora, OpenServices, reads_of, the_run
from tests.worker.test_poll import poll_to_the_end, start
from tracker.core.record import Record
from tracker.core.run import RunState, RunStatus, Tracking
from tracker.flora.client import FloraClient
from tracker.polling.reading import _read_run
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.store.queries import runs as read


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone. What FLORA says is believed or not before anything is stored."""
    return sqlite_url


RUNNING: dict[str, Any] = {
    "run_id": "run_1",
    "status": "running",
    "progress": 40,
    "created_at": 1_782_900_000_000,
    "started_at": 1_782_900_001_000,
}
ENDED: dict[str, Any] = RUNNING | {
    "status": "completed",
    "progress": 100,
    "completed_at": 1_782_900_060_000,
    "charged_cost": 0.25,
    "outputs": [{"output_id": "out_1", "type": "text", "url": "the words"}],
}
OTHER: dict[str, Any] = ENDED | {"run_id": "run_other"}
WHOLE = json.dumps(ENDED).encode()


class Liar:
    """A FLORA that answers every read with `says`, and every list with `lists`."""

    def __init__(self) -> None:
        self.says: object = RUNNING
        self.lists: list[object] = []
        self.asked: list[str] = []

    def answer(self, path: str) -> bytes | None:
        """The bytes that go out; what is no bytes goes out as JSON. `None` for no answer at all."""
        self.asked.append(path)
        key = path.rpartition("/")[2].partition("?")[0].replace("-", "_")
        if key in ("technique_runs", "generations", "techniques"):
            items = [] if key == "techniques" else self.lists
            return _http({key: items, "meta": {"next_cursor": None}})
        return self.says if isinstance(self.says, bytes) else _http(self.says)


def _http(body: object, *, status: str = "200 OK", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-length: {size}\r\n\r\n".encode() + data


@asynccontextmanager
async def _served(liar: Liar) -> AsyncIterator[str]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # One answer for each connection, which ends with it: so a short one is cut.
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            answer = liar.answer(head.split()[1].decode())
            if answer is None:
                await reader.read()  # until the client hangs up
            else:
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/api/v1"


@pytest.fixture
async def liar() -> Liar:
    return Liar()


@pytest.fixture
async def services(liar: Liar, clock: HandClock, database_url: str) -> AsyncIterator[Services]:
    """A tracker that believes the liar to be FLORA; what fails is not tried again."""
    async with _served(liar) as base_url:
        settings = Settings(
            flora_base_url=base_url, flora_api_key="sk_test_1", tracker_database_url=database_url
        )

        async with open_services(settings, wall=clock, seconds=clock.seconds) as services:
            send_once(services)
            yield services


async def look(services: Services, clock: HandClock) -> Record:
    """Reads the run once, as soon as it is due."""
    due = await services.poller.next_due_at()
    assert due is not None, "nobody looks at the run any more"
    clock.move(max((due - clock()).total_seconds(), 0))
    await services.poller.poll_due()
    return await the_run(services, "run_1")


LIES: dict[str, object] = {
    "another run": OTHER,
    "another run's ids": ENDED | {"run_id": None, "technique_run_id": "run_other"},
    "no run": ENDED | {"run_id": None},
    "a number for an id": ENDED | {"run_id": 1},
    "a list": [ENDED],
    "a page": {"technique_runs": [ENDED], "meta": {}},
    "nothing": None,
    "a text": "completed",
    "a status in a list": ENDED | {"status": ["completed"]},
    "no status": {"run_id": "run_1", "progress": 100},
    "an error that is a success": {"error": {"code": "completed", "message": "completed"}},
    "truncated": _http(WHOLE[:-40]),
    "cut": _http(WHOLE[:-40], length=len(WHOLE)),
    "cut in the head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "no HTTP": WHOLE,
    "nothing at all": b"",
    "empty": _http(b""),
    "a page for people": _http(b"<html>completed</html>"),
    "twice": _http(WHOLE + WHOLE),
    "other bytes": _http(bytes(range(256))),
    "deep": _http(b"[" * 100_000),
    "a failure that holds a run": _http(WHOLE, status="500 Internal Server Error"),
    "a refusal that holds a run": _http(WHOLE, status="400 Bad Request"),
    "a redirect that holds a run": _http(WHOLE, status="302 Found\r\nlocation: /"),
}


async def test_what_cannot_be_believed_changes_nothing(
    services: Services, liar: Liar, clock: HandClock
) -> None:
    """Whatever comes in place of an answer, the run stays as it was and is looked at again, no
    other run comes into being, and the first true answer settles it."""
    await services.tracker.track("run_1", technique="tech_1")
    before = await look(services, clock)
    assert before.run.status is RunStatus.RUNNING
    for name, lie in LIES.items():
        liar.says = lie
        after = await look(services, clock)
        assert after.run == before.run, name
        assert after.tracking is Tracking.ACTIVE, name
        assert after.last_error, name
    runs, _ = await read.list_runs(services.database, limit=10)
    assert [record.run.run_id for record in runs] == ["run_1"]
    liar.says = ENDED
    settled = await look(services, clock)
    assert (settled.tracking, settled.run.status) == (Tracking.SETTLED, RunStatus.COMPLETED)
    assert settled.run == await merge_timeline(services.database, "run_1")


WRONG_TYPES = {
    "progress": ["100", None, [100], {}, True, -1, 1e300],
    "created_at": ["2026-01-01", -5, 0, [], 1e300, True],
    "started_at": [{}, "soon", -1],
    "completed_at": [False, "", 1e17],
    "charged_cost": ["0.25", -3, None, [], True],
    "outputs": ["out_1", 7, {"url": "x"}, [None, 3, "x"], [{"url": 5}], [{"type": "text"}]],
    "error_message": [["boom"], 5, {}],
    "poll_url": [5, ["/"], "file:///etc/passwd", "http://127.0.0.1:9/steal"],
    "technique": ["tech_2", [], 5],
}


async def test_a_field_of_a_wrong_type_costs_that_field_alone(
    services: Services, liar: Liar, clock: HandClock
) -> None:
    """A run whose fields hold nonsense is read for what is left, and nonsense is never stored."""
    await services.tracker.track("run_1", technique="tech_1")
    before = await look(services, clock)
    for name, values in WRONG_TYPES.items():
        for value in values:
            liar.says = RUNNING | {name: value}
            after = (await look(services, clock)).run
            assert after.status is RunStatus.RUNNING
            assert (after.outputs, after.error) == (before.run.outputs, before.run.error)
            assert (after.created_at, after.charged_cost) == (before.run.created_at, None)
            assert (after.started_at, after.technique_id) == (before.run.started_at, "tech_1")
    liar.says = ENDED
    assert (await look(services, clock)).tracking is Tracking.SETTLED


async def test_an_end_is_not_taken_back(services: Services, liar: Liar, clock: HandClock) -> None:
    """Lists that call an ended run pending, running, younger or empty change nothing; another end
    is kept as a contradiction, and completed stands."""
    await services.tracker.track("run_1", technique="tech_1")
    liar.says = ENDED
    ended = await look(services, clock)
    assert ended.tracking is Tracking.SETTLED
    [workspace] = services.workspaces
    for lie in (
        {"status": "pending", "progress": 0, "created_at": 1_000},
        {"status": "running", "progress": 3, "started_at": 5, "completed_at": 4},
        {"outputs": [], "charged_cost": 0.25},
        {"outputs": None, "charged_cost": None, "progress": 1},
    ):
        liar.lists = [ENDED | lie]
        assert (await services.sweeper.sweep(workspace)).error is None
        record = await the_run(services, "run_1")
        # A cost that an unfinished run shows is a quote, whenever it is shown.
        assert replace(record.run, quoted_cost=None) == ended.run, lie
    for lie in ({"status": "failed", "error_code": "model_timeout"}, {"charged_cost": 7}):
        clock.move(1)
        liar.lists = [ENDED | lie]
        await services.sweeper.sweep(workspace)
    record = await the_run(services, "run_1")
    assert record.run.charged_cost == 7
    assert record.run.status is RunStatus.COMPLETED
    assert record.run.conflict
    assert record.run.outputs == ended.run.outputs
    assert record.run == await merge_timeline(services.database, "run_1")


async def test_contradictory_ends_settle_on_one(
    services: Services, liar: Liar, clock: HandClock
) -> None:
    """A list that says failed and a read that says completed leave one end, and show that they
    disagreed."""
    await services.tracker.track("run_1", technique="tech_1")
    await look(services, clock)
    [workspace] = services.workspaces
    liar.lists = [RUNNING | {"status": "failed", "error_code": "model_timeout"}]
    await services.sweeper.sweep(workspace)
    assert (await the_run(services, "run_1")).run.status is RunStatus.FAILED
    liar.lists = [ENDED]
    await services.sweeper.sweep(workspace)
    record = await the_run(services, "run_1")
    assert (record.run.status, record.run.error) == (RunStatus.COMPLETED, None)
    assert (record.run.conflict, record.tracking) == (True, Tracking.SETTLED)
    assert record.run == await merge_timeline(services.database, "run_1")


async def test_a_poll_url_of_another_run_does_not_hide_this_one(
    services: Services, liar: Liar, clock: HandClock
) -> None:
    """Where the `poll_url` that came with a run leads to another run's, the run is read another
    way."""

    def honest(path: str) -> bytes:
        liar.asked.append(path)
        return _http(OTHER if path.endswith("run_other") else ENDED)

    liar.answer = honest  # type: ignore[method-assign]
    [workspace] = services.workspaces
    base = str(workspace.require_client()._urls.base)
    poll_url = f"{base}/techniques/tech_1/runs/run_other"
    await services.tracker.track("run_1", technique="tech_1", poll_url=poll_url)
    record = await look(services, clock)
    assert any(path.endswith("run_other") for path in liar.asked)
    assert (record.tracking, record.run.status) == (Tracking.SETTLED, RunStatus.COMPLETED)


ELSEWHERE: dict[str, bytes | None] = {
    "a page for people": _http(b"<html>a run</html>"),
    "no such page": _http(b"<html>404</html>", status="404 Not Found"),
    "a redirect": _http(b"", status="302 Found\r\nlocation: /login"),
    "a fault": _http({"error": {"code": "internal_error"}}, status="500 Internal Server Error"),
    "no session": _http({"error": {"code": "unauthorized"}}, status="401 Unauthorized"),
    "no access": _http({"error": {"code": "forbidden"}}, status="403 Forbidden"),
    "a cut connection": b"",
    "silence": None,
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
async def test_a_poll_url_that_leads_past_the_api_hides_no_run(
    services: Services,
    liar: Liar,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: str,
) -> None:
    """Whatever answers a `poll_url` on FLORA's origin in place of the API, or nothing does, the run
    is read another way, and neither the key nor FLORA is blamed."""
    monkeypatch.setattr("tracker.polling.reading.WAY_SECONDS", 1.0)

    def answer(path: str) -> bytes | None:
        liar.asked.append(path)
        return ELSEWHERE[elsewhere] if path.startswith("/app/") else _http(ENDED)

    liar.answer = answer  # type: ignore[method-assign]
    await services.tracker.track("run_1", technique="tech_1", poll_url="/app/runs/run_1")
    record = await look(services, clock)
    assert [path for path in liar.asked if path.startswith("/app/")] == ["/app/runs/run_1"]
    assert (record.tracking, record.run.status) == (Tracking.SETTLED, RunStatus.COMPLETED)
    [workspace] = services.workspaces
    assert not workspace.require_client().breaker.open
    assert services.poller.readable() == [workspace]


@pytest.mark.parametrize("technique", ["tech_1", None])
@pytest.mark.parametrize("answered", [None, ELSEWHERE["a fault"]])
async def test_a_way_to_read_a_run_that_fails_or_hangs_leaves_the_others(
    services: Services,
    liar: Liar,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    technique: str | None,
    answered: bytes | None,
) -> None:
    """Where neither the address of the run's technique, which is its poll_url, nor the history
    answers, `/runs/{id}` does. No address is asked twice."""
    monkeypatch.setattr("tracker.polling.reading.WAY_SECONDS", 1.0)

    def answer(path: str) -> bytes | None:
        liar.asked.append(path)
        return _http(ENDED) if path.endswith("/api/v1/runs/run_1") else answered

    liar.answer = answer  # type: ignore[method-assign]
    poll_url = "/api/v1/techniques/tech_1/runs/run_1"
    await services.tracker.track("run_1", technique=technique, poll_url=poll_url)
    record = await look(services, clock)
    assert (len(liar.asked), liar.asked[0]) == (2 if technique else 3, poll_url)
    assert (record.tracking, record.run.status) == (Tracking.SETTLED, RunStatus.COMPLETED)


@pytest.mark.parametrize("first", [None, ELSEWHERE["a fault"]])
async def test_a_slow_answer_shows_a_run_that_no_other_way_shows(
    services: Services,
    liar: Liar,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    first: bytes | None,
) -> None:
    """FLORA may read technique runs below their techniques alone. Where it was slow there, or
    failed once, it is asked again, and waited for."""
    monkeypatch.setattr("tracker.polling.reading.WAY_SECONDS", 1.0)
    unknown = _http({"error": {"code": "not_found"}}, status="404 Not Found")
    answers = iter([first, _http(ENDED)])

    def answer(path: str) -> bytes | None:
        liar.asked.append(path)
        return next(answers) if "/techniques/" in path else unknown

    liar.answer = answer  # type: ignore[method-assign]
    await services.tracker.track("run_1", technique="tech_1")
    record = await look(services, clock)
    assert len(liar.asked) == 3
    assert (record.tracking, record.run.status) == (Tracking.SETTLED, RunStatus.COMPLETED)


async def test_a_page_that_is_read_again_shows_its_runs_once(
    services: Services, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the technique that it names for a run did not answer the first time."""
    monkeypatch.setattr("tracker.polling.reading.WAY_SECONDS", 1.0)
    lean = {"run_id": "run_1", "status": "completed", "technique": {"technique_id": "tech_1"}}
    page = _http({"technique_runs": [OTHER, lean], "meta": {"next_cursor": None}})
    answers = iter([None, _http(ENDED)])

    def answer(path: str) -> bytes | None:
        if path.endswith("/api/v1/runs/run_1"):
            return _http({"error": {"code": "not_found"}}, status="404 Not Found")
        return next(answers) if "/techniques/" in path else page

    liar.answer = answer  # type: ignore[method-assign]
    [workspace] = services.workspaces
    found = await _read_run(workspace.require_client(), RunState(run_id="run_1"), fresh=False)
    assert found.observation is not None
    assert sorted(one.run_id for one in found.others) == ["run_1", "run_other"]


async def test_a_rate_limit_of_minutes_costs_nothing_but_the_minutes(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Told for five minutes to come again in two, the tracker asks a few times in all, blames no
    run, and reads every one of them afterwards."""
    async with make_flora(retry_after=120) as flora:
        services: Services = await open_on(flora)
        run_ids = await start(services, 20)
        [workspace] = services.workspaces
        async with FloraClient(
            base_url=flora.base_url,
            api_key=flora.world.options.api_key,
            clock=clock,
            monotonic=lambda: clock().timestamp(),
            sleep=_turning(clock),
        ) as workspace.client:
            flora.world.options = flora.world.options.with_changes({"rate_limit": 1.0})
            asked = sum(reads_of(flora).values())
            until = clock().timestamp() + 300
            while clock().timestamp() < until:
                clock.move(5)
                await services.poller.poll_due()
            assert sum(reads_of(flora).values()) - asked <= 20
            for run_id in run_ids:
                record = await the_run(services, run_id)
                assert (record.checks, record.last_error) == (0, None)
                assert (record.tracking, record.lease_holder) == (Tracking.ACTIVE, None)
            flora.world.options = flora.world.options.with_changes({"rate_limit": 0.0})
            await poll_to_the_end(services, clock, within=900)
        for run_id in run_ids:
            assert (await the_run(services, run_id)).tracking is Tracking.SETTLED


def _turning(clock: HandClock) -> Callable[[float], Any]:
    """A sleep that turns the clock instead."""

    async def sleep(seconds: float) -> None:
        clock.move(seconds)
        await asyncio.sleep(0)

    return sleep
