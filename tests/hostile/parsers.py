"""The targets that only read: a signature, FLORA's answers, a sheet, a file of settings.

An input begins with a line or two that say what it is; behind an empty line is what is fed in.
"""

import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tests.hostile import reference
from tests.hostile.asgi import headers_of, split
from tracker.core.errors import FloraRefusal, FloraUnreadable, SettingsError
from tracker.core.merge import merge
from tracker.core.observation import Observation, Source
from tracker.flora import caller as waits
from tracker.flora import parse
from tracker.flora.parse import decode
from tracker.flora.signature import SignatureError, sign, verify
from tracker.flora.technique import technique
from tracker.settings import load_settings
from tracker.starting import sheet
from tracker.store.text import clean, clean_observation, dump_json

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOLERANCE = 900
SECRETS = ("whsec_first", "whsec_zweiter_Schlüssel")


# --- signature: `<header>`, an empty line, the body


def signature(data: bytes) -> None:
    """`verify` says what the reference says. `<0>` in a header is the signature that the first
    secret makes now, `<1:1750000000>` what the second one makes then."""
    lines, body = split(data)
    header = re.sub(
        rb"<([01])(?::(\d{1,12}))?>",
        lambda found: _v1(body, SECRETS[int(found[1])], int(found[2] or NOW.timestamp())),
        b"".join(lines).replace(b"<now>", b"%d" % NOW.timestamp()),
    )
    for secrets in (SECRETS, SECRETS[::-1], SECRETS[:1], ("",), ()):
        expected = reference.verdict(
            header, body, secrets, now=int(NOW.timestamp()), tolerance=TOLERANCE
        )
        for form in (header, header.decode(errors="surrogateescape")):
            if isinstance(form, str) and not header.isascii():
                continue  # a server hands over bytes; as text they are another header
            try:
                said: int | str = verify(form, body, secrets, now=NOW, tolerance=TOLERANCE)
            except SignatureError as error:
                said = error.reason
            assert said == expected, (form, said, expected)


def _v1(body: bytes, secret: str, at: int) -> bytes:
    return sign(body, secret, at=at).partition("v1=")[2].encode()


# --- answers: what it answers, an empty line, FLORA's body


def answers(data: bytes) -> None:
    """FLORA's answer becomes what a database holds, or the one error for what cannot be read."""
    lines, body = split(data)
    kind, _, more = b" ".join(lines).decode("latin-1").partition(" ")
    if kind == "refusal":
        status = int(more) if more.isdigit() and more.isascii() and len(more) == 3 else 500
        refused = parse.refusal(status, body, request_id=more or None)
        assert isinstance(refused, FloraRefusal)
        assert refused.code
        assert len(refused.message) <= parse.LONGEST_MESSAGE
        assert len(refused.fields) <= parse.MOST_FIELDS
        told = [text for fault in refused.fields for text in (fault.field, fault.message)]
        assert all(len(text) <= parse.LONGEST_MESSAGE for text in told)
        _fits(refused.code, refused.message, *told)
    elif kind == "wait":
        head = {name.decode(): value.decode("latin-1") for name, value in headers_of(lines[1:])}
        wait = waits.asked_wait(head, now=NOW)
        assert wait is None or 0 <= wait <= waits.LONGEST_WAIT, wait
    elif kind == "callback":
        about = parse.envelope(body, webhook_id=more)
        _fits(about.delivery_id, about.run_id, about.workspace_id, about.event_type)
        seen = parse.callback(body, at=NOW)
        if isinstance(seen, str):
            assert seen
        else:
            _is_sound(seen)
    else:
        for one in runs_in(data):
            _is_sound(one)


def runs_in(data: bytes) -> list[Observation]:
    """The runs that an answer shows, read as the client reads it; none where it is unreadable."""
    lines, body = split(data)
    reader = _READERS.get(b" ".join(lines).decode("latin-1"), _one)
    try:
        return reader(decode(body))
    except FloraUnreadable:
        return []


