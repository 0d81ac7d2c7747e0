"""Every committed input keeps the promise of its target, and what is read is also stored.

`python -m bench.fuzz` goes on from the same inputs for as long as one likes. One that it finds goes
into the corpus, under a name that says what it is.
"""

import contextlib
from functools import reduce

import pytest

from tests.hostile import parsers, served
from tests.hostile.inputs import corpus
from tests.hostile.targets import FETCHED, READING, SERVED, opened
from tracker.core.merge import merge
from tracker.core.record import Seen
from tracker.services import open_services
from tracker.settings import Settings
from tracker.store.queries import runs as read


@pytest.mark.parametrize("name", READING)
def test_what_only_reads_keeps_its_promise(name: str) -> None:
    """`verify` agrees with the reference of its rule; an answer, a sheet and a file of settings
    become what they say, or the one error that says why not."""
    _replay(name, None)


@pytest.mark.parametrize("name", SERVED)
def test_what_is_asked_over_http_keeps_its_promise(name: str, database_url: str) -> None:
    """Each callback that is authentic is on disk as it came, applied or quarantined as the
    reference has it; no request is answered 500, leads elsewhere or signs somebody in."""
    _replay(name, database_url)


@pytest.mark.parametrize("name", FETCHED)
def test_what_is_fetched_keeps_its_promise(name: str) -> None:
    """Whatever a file's server answers, the file is there whole, or one named error says why not
    and nothing stands under its name."""
    _replay(name, None)


async def test_whatever_flora_answers_is_stored(database_url: str) -> None:
    """A run reads from either database as it was merged, with NUL and half characters in it."""
    sights = [seen for data in corpus("answers").values() for seen in parsers.runs_in(data)]
    assert len(sights) > 20
    async with open_services(Settings(tracker_database_url=database_url)) as services:
        for seen in sights:
            await services.writer.submit(Seen(observation=seen))
        for run_id in {seen.run_id for seen in sights}:
            record = await read.get_run(services.database, run_id)
            assert record is not None
            of_run = [seen for seen in sights if seen.run_id == run_id]
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
def test_a_target_can_fail(target: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tracker differs from what is promised, its target says so."""
    monkeypatch.setattr(parsers, "verify", lambda *_, **__: 1)
    monkeypatch.setattr(served.reference, "_name", lambda _: "another id")
    monkeypatch.setattr(parsers, "clean_observation", lambda seen: object())
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
