"""The options of a simulated FLORA: its workspaces, and how often each of its faults occurs."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
)
from pydantic.dataclasses import dataclass as checked_dataclass

from tracker.core.formatting import requirement

T = TypeVar("T")


def _option(help: str, default: Any = 0, *, secret: bool = False) -> Any:
    """An option that may be changed while the simulator runs. A secret is not shown."""
    return Field(default, description=help, repr=not secret)


def _switch(help: str, default: bool = False) -> Any:
    """An option that is true or false."""
    return _option(help, default)


def parse_rate(text: str) -> float:
    """A share from `0.4` or `40%`.

    Raises `ValueError` for what is no number or lies outside 0 to 1 (0 % to 100 %).
    """
    number = text.strip()
    try:
        rate = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share: give 0 to 1, or 0% to 100%") from None
    if not 0 <= rate <= 1:
        raise ValueError(f"{rate:g} is not a share: give 0 to 1, or 0% to 100%")
    return rate


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _none(value: object) -> object:
    return None if value in ("", "none") else value


def _listed(value: object) -> object:
    return [one for one in value.split(",") if one] if isinstance(value, str) else value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _table(value: object) -> object:
    if isinstance(value, str):
        return dict(part.partition(":")[::2] for part in value.split(",") if part)
    return value


Share = Annotated[float, BeforeValidator(lambda value: parse_rate(str(value)))]
"""A number from 0 to 1: the share of the runs, or of the requests, that is affected."""
Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
"""A whole number; as text also `1e5`."""
AsText = BeforeValidator(str)
"""For words of which some are numbers: JSON may have them as numbers."""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Maybe = Annotated[T | None, BeforeValidator(_none)]
"""A value or none, as text `none`."""
Listed = Annotated[tuple[T, ...], BeforeValidator(_listed)]
"""Values; as text they are separated by commas."""
Table = Annotated[Mapping[Text, T], BeforeValidator(_table)]
"""A mapping from names to values; as text `name:value,name:value`."""

CODES: Final[Mapping[str, int]] = {
    "invalid_json": 400,
    "input_validation_error": 400,
    "unauthorized": 401,
    "invalid_api_key": 401,
    "insufficient_credits": 402,
    "forbidden": 403,
    "paid_plan_required": 403,
    "not_found": 404,
    "conflict": 409,
    "rate_limited": 429,
    "internal_error": 500,
    "unknown_error": 500,
    "service_unavailable": 503,
}
"""FLORA's error codes, each with its status."""


def _known_code(code: str) -> str:
    if code not in CODES:
        raise ValueError(f"must be one of {', '.join(CODES)}")
    return code


Code = Annotated[str, AfterValidator(_known_code)]
GatewayAnswer = Annotated[Literal["502", "503", "504", "404", "empty", "page"], AsText]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedWorkspace:
    """A workspace and the one API key that belongs to it.

    `webhook_secret` may be several, separated by commas: a callback is then signed with each, as
    during a rotation.
    """

    workspace_id: str
    api_key: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    project_id: str = "prj_simulator"

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        """The secrets that sign this workspace's callbacks, at least one."""
        return tuple(secret for part in self.webhook_secret.split(",") if (secret := part.strip()))


