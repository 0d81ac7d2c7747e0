"""The targets that only parse: a signature, FLORA's answers, a sheet, a settings file.

An input begins with a line or two that describe it; after an empty line follow the parsed bytes.
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
from tracker.core.formatting import clean
from tracker.core.observation import Observation, Source, merge
from tracker.flora import http as waits
from tracker.flora import parse
from tracker.flora.callback import SignatureError, delivery_of, observation_of, sign, verify
from tracker.flora.parse import decode, ports, technique
from tracker.settings import load_settings
from tracker.starting import sheet
from tracker.store.engine import dump_json
from tracker.store.writing.writer import cleaned

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOLERANCE = 900
SECRETS = ("whsec_first", "whsec_zweiter_Schlüssel")


# --- signature: `<header>`, an empty line, the body


def signature(data: bytes) -> None:
    """`verify` agrees with the reference. `<0>` in a header is the present signature of the first
    secret, `<1:1750000000>` that of the second one at a time."""
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
                continue  # a server passes bytes; as text they are another header
            try:
                result: int | str = verify(form, body, secrets, now=NOW, tolerance=TOLERANCE)
            except SignatureError as error:
                result = error.reason
            assert result == expected, (form, result, expected)


def _v1(body: bytes, secret: str, at: int) -> bytes:
    return sign(body, secret, at=at).partition("v1=")[2].encode()


# --- answers: what it answers, an empty line, FLORA's body


def answers(data: bytes) -> None:
    """FLORA's answer becomes values that a database can hold, or one error."""
    lines, body = split(data)
    kind, _, more = b" ".join(lines).decode("latin-1").partition(" ")
    if kind == "refusal":
        status = int(more) if more.isdigit() and more.isascii() and len(more) == 3 else 500
        refused = parse.refusal(status, body, request_id=more or None)
        assert isinstance(refused, FloraRefusal)
        assert refused.code
        assert len(refused.message) <= parse.LONGEST_MESSAGE
        assert len(refused.fields) <= parse.MOST_FIELDS
        texts = [text for fault in refused.fields for text in (fault.field, fault.message)]
        assert all(len(text) <= parse.LONGEST_MESSAGE for text in texts)
        _fits(refused.code, refused.message, *texts)
    elif kind == "wait":
        head = {name.decode(): value.decode("latin-1") for name, value in headers_of(lines[1:])}
        wait = waits.retry_after_of(head, now=NOW)
        assert wait is None or 0 <= wait <= waits.LONGEST_WAIT, wait
    elif kind == "callback":
        about = delivery_of(body, at=NOW, webhook_id=more)
        _fits(about.delivery_id, about.run_id, about.workspace_id, about.event_type)
        observation = observation_of(body, at=NOW)
        if isinstance(observation, str):
            assert observation
        else:
            _is_sound(observation)
    else:
        for one in runs_in(data):
            _is_sound(one)


def runs_in(data: bytes) -> list[Observation]:
    """The runs in an answer, parsed as the client does; none where it is unreadable."""
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
    assert all(port.id for port in ports(read_one.inputs))
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


def _is_sound(observation: Observation) -> None:
    assert cleaned(observation) is observation, "a stored observation must be read unchanged"
    assert observation.progress is None or 0 <= observation.progress <= 100
    assert observation.charged_cost is None or (
        observation.charged_cost.is_finite() and observation.charged_cost >= 0
    )
    for moment in (observation.created_at, observation.started_at, observation.completed_at):
        assert moment is None or moment.utcoffset() is not None
    run = merge(None, observation)
    assert merge(run, observation) is run, "a repeated observation must change nothing"


def _fits(*texts: str | None) -> None:
    for text in texts:
        assert text is None or clean(text) == text, text


# --- sheet: `csv` or `jsonl`, an empty line, the file; settings: a TOML file


def sheets(data: bytes) -> None:
    """A sheet is parsed, or all its problems are listed by line."""
    lines, body = split(data)
    kind = b"".join(lines)
    if kind == b"jsonl":
        found = sheet.read_jsonl(body)
    else:
        found = sheet.read_csv(body, delimiter={b"csv;": ";", b"tsv": "\t"}.get(kind))
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
    """A file is accepted or refused with a message, which repeats no secret."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tracker.toml")

        def check(data: bytes) -> None:
            path.write_bytes(data.replace(b"file:", b"env:"))  # no file that a fuzzer names
            try:
                result = repr(load_settings({"TRACKER_CONFIG": str(path)}))
                public = (*_PUBLIC, "tracker_public_url", "flora_base_url")
            except SettingsError as error:
                result = str(error)
                public = _PUBLIC
            assert "hunter2" not in result or _in(data, public), result

        yield check


_PUBLIC = ("id", "flora_workspace_id", "tracker_reconcile_cron")
"""Fields without secrets, whose values may appear in an error or a `repr`."""


def _in(data: bytes, public: tuple[str, ...]) -> bool:
    """Whether the mark is in a public place: such a field, a name or a reference."""
    try:
        settings_file = tomllib.loads(data.decode())
    except ValueError:
        return False
    tables = [
        settings_file,
        *(one for one in settings_file.get("workspaces", ()) if isinstance(one, dict)),
    ]
    named = [name for table in tables for name in table]
    values = [str(table.get(field)) for table in tables for field in public]
    return any("hunter2" in text for text in named + values) or b"env:" in data or b"file:" in data
