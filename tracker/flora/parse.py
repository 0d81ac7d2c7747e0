"""FLORA's answers, parsed: runs as observations, techniques, pages and errors.

Parsing is tolerant. Unknown fields and output types are kept or ignored, and an optional field of
the wrong type counts as missing. Only what nothing can be done without (run id and status) is
required: without it `FloraUnreadable` is raised, and no other error ever is.
"""

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar

import orjson

from tracker.core.errors import (
    FieldFault,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    PlanRequired,
    RateLimited,
    ServerFault,
)
from tracker.core.formatting import clean
from tracker.core.observation import Observation, Source
from tracker.core.run import Output, RunError, RunStatus, known
from tracker.core.starts import Port, TechniqueDefinition, is_empty_text

# Readers of single JSON values, whatever their field. Each returns `None` for a value of the wrong
# type, so that one odd value never spoils a whole answer.

LONGEST_ID: Final = 255
_LONGEST_INTEGER: Final = 40
"""Digits."""
LARGEST_NUMBER: Final = 1e15
"""Beyond the year 9999 in milliseconds, and still exact as a float."""
MILLISECONDS_FROM: Final = 1e11
"""Times from here on are in milliseconds."""
_DECIMAL: Final = re.compile(r"\d{1,15}(\.\d{1,30})?", re.ASCII)


