"""Every committed input keeps the promises of its target, and observations are stored unchanged.

`python -m bench.fuzz` fuzzes from the same inputs for any time. Inputs that it finds are added to
the corpus under descriptive names.
"""

import contextlib
from functools import reduce

import pytest

from tests.hostile import parsers, served
from tests.hostile.inputs import corpus
from tests.hostile.targets import FETCHED, READING, SERVED, opened
from tracker.core.observation import merge
from tracker.core.record import Observed
from tracker.services import open_services
from tracker.settings import Settings
from tracker.store.queries import runs as read


@pytest.mark.parametrize("name", READING)
def test_parsers_keep_their_promises(name: str) -> None:
    """`verify` agrees with the reference of its rule; an answer, a sheet and a settings file are
    parsed, or refused with one error."""
    _replay(name, None)


@pytest.mark.parametrize("name", SERVED)
def test_routes_keep_their_promises(name: str, database_url: str) -> None:
    """Each authentic callback is stored unchanged, applied or quarantined as in the reference; no
    request is answered 500, redirected to another site, or signed in."""
    _replay(name, database_url)


@pytest.mark.parametrize("name", FETCHED)
def test_downloads_keep_their_promises(name: str) -> None:
    """For every answer of a file's server the file is stored complete, or one error describes why
    not and no file has its name."""
    _replay(name, None)


async def test_every_answer_of_flora_is_stored(database_url: str) -> None:
    """A run is read from either database as it was merged, with NUL and half characters."""
    observations = [one for data in corpus("answers").values() for one in parsers.runs_in(data)]
    assert len(observations) > 20
    async with open_services(Settings(tracker_database_url=database_url)) as services:
        for one in observations:
            await services.writer.submit(Observed(observation=one))
        for run_id in {one.run_id for one in observations}:
            record = await read.get_run(services.database, run_id)
            assert record is not None
            of_run = [one for one in observations if one.run_id == run_id]
            assert record.run == reduce(merge, of_run, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "data"),
    [
        ("signature", b"t=<now>,v1=<0>\n\n{}"),
        ("callback", b"\n\n{}"),
        ("answers", b'run\n\n{"run_id": "r", "status": "running"}'),
        ("api", b"GET /login\n\n"),
    ],
)
def test_targets_can_fail(target: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tracker breaks a promise, its target fails."""
    monkeypatch.setattr(parsers, "verify", lambda *_, **__: 1)
    monkeypatch.setattr(served.reference, "_name", lambda _: "another id")
    monkeypatch.setattr(parsers, "cleaned", lambda one: object())
    monkeypatch.setattr(served, "TOKEN", "TRACKER_API_TOKEN")  # the page names it
    with opened(target) as check, pytest.raises(AssertionError):
        check(data)


def _replay(name: str, database_url: str | None) -> None:
    with opened(name, database_url) as check:
        for label, data in corpus(name).items():
            with _named(f"tests/hostile/corpus/{name}/{label}"):
                check(data)


@contextlib.contextmanager
def _named(label: str):  # type: ignore[no-untyped-def]
    try:
        yield
    except Exception as error:
        error.add_note(label)
        raise