@checked_dataclass(
    frozen=True,
    slots=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True),
)
class Options:
    """The options of one simulated FLORA, each with its help text.

    Runs take from half of `run_seconds` to one and a half. `speed` divides their durations, the
    waits between a callback's attempts, and every wait in seconds below, except `retry_after`,
    `callback_timeout`, `cursor_seconds`, the offsets of clocks, and the times of creation
    (`retention`, `history_seconds`). Money is in USD. The faults of a run are decided when it
    starts, those of a request when it is received.

    The options that have a help text may be changed while the simulator runs (`with_changes`).

    Raises `ValueError` where a value is out of its range.
    """

    seed: int = 0
    speed: Positive = 1.0
    run_seconds: Positive = 20.0
    callback_timeout: Positive = 10.0
    project_id: str = "prj_simulator"
    more_workspaces: tuple[SimulatedWorkspace, ...] = ()

    # The workspace
    api_key: Text = _option(
        "API key of the workspace; the previous one is refused", "sk_test_simulator", secret=True
    )
    webhook_secret: Text = _option(
        "secret that signs the callbacks of new runs", "whsec_simulator", secret=True
    )
    workspace_id: Text = _option("workspace that the key belongs to", "ws_simulator")
    shared_key: Flag = _switch(
        "the key sees the other workspaces as well; lists show the runs of all unless they are "
        "asked for one"
    )
    credits: Maybe[Number] = _option(
        "USD that may be spent; starts beyond it are refused with 402", None
    )

    # Callbacks
    drop: Share = _option("share of callbacks that are never sent")
    duplicate: Share = _option("share of callbacks that are sent again after they were accepted")
    early: Share = _option(
        "share of runs that end at once and whose callback precedes the answer to the start"
    )
    late: Share = _option("share of callbacks that are sent three `run_seconds` after the end")
    reorder: Share = _option(
        "share of callbacks delayed by up to one `run_seconds`, so that others overtake them"
    )
    bad_signature: Share = _option(
        "share of callbacks preceded by a forged one with the opposite status"
    )

    # Requests
    rate_limit: Share = _option("share of requests answered 429")
    retry_after: Whole = _option("seconds in the `Retry-After` of a 429", 1)
    errors: Share = _option("share of requests answered 500 or 503; nothing is started")
    cut: Share = _option(
        "share of requests whose connection is cut, before or after they are executed"
    )
    gateway: Share = _option("share of requests answered by a gateway in front of FLORA")
    gateway_starts: Share = _option("the same for starts alone")
    gateway_reads: Share = _option("the same for reads of one run, technique or workspace")
    gateway_pages: Share = _option("the same for lists")
    gateway_answers: Listed[GatewayAnswer] = _option(
        "answers of the gateway: `502`, `503`, `504`, `404` (HTML), `empty` (200 without "
        "body), `page` (200, HTML)",
        ("502", "503", "504"),
    )
    gateway_works: Share = _option("share of these requests that FLORA executes all the same", 1.0)
    gateway_seconds: Maybe[Number] = _option(
        "seconds after which the gateway answers; none: when FLORA has finished", None
    )
    refuse: Table[Code] = _option(
        "routes and the error code that they answer, as `generations.list:not_found`; "
        "`filtered`: lists with a filter",
        {},
    )
    refusals: Share = _option("share of the requests to these routes that are refused", 1.0)
    field_details: Flag = _switch("errors include `code` and `valid_values` of each field")

    # Starts
    slow_starts: Share = _option("share of starts that are answered late")
    slow_seconds: Number = _option("delay of such an answer, in seconds", 25.0)
    slow_run: Literal["first", "last"] = _option(
        "whether the run of a slow start exists from its `first` moment or its `last`", "first"
    )
    failed_starts: Share = _option("share of starts answered 500, in FLORA's shape, without a run")
    lost_starts: Share = _option(
        "share of starts answered 500, in FLORA's shape, although the run exists"
    )
    second_answer: Annotated[Literal["none", "400", "402", "404"], AsText] = _option(
        "error that refuses the next start with the key of a start that was answered 500", "none"
    )
    idempotency: Literal["replay", "conflict"] = _option(
        "a used key returns the original answer for 24 hours (`replay`), or is refused with 409 "
        "for two hours (`conflict`)",
        "replay",
    )
    key_hours: Maybe[Number] = _option("hours after which a key is forgotten", None)
    key_source: Literal["either", "by_type"] = _option(
        "where a key is read: in body or header (`either`); or in the body for technique runs and "
        "in the header for generations (`by_type`)",
        "either",
    )
    keys_known: Literal["at_once", "at_end"] = _option(
        "when a key counts as used: `at_once`, or at the end of its request (`at_end`), so that "
        "two simultaneous requests both start a run",
        "at_once",
    )
    keys_released: Flag = _switch("a start that was answered 500 leaves its key unused")
    colleague: Share = _option(
        "share of starts after which another program starts the same technique, without callback"
    )
    colleague_seconds: Number = _option("seconds between the two starts")
    run_per_value: Flag = _switch("an input with `allow_multiple` starts one run for each value")

    # Techniques
    price_factor: Number = _option("factor for the `run_cost` of every technique", 1.0)
    prices: Table[Number] = _option("the `run_cost` of single techniques, as `icon-pack:20`", {})
    new_inputs: Table[Text] = _option("inputs added to techniques, as `icon-pack:style:text?`", {})

    # Runs
    failures: Share = _option("share of runs that fail", 0.15)
    failure_codes: Listed[Text] = _option(
        "error codes of failed runs; none: the documented ones; `measured`: those measured in "
        "production",
        (),
    )
    full_progress: Flag = _switch("failed runs report a progress of 100")
    queued: Share = _option("share of runs that show `queued_name` as their status until they end")
    queued_name: Text = _option("an undocumented status", "queued")
    cancelled: Share = _option(
        "share of runs that end with `cancelled_name` as their status, without callback and cost"
    )
    cancelled_name: Text = _option("an undocumented final status", "cancelled")
    late_outputs: Share = _option("share of completed runs that show no outputs at first")
    outputs_seconds: Number = _option("seconds between the end and the outputs", 60.0)
    signed_links: Flag = _switch("each read returns output links with a new signature")
    time_unit: Literal["ms", "s"] = _option("unit of a run's times: `ms` or `s`", "ms")

    # The bill
    quotes: Share = _option("share of runs that show a quote as `charged_cost` until they end")
    quote_factor: Number = _option(
        "quote as a multiple of `run_cost`; 0: from 0.25 to 1.5, depending on the seed"
    )
    bill_factor: Number = _option("final cost as a multiple of `run_cost`", 1.0)
    late_bills: Share = _option("share of completed runs that show no cost at first")
    bill_seconds: Listed[Number] = _option(
        "seconds between the end and a late cost or refund; of several, the seed selects one",
        (60.0,),
    )
    missing_bills: Share = _option("share of completed runs that never show a cost")
    corrections: Share = _option(
        "share of completed runs whose first cost is too high or too low and corrected later"
    )
    correction_seconds: Number = _option("seconds between the first cost and the final one", 60.0)
    late_refunds: Share = _option("share of failed runs that show their quote at first")
    refund: Literal["zero", "absent"] = _option(
        "cost of a failed run after its refund: 0 (`zero`), or none (`absent`)", "zero"
    )

    # The history
    history_outputs: Flag = _switch("completed items of lists include outputs and cost", True)
    history: Whole = _option("number of technique runs that ended before the simulator started")
    history_generations: Whole = _option(
        "number of generations that ended before the simulator started"
    )
    history_seconds: Number = _option("seconds over which their creation is spread", 2_592_000.0)
    history_ties: Count = _option(
        "how many of them at a time share a creation time; each page orders these anew", 1
    )
    retention: Maybe[Number] = _option(
        "seconds after their creation at which runs are removed", None
    )
    deletions: Share = _option("share of history pages after which one of their runs is deleted")
    bad_offset: Maybe[Whole] = _option("offset of an item whose page cannot be read", None)
    bad_runs: Listed[Text] = _option("runs whose page cannot be read", ())
    bad_code: Code = _option("error that answers such a page", "input_validation_error")
    bad_bytes: Whole = _option("bytes by which such an item is longer, instead of an error")
    bad_fields: Listed[Text] = _option(
        "fields that are null in such an item, instead of an error", ()
    )
    max_offset: Maybe[Whole] = _option("offset from which pages are answered 400", None)
    cursor_type: Literal["text", "number", "object"] = _option(
        "JSON type of cursors: `text`, `number` or `object`", "text"
    )
    opaque_cursors: Flag = _switch("cursors hide their offset")
    cursor_seconds: Maybe[Number] = _option(
        "age in seconds from which opaque cursors are refused", None
    )
    cursor_epoch: Whole = _option("opaque cursors of another epoch are refused")

    # Clocks
    clock_offset: float = _option("seconds that FLORA's clock is ahead")
    date_offset: float = _option("seconds that the header `Date` is ahead of FLORA's clock")

    def __post_init__(self) -> None:
        keys = [workspace.api_key for workspace in self.workspaces]
        if len(set(keys)) < len(keys):
            raise ValueError("more_workspaces: one key belongs to one workspace")
        if not all(workspace.webhook_secrets for workspace in self.workspaces):
            raise ValueError("webhook_secret: is missing")

    @property
    def workspaces(self) -> tuple[SimulatedWorkspace, ...]:
        """All workspaces, the first one first."""
        first = SimulatedWorkspace(
            workspace_id=self.workspace_id,
            api_key=self.api_key,
            webhook_secret=self.webhook_secret,
            project_id=self.project_id,
        )
        return (first, *self.more_workspaces)

    def seen_by(self, workspace: SimulatedWorkspace) -> tuple[SimulatedWorkspace, ...]:
        """The workspaces that the key of this one sees, its own first."""
        is_first = workspace.api_key == self.api_key
        return self.workspaces if self.shared_key and is_first else (workspace,)

    @property
    def changeable(self) -> dict[str, Any]:
        """The options that may be changed while the simulator runs, by name."""
        return {name: getattr(self, name) for name in HELP}

    def with_changes(self, changes: Mapping[str, object]) -> "Options":
        """A copy with other values, of Python, JSON or text (`40%`, `true`, `a,b`, `a:1,b:2`).

        Raises `ValueError` for options that cannot be changed, and for values out of range.
        """
        for name in changes:
            if name not in HELP:
                raise ValueError(f"{name}: is no option that can be changed")
        try:
            return replace(self, **dict[str, Any](changes))
        except ValidationError as error:
            raise ValueError(fault_of(error)) from None


def fault_of(error: ValueError) -> str:
    """What is wrong with options: the first of its faults, as `name: reason`."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    reason = requirement(first["type"], first["msg"])
    return f"{first['loc'][0]}: {reason}" if first["loc"] else reason


_CHANGEABLE: Final = {
    name: info
    for name, info in Options.__pydantic_fields__.items()  # type: ignore[attr-defined]
    if info.description
}

HELP: Final[Mapping[str, str]] = {name: info.description for name, info in _CHANGEABLE.items()}
"""What each option does that may be changed while the simulator runs."""

SECRETS: Final = frozenset(name for name, info in _CHANGEABLE.items() if not info.repr)
"""The options that are not shown."""