def decode(body: bytes) -> object:
    """The JSON value that `body` holds. Raises `FloraUnreadable`.

    The standard library reads what orjson refuses, lone surrogates as well: JavaScript writes them
    for a text that it has cut in the middle of an emoji.
    """
    try:
        return orjson.loads(body)
    except ValueError:
        pass
    try:
        return json.loads(body.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as exc:
        raise FloraUnreadable("the body is not JSON") from exc


def _integer(digits: str) -> int | float:
    """Python refuses to read integers of thousands of digits; nothing that FLORA counts is one."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


def as_object(value: object) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def required_object(value: object, what: str) -> dict[str, Any]:
    """A JSON object. Raises `FloraUnreadable`, which says `what` is none."""
    if not isinstance(value, dict):
        raise FloraUnreadable(f"{what} is not a JSON object")
    return value


def as_objects(value: object) -> tuple[dict[str, Any], ...]:
    """The objects among the items of a list."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value if isinstance(item, dict))


def depth_within(value: object, levels: int) -> bool:
    """Whether lists and objects are nested at most `levels` deep."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(depth_within(item, levels - 1) for item in inner)


def as_text(value: object) -> str | None:
    """A text that is not empty.

    NUL and lone surrogates, which no database stores, are replaced here: what is read again must
    equal what was stored, or every observation would look new.
    """
    if not isinstance(value, str) or not value:
        return None
    return clean(value)


def as_id(value: object) -> str | None:
    """A text short enough to name something."""
    if type(value) is str and 0 < len(value) <= LONGEST_ID and value.isprintable():
        return value  # as nearly all are
    text = as_text(value)
    return text if text is not None and len(text) <= LONGEST_ID else None


def as_number(value: object) -> int | float | None:
    """A number of reasonable size: no NaN and no bool, which is a number in Python."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -LARGEST_NUMBER < value < LARGEST_NUMBER else None


def as_time(value: object) -> datetime | None:
    """A Unix time in seconds or milliseconds, or ISO 8601 with a zone, as aware UTC; 1970 and
    before mean "never"."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            named = moment.tzinfo is not None and moment.timestamp() > 0
            return moment.astimezone(UTC) if named else None
        number = as_number(value)
        if number is None or number <= 0:
            return None
        seconds = number / 1000 if number >= MILLISECONDS_FROM else number
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # after the year 9999
        return None


def as_dollars(value: object) -> Decimal | None:
    """An amount of USD, 0 or more, by the number's shortest decimal form; as a number or text."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    number = as_number(value)
    return None if number is None or number < 0 else Decimal(str(number))


T = TypeVar("T")

LONGEST_MESSAGE: Final = 2000
"""Characters of FLORA's messages, which are shown, passed on and stored."""
MOST_FIELDS: Final = 100
LONGEST_VALUE: Final = 100
CLOCKS_AGREE: Final = timedelta(seconds=5)
"""Clocks that differ by less agree: a header `Date` is exact to the second."""
PLAN_REQUIRED: Final = "paid_plan_required"
_PHRASES: Final = {int(status): status.phrase for status in HTTPStatus}
_REFUSALS: Final[dict[int, type[FloraRefusal]]] = {
    401: KeyRefused,
    403: Forbidden,
    404: NotFound,
    429: RateLimited,
}
DEEPEST: Final = 32
"""How deeply an unknown field may be nested to be kept."""
_SAYS_OPTIONAL: Final = re.compile(
    r"(?<!not )(?<!non-)\b(optional(ly)?\b|(leave|left) (\w+ )?(out|empty|blank)\b)"
    r"|\bnot (required|needed|mandatory)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list.

    `next_cursor` is `None` on the last; `unreadable` are the positions of the items that were left
    out, and why each was.
    """

    items: list[T]
    next_cursor: str | None
    unreadable: dict[int, str]


def run(
    payload: object,
    *,
    source: Source,
    at: datetime,
    sent_at: datetime | None = None,
    clock_offset: timedelta | None = None,
    expect_run_id: str | None = None,
    run_type: str | None = None,
    technique_id: str | None = None,
) -> Observation:
    """A run from a start, a read or the history, requested at `sent_at` and answered at `at`.

    `clock_offset` is FLORA's clock minus ours, to a second or so. `run_type` and `technique_id`
    fill in what FLORA leaves out. Raises `FloraUnreadable` if it is no run, is not `expect_run_id`,
    or a single read has no status; elsewhere one without a status counts as pending, and the run
    is read.
    """
    fields = required_object(payload, "the run")
    run_id = (
        as_id(fields.get("run_id"))
        or as_id(fields.get("technique_run_id"))
        or as_id(fields.get("generation_id"))
    )
    if run_id is None:
        raise FloraUnreadable("the run has no run_id")
    if expect_run_id not in (None, run_id):
        raise FloraUnreadable(f"the answer is about another run ({run_id})")
    name = as_id(fields.get("status"))
    if name is None and source not in (Source.START, Source.HISTORY):
        raise FloraUnreadable(f"run {run_id} has no status")
    lacks_status = True if name is None and source is Source.HISTORY else None
    of_technique, progress = as_object(fields.get("technique")), as_number(fields.get("progress"))
    skew = None
    if clock_offset is not None and abs(clock_offset) > CLOCKS_AGREE:  # as far as a date shows
        skew = clock_offset.total_seconds()
    return Observation(
        run_id=run_id,
        source=source,
        at=at,
        status=RunStatus.PENDING if name is None else known(RunStatus, name),
        progress=None if progress is None else float(min(max(progress, 0), 100)),
        run_type=as_id(fields.get("run_type")) or run_type,
        workspace_id=as_id(fields.get("workspace_id")),
        project_id=as_id(fields.get("project_id")),
        technique_id=as_id(of_technique.get("technique_id")) or technique_id,
        technique_name=as_text(of_technique.get("name")),
        poll_url=as_text(fields.get("poll_url")),
        created_at=as_time(fields.get("created_at")),
        started_at=as_time(fields.get("started_at")),
        completed_at=as_time(fields.get("completed_at")),
        # Without a status it may be a quote or the bill.
        charged_cost=None if lacks_status else as_dollars(fields.get("charged_cost")),
        error=run_error(fields),
        outputs=_outputs(fields.get("outputs")),
        sent_at=sent_at,
        clock_skew=skew,
        lacks_status=lacks_status,
    )


def run_error(fields: dict[str, Any]) -> RunError | None:
    """The error of a run or a callback, if it names one."""
    code, message = as_text(fields.get("error_code")), as_text(fields.get("error_message"))
    return RunError(code or "", message or "") if code or message else None


def _outputs(value: object) -> tuple[Output, ...] | None:
    if not isinstance(value, list):
        return None
    return tuple(
        Output(
            output_id=as_text(output.get("output_id")) or "",
            type=as_text(output.get("type")) or "",
            url=as_text(output["url"]) or "",  # of a text the text itself, which may be empty
        )
        for output in as_objects(value)
        if isinstance(output.get("url"), str)
    )


def page(
    payload: object, key: str, read: Callable[[object], T], *, limit: int | None = None
) -> Page[T]:
    """A page whose items are under `key`, each read by `read`; at most `limit` were asked for.

    An unreadable item does not spoil its page. An empty page is the last, whatever its cursor.
    Raises `FloraUnreadable` if it is no page at all, or does not say whether it is the last: a
    cursor that is neither text nor a whole number, or a full page without `meta`.
    """
    fields = required_object(payload, "the page")
    listed = fields.get(key)
    if not isinstance(listed, list):
        raise FloraUnreadable(f"the page has no list of {key}")
    meta = fields.get("meta")
    if not isinstance(meta, dict) and limit is not None and len(listed) >= limit:
        raise FloraUnreadable("the page is full and has no meta, so it may not be the last")
    cursor = as_object(meta).get("next_cursor")
    if type(cursor) is int:
        cursor = str(cursor)
    if cursor is not None and not isinstance(cursor, str):
        raise FloraUnreadable("the page's next_cursor is neither text nor a whole number")
    items, unreadable = [], {}
    for position, item in enumerate(listed):
        try:
            items.append(read(item))
        except FloraUnreadable as exc:
            unreadable[position] = str(exc)
    next_cursor = as_text(cursor) if listed else None
    return Page(items=items, next_cursor=next_cursor, unreadable=unreadable)


def refusal(
    status: int, body: bytes, *, request_id: str | None = None, retry_after: float | None = None
) -> FloraRefusal:
    """An error answer. One that is not in FLORA's shape, such as a gateway's page, is described by
    its status, and is none of the refusals that only FLORA gives (of the key, or "not found")."""
    try:
        answer = as_object(decode(body))
    except FloraUnreadable:
        answer = {}
    error = as_object(answer.get("error"))
    named = as_id(error.get("code"))
    code = named or f"http_{status}"
    kind = ServerFault if status >= 500 else FloraRefusal
    if named is not None or status == 429:
        kind = _REFUSALS.get(status, kind)
    if status == 403 and code == PLAN_REQUIRED:
        kind = PlanRequired
    message = as_text(error.get("message")) or _PHRASES.get(status, "no message")
    return kind(
        status=status,
        code=code,
        message=message[:LONGEST_MESSAGE],
        fields=[
            FieldFault(
                (as_text(fault.get("field")) or "")[:LONGEST_MESSAGE],
                (as_text(fault.get("message")) or "")[:LONGEST_MESSAGE],
                _valid_values(fault.get("valid_values")),
            )
            for fault in as_objects(error.get("fields"))[:MOST_FIELDS]
        ],
        request_id=request_id,
        retry_after=retry_after,
        from_flora=named is not None,
        run_id=as_id(answer.get("run_id")) or as_id(error.get("run_id")),
    )


def _valid_values(value: object) -> tuple[str, ...]:
    """The valid values of a field as texts; only texts and numbers count."""
    listed = value if isinstance(value, list) else []
    texts = (as_text(str(one)) for one in listed if isinstance(one, str | int | float))
    return tuple(text[:LONGEST_VALUE] for text in texts if text)[:MOST_FIELDS]


def workspace_id(payload: object) -> str:
    """The id of a workspace in a list. Raises `FloraUnreadable`."""
    found = as_id(required_object(payload, "the workspace").get("workspace_id"))
    if found is None:
        raise FloraUnreadable("the workspace has no workspace_id")
    return found


def technique(payload: object) -> TechniqueDefinition:
    """Parse a technique. Raises `FloraUnreadable` without an id."""
    fields = as_object(payload)
    technique_id = as_id(fields.get("technique_id"))
    if technique_id is None:
        raise FloraUnreadable("the technique has no technique_id")
    return TechniqueDefinition(
        technique_id=technique_id,
        name=as_text(fields.get("name")) or technique_id,
        description=as_text(fields.get("description")),
        run_cost=as_dollars(fields.get("run_cost")),
        inputs=_kept(fields.get("inputs")),
        outputs=_kept(fields.get("outputs")),
    )


def _kept(value: object) -> tuple[dict[str, Any], ...]:
    """The objects of a list, without values that are nested too deeply for a database."""
    return tuple(
        {name: inner for name, inner in fields.items() if depth_within(inner, DEEPEST)}
        for fields in as_objects(value)
    )


def ports(objects: Iterable[dict[str, Any]]) -> tuple[Port, ...]:
    """A definition's inputs or outputs; none if one of them has no id.

    A definition that is only partly understood would refuse what FLORA accepts.
    """
    read = [_port(fields) for fields in objects]
    known = tuple(port for port in read if port is not None)
    return known if len(known) == len(read) else ()


def runs_of(technique: TechniqueDefinition, inputs: Iterable[Mapping[str, Any]]) -> int:
    """The number of runs of a start with these inputs: one for each value of an input that accepts
    several, without empty texts, which are not sent."""
    values = Counter(one["id"] for one in inputs if not is_empty_text(one))
    return math.prod(max(values[port.id], 1) for port in ports(technique.inputs) if port.several)


def cost_of(technique: TechniqueDefinition, inputs: Iterable[Mapping[str, Any]]) -> Decimal | None:
    """The price of such a start, in USD; `None` if FLORA names none."""
    return None if technique.run_cost is None else technique.run_cost * runs_of(technique, inputs)


def _port(fields: dict[str, Any]) -> Port | None:
    port_id = as_id(fields.get("id"))
    if port_id is None:
        return None
    description = as_text(fields.get("description")) or ""
    return Port(
        id=port_id,
        type=as_id(fields.get("type")) or "",
        name=as_text(fields.get("name")) or "",
        description=description,
        optional=_may_be_left_out(fields, description),
        several=fields.get("allow_multiple") is True,
        element=fields.get("accepts_element") is True,
        aspect_ratio=as_text(fields.get("specified_aspect_ratio")),
        duration=as_number(fields.get("specified_duration")) or None,  # 0 is no length at all
    )


def _may_be_left_out(fields: dict[str, Any], description: str) -> bool:
    """Whether an input is marked as optional or, without a mark, described as such."""
    if isinstance(fields.get("optional"), bool):
        return fields["optional"] is True
    if isinstance(fields.get("required"), bool):
        return fields["required"] is False
    return _SAYS_OPTIONAL.search(description) is not None


# Cursors of lists, which are offsets as far as FLORA's reference shows.


def circular() -> FloraUnreadable:
    """The error for a list whose cursors lead back to a page that was read."""
    return FloraUnreadable("the list has no end: FLORA gave the same cursor twice")


def offset_of(cursor: str) -> int | None:
    """The offset that a cursor stands for; `None` if it stands for anything else.

    FLORA's reference shows base64url of `{"offset":20}`, without padding (flora-api.md, 6).
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        match json.loads(raw):
            case {"offset": int(offset), **more} if not more and offset >= 0:
                return offset
    except (ValueError, binascii.Error, RecursionError):
        pass
    return None


def cursor_at(offset: int) -> str | None:
    """The cursor of an offset; the top of the list has none."""
    if offset == 0:
        return None
    return base64.urlsafe_b64encode(b'{"offset":%d}' % offset).rstrip(b"=").decode("ascii")
