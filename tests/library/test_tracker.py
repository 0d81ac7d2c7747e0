"""Opening and closing a tracker; callbacks; what the package loads."""

import asyncio
import pickle
import subprocess
import sys
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

import tracker.errors
from tests.library.conftest import INPUTS, MakeTracker
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually
from tests.web.callbacks import event, signed
from tracker import Tracker, errors
from tracker.settings import Settings
from tracker.simulator import Simulator


async def test_it_is_open_once_and_may_be_opened_again(make_tracker: MakeTracker) -> None:
    """Every other use says what to write."""
    tracker = make_tracker()
    with pytest.raises(errors.TrackerNotOpen, match="async with tracker"):
        await tracker.start("icon-pack", INPUTS)
    async with tracker:
        with pytest.raises(errors.TrackerNotOpen, match="open already"):
            async with tracker:
                pass
        run = await tracker.start("icon-pack", INPUTS)
        with pytest.raises(errors.TrackerNotOpen, match="another event loop"):
            await asyncio.to_thread(asyncio.run, tracker.get(run.run_id))
    async with tracker:
        assert (await tracker.get(run.run_id)).run_id == run.run_id
    with pytest.raises(errors.TrackerNotOpen, match="is not open"):
        await run.refresh()


async def test_two_trackers_have_two_databases(
    make_tracker: MakeTracker, empty_sqlite_url: str
) -> None:
    """Each knows its own runs, at the same time."""
    async with make_tracker() as one, make_tracker(tracker_database_url=empty_sqlite_url) as other:
        run = await one.start("icon-pack", INPUTS)
        with pytest.raises(errors.RunUnknown):
            await other.get(run.run_id)