def _one(payload: object) -> list[Observation]:
    return [parse.run(payload, source=Source.POLL, at=NOW, run_type="technique")]


def _page(key: str, kind: str, payload: object) -> list[Observation]:
    page = parse.page(
        payload, key, partial(parse.run, source=Source.HISTORY, at=NOW, run_type=kind)
    )
    assert page.next_cursor is None or page.items or page.unreadable
    _fits(page.next_cursor)
    return page.items


def _definition(payload: object) -> list[Observation]:
    read_one = technique(payload)
    _fits(read_one.technique_id, read_one.name, read_one.description)
    dump_json([*read_one.inputs, *read_one.outputs])
    assert all(port.id for port in read_one.ports)
    return []


def _catalogue(payload: object) -> list[Observation]:
    parse.page(payload, "techniques", technique)
    return []


_READERS: dict[str, Callable[[object], list[Observation]]] = {
    "run": _one,
    "history": partial(_page, "technique_runs", "technique"),
    "generations": partial(_page, "generations", "generation"),
    "technique": _definition,
    "techniques": _catalogue,
}


def _is_sound(seen: Observation) -> None:
    assert clean_observation(seen) is seen, "what is read again must equal what was stored"
    assert seen.progress is None or 0 <= seen.progress <= 100
    assert seen.charged_cost is None or (seen.charged_cost.is_finite() and seen.charged_cost >= 0)
    for moment in (seen.created_at, seen.started_at, seen.completed_at):
        assert moment is None or moment.utcoffset() is not None
    run = merge(None, seen)
    assert merge(run, seen) is run, "the same sight again says nothing new"


def _fits(*texts: str | None) -> None:
    for text in texts:
        assert text is None or clean(text) == text, text


# --- sheet: `csv` or `jsonl`, an empty line, the file; settings: a TOML file


def sheets(data: bytes) -> None:
    """A sheet is read, or all that is wrong with it is told by line; never anything else."""
    lines, body = split(data)
    kind = b"".join(lines)
    if kind == b"jsonl":
        found = sheet.read_jsonl(body)
    else:
        found = sheet.read_csv(body, delimiter={b"csv;": ";", b"tsv": "\t"}.get(kind, ","))
    lines_at_most = body.count(b"\n") + body.count(b"\r") + 2
    assert all(0 <= problem.line <= lines_at_most for problem in found.problems)
    if not found.problems:
        for row in found.rows:
            assert set(row.cells) <= set(found.columns)
            for values in row.cells.values():
                assert values
                _fits(*values)


@contextmanager
def settings() -> Iterator[Callable[[bytes], None]]:
    """A file is taken or refused in words, and no value in it that is a secret is repeated."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tracker.toml")

        def check(data: bytes) -> None:
            path.write_bytes(data.replace(b"file:", b"env:"))  # not whichever file a fuzzer names
            try:
                said = repr(load_settings({"TRACKER_CONFIG": str(path)}))
                tellable = (*_TELLABLE, "tracker_public_url", "flora_base_url")
            except SettingsError as error:
                said = str(error)
                tellable = _TELLABLE
            assert "hunter2" not in said or _in(data, tellable), said

        yield check


_TELLABLE = ("id", "flora_workspace_id", "tracker_reconcile_cron")
"""Where a value is no secret, and stands in an error or a `repr`."""


def _in(data: bytes, tellable: tuple[str, ...]) -> bool:
    """Whether the mark stands where it may be told: in such a field, a name or a reference."""
    try:
        given = tomllib.loads(data.decode())
    except ValueError:
        return False
    tables = [given, *(one for one in given.get("workspaces", ()) if isinstance(one, dict))]
    named = [name for table in tables for name in table]
    told = [str(table.get(field)) for table in tables for field in tellable]
    return any("hunter2" in text for text in named + told) or b"env:" in data or b"file:" in data