def test_asyncio_run_twice(sqlite_url: str) -> None:
    """One tracker is opened in one loop after another."""
    tracker = Tracker(Settings(tracker_database_url=sqlite_url))

    async def count() -> int:
        async with tracker:
            return len([run async for run in tracker.runs()])

    assert [asyncio.run(count()), asyncio.run(count())] == [0, 0]


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_env` opens nothing, and reports a wrong setting as the commands do."""
    monkeypatch.setenv("TRACKER_DATABASE_URL", "postgresql://nowhere.invalid/tracker")
    assert Tracker.from_env().settings == Tracker().settings != Settings()
    monkeypatch.setenv("TRACKER_API_CONCURRENCY", "many")
    with pytest.raises(errors.SettingsError, match="TRACKER_API_CONCURRENCY"):
        Tracker.from_env()


def test_settings_given_in_a_program_are_those_of_the_variables() -> None:
    """The same texts, and the same errors, which carry no secret."""
    given = Settings(flora_api_key="sk_1", tracker_start_doubt="3m", tracker_budget_day="$5")
    assert Tracker(given).settings.tracker_start_doubt == timedelta(minutes=3)
    wrong: dict[str, Any] = {
        "flora_api_key": "a secret\nof two lines",
        "tracker_api_concurency": 3,
        "tracker_poll_interval": "soon",
        "budgets": [{"usd": -1, "period": "day"}],
    }
    with pytest.raises(errors.SettingsError) as raised:
        Settings(**wrong)
    message = str(raised.value)
    assert "FLORA_API_KEY " in message
    assert "TRACKER_API_CONCURENCY: unknown key; did you mean tracker_api_concurrency?" in message
    assert "TRACKER_POLL_INTERVAL must" in message
    assert "budgets[0].usd must be greater than 0" in message
    assert "secret" not in message
    assert raised.value.__cause__ is raised.value.__context__ is None


async def test_closing_ends_what_is_under_way(make_tracker: MakeTracker, sqlite_url: str) -> None:
    """Calls of other tasks raise `TrackerNotOpen` soon, and do not wait for a closed database."""
    nowhere = "http://127.0.0.1:1/api/v1"
    async with make_tracker(tracker_database_url=sqlite_url, flora_base_url=nowhere) as tracker:
        run = await tracker.track("run_1", force=True)
        waiting = asyncio.create_task(run.wait())
        starting = asyncio.create_task(tracker.start("icon-pack", INPUTS))
        await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        for call in (waiting, starting):
            with pytest.raises(errors.TrackerNotOpen):
                await call


async def test_a_wait_survives_an_outage(
    make_tracker: MakeTracker, own_postgres: PostgresServer, flora: Simulator
) -> None:
    """The database goes away and comes back while a run is waited for."""
    async with make_tracker(tracker_database_url=own_postgres.url("tracker")) as tracker:
        tracker._services().follower.overdue_after = timedelta(seconds=3)  # it is not polled before
        run = await tracker.start("icon-pack", INPUTS)
        waiting = asyncio.create_task(run.wait(timeout=40))
        await asyncio.to_thread(own_postgres.crash)
        with pytest.raises(errors.StoreUnavailable):
            await run.refresh()
        await asyncio.to_thread(own_postgres.start)
        assert (await waiting).succeeded


async def test_a_batch_is_launched_from_a_script(
    tracker: Tracker, make_tracker: MakeTracker, flora: Simulator
) -> None:
    """Each row becomes one run without any worker; the same rows are the same batch. What is
    carried comes back as text."""
    rows = [{"prompt": f"icon {n}", "sku": n, "due": date(2026, 1, 31)} for n in range(3)]
    batch = await tracker.start_batch("icon-pack", rows, name="Icons", tag_columns={"sku": "sku"})
    done = await batch.wait(timeout=40)
    assert (done.rows, done.completed, done.ended) == (3, 3, True)
    results = await done.results()
    assert [one.tags for one in results] == [{"sku": "0"}, {"sku": "1"}, {"sku": "2"}]
    assert results[2].carried == {"sku": "2", "due": "2026-01-31"}
    assert all(one.run is not None and one.run.succeeded for one in results)
    again = await tracker.start_batch("icon-pack", rows)
    assert (await again.wait(timeout=40)).batch_id == batch.batch_id
    assert [one.tags for one in await again.results()] == [one.tags for one in results]
    assert [one.batch_id async for one in tracker.batches()] == [batch.batch_id]
    assert len(flora.world.runs) == 3
    with pytest.raises(errors.InvalidRequest, match=r"rows\.2\.prompt"):
        await tracker.start_batch("icon-pack", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(errors.InvalidRequest, match="SKU: no row has this field for tags"):
        await tracker.start_batch("icon-pack", rows, tag_columns={"sku": "SKU"})
    with pytest.raises(errors.MaxCostReached):
        await tracker.start_batch("icon-pack", [{"prompt": "dear"}], max_cost=0.1)
    with pytest.raises(errors.InvalidRequest, match="only_failed leaves out all rows"):
        await done.retry("unstarted", only_failed=True)
    assert (await (await done.retry(only_failed=True)).wait(timeout=40)).completed == 3
    assert len(flora.world.runs) == 3


async def test_a_batch_is_stopped_from_a_script(small_tracker: Tracker, flora: Simulator) -> None:
    """No further row is started, and a wait ends with the runs that were; one with a limit tells
    how far it has come."""
    flora.world.change({"slow_starts": 1.0, "slow_seconds": 0.3})
    small_tracker._services().batch_worker.renew_after = 0.05
    rows = [{"prompt": f"icon {n}"} for n in range(40)]
    batch = await small_tracker.start_batch("icon-pack", rows)
    waiting = asyncio.create_task(batch.wait(timeout=30))
    await eventually(lambda: bool(flora.world.runs))
    with pytest.raises(errors.WaitTimeout, match=r"has not ended after 0 s: .* of 40 rows have"):
        await batch.wait(timeout=0)
    assert not (stopped := await batch.stop()).launching
    done = await waiting
    assert done.stopped == stopped.stopped == "stopped by python"
    assert 0 < done.completed == len(flora.world.runs) < 40
    assert done.ended
    shown = f"<Batch {done.batch_id} · tech_icon-pack · {done.completed} of 40 rows completed"
    assert repr(done).startswith(shown)
    assert {done, await done.refresh()} == {done}


async def test_the_catalogue_is_read_and_searched(
    make_tracker: MakeTracker, flora: Simulator
) -> None:
    """The first call reads FLORA's list, later ones the stored one; one technique is read with its
    inputs, by its slug too. Without FLORA and without a list, the error says why."""
    async with make_tracker(flora_api_key=None) as tracker:
        with pytest.raises(errors.SettingsError, match="set FLORA_API_KEY"):
            await anext(tracker.techniques())
        with pytest.raises(errors.TechniqueUnknown, match="FLORA_API_KEY is not set"):
            await tracker.technique("icon-pack")
    async with make_tracker() as tracker:
        names = [one.name async for one in tracker.techniques()]
        assert len(names) == len(flora.world.techniques())
        assert names == sorted(names, key=str.lower)
        one = await tracker.technique("icon-pack")
        assert (one.slug, one.obstacle, one.gone_at) == ("icon-pack", None, None)
        assert one.run_cost == Decimal("0.25")
        assert [port["id"] for port in one.inputs] == ["prompt"]
        found = [found async for found in tracker.techniques(f"{one.technique_id} icon")]
        assert found == [one]
        assert repr(one) == f"<Technique icon-pack · {one.name} · $0.25>"
    async with make_tracker(flora_api_key=None) as tracker:
        assert len([one async for one in tracker.techniques()]) == len(names)


async def test_a_callback_is_handed_over(make_tracker: MakeTracker, flora: Simulator) -> None:
    """`receive_callback` stores a signed one, which ends the run; a forged one raises."""
    async with make_tracker() as tracker:
        run = await tracker.start("icon-pack", INPUTS)
        body = event(run.run_id)
        headers = signed(body, flora.world.options.webhook_secret)
        assert make_tracker().verify_callback(body, headers).run_id == run.run_id
        received = await tracker.receive_callback(body, headers)
        assert (received.run_id, received.repeated) == (run.run_id, False)
        assert (await tracker.receive_callback(body, headers)).repeated
        assert (await run.wait(timeout=30)).callback_at is not None
        with pytest.raises(errors.SignatureError):
            await tracker.receive_callback(body + b" ", headers)
        with pytest.raises(errors.SignatureError):
            tracker.verify_callback(body, {})


def test_several_signature_headers_are_one(make_tracker: MakeTracker, flora: Simulator) -> None:
    """As `/callbacks/flora` takes them, whichever is the right one."""
    body = event("run_1")
    secrets = [flora.world.options.webhook_secret, "whsec_b"]
    for order in (secrets, secrets[::-1]):
        pairs = [pair for secret in order for pair in signed(body, secret).items()]
        raw = [(name.lower().encode(), value.encode()) for name, value in pairs]
        assert make_tracker().verify_callback(body, Headers(raw=raw)).run_id == "run_1"


async def test_a_callback_to_an_address_that_no_start_has_is_stored(
    tracker: Tracker, flora: Simulator
) -> None:
    """A framework decodes what stands after `/callbacks/flora/`, which may be anything."""
    for number, token in enumerate(["", "unknown", "\0", "\ud800", "a" * 100]):
        body = event(f"run_{number}")
        headers = signed(body, flora.world.options.webhook_secret)
        received = await tracker.receive_callback(body, headers, token=token)
        assert (received.run_id, received.repeated) == (f"run_{number}", False)


def test_a_signing_secret_that_is_rotated_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open or not: the new one from the first callback on, the old one no longer."""
    secret, config = tmp_path / "secret", tmp_path / "tracker.toml"
    secret.write_text("whsec_old")
    config.write_text('flora_webhook_secret = "file:secret"')
    monkeypatch.setenv("TRACKER_CONFIG", str(config))
    tracker, body = Tracker.from_env(), event("run_1")
    assert tracker.verify_callback(body, signed(body, "whsec_old")).run_id == "run_1"
    secret.write_text("whsec_newer")
    assert tracker.verify_callback(body, signed(body, "whsec_newer")).run_id == "run_1"
    with pytest.raises(errors.SignatureError):
        tracker.verify_callback(body, signed(body, "whsec_old"))


def test_a_signing_secret_that_is_named_before_it_is_there_counts_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is in force until the new file is there, whichever is written first."""
    (tmp_path / "secret").write_text("whsec_old")
    config = tmp_path / "tracker.toml"
    config.write_text('flora_webhook_secret = "file:secret"')
    monkeypatch.setenv("TRACKER_CONFIG", str(config))
    tracker, body = Tracker.from_env(), event("run_1")
    config.write_text('flora_webhook_secret = "file:secret2"')
    for _ in range(2):
        assert tracker.verify_callback(body, signed(body, "whsec_old")).run_id == "run_1"
    (tmp_path / "secret2").write_text("whsec_newer")
    assert tracker.verify_callback(body, signed(body, "whsec_newer")).run_id == "run_1"
    with pytest.raises(errors.SignatureError):
        tracker.verify_callback(body, signed(body, "whsec_old"))


def test_each_tracker_keeps_to_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment named when it was made: another one made since has other secrets."""
    made = {}
    for name in ("one", "other"):
        config = tmp_path / f"{name}.toml"
        config.write_text(f'flora_webhook_secret = "whsec_{name}"')
        monkeypatch.setenv("TRACKER_CONFIG", str(config))
        made[name] = Tracker.from_env()
    (tmp_path / "one.toml").write_text('flora_webhook_secret = "whsec_one_rotated"')
    body = event("run_1")
    assert made["one"].verify_callback(body, signed(body, "whsec_one_rotated")).run_id == "run_1"
    with pytest.raises(errors.SignatureError):
        made["one"].verify_callback(body, signed(body, "whsec_other"))


async def test_outputs_are_downloaded(
    make_tracker: MakeTracker, tmp_path: Path, flora: Simulator
) -> None:
    """`download` waits for the runs, and reports each file, in the order of runs and outputs."""
    async with make_tracker() as tracker:
        runs = [await tracker.start("icon-pack", INPUTS) for _ in range(3)]
        report = await tracker.download(runs, tmp_path / "files", concurrency=0)
        done = await tracker.wait(runs)
    assert report.complete
    assert [one.job.run_id for one in report.results[::4]] == list(
        dict.fromkeys(one.job.run_id for one in report.results)
    )
    for run in done:
        found = [one.job.output for one in report.results if one.job.run_id == run.run_id]
        assert tuple(found) == run.outputs
    assert all(
        (tmp_path / "files" / one.entry.file).exists() for one in report.results if one.entry
    )


def test_importing_it_loads_nothing() -> None:
    """`import tracker` is quick; a script loads neither server nor scheduler."""
    loaded = _modules("import sys, tracker; print(*sys.modules)")
    assert loaded & {"pydantic", "sqlalchemy", "httpx", "asyncio", "tracker.core.errors"} == set()
    loaded = _modules(
        "import asyncio, sys, tracker\n"
        "async def main():\n"
        "    async with tracker.Tracker(tracker.Settings()) as one:\n"
        "        [run async for run in one.runs()]\n"
        "asyncio.run(main())\n"
        "print(*sys.modules)"
    )
    assert "tracker.services" in loaded
    assert loaded & {"apscheduler", "uvicorn", "jinja2", "starlette.routing", "uvloop"} == set()


def _modules(script: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], env={}, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_errors_are_one_tree() -> None:
    """Each public error is in the docstring below its base, and is a `TrackerError`."""
    tree = (tracker.errors.__doc__ or "").split()
    for name in set(tracker.errors.__all__) - {"FieldFault"}:
        assert issubclass(getattr(tracker.errors, name), errors.TrackerError)
        assert name in tree


def test_errors_are_pickled() -> None:
    """A process pool hands on their text and attributes; it breaks if it cannot."""
    price: dict[str, Any] = {
        "budget": "day",
        "left": Decimal(1),
        "renews_at": None,
        "ever_fits": True,
    }
    for error in (
        errors.RunUnknown(["run_1", "run_2"]),
        errors.BudgetExceeded("too dear", **price),
        errors.ServerFault(status=503, code="unavailable", message="later"),
        errors.FloraUnreachable("cut", may_have_acted=True),
        errors.WaitTimeout("run_1 is pending"),
    ):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
