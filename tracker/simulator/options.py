"""The options of a simulated FLORA: its workspaces, and how often each of its faults occurs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

from tracker.simulator.option_types import (
    Parse,
    choice,
    flag,
    listed,
    number,
    one_of,
    parse_number,
    parse_positive,
    share,
    table,
    text,
    whole,
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
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
    speed: float = 1.0
    run_seconds: float = 20.0
    callback_timeout: float = 10.0
    project_id: str = "prj_simulator"
    more_workspaces: tuple[SimulatedWorkspace, ...] = ()

    # The workspace
    api_key: str = text(
        "API key of the workspace; the previous one is refused", "sk_test_simulator", secret=True
    )
    webhook_secret: str = text(
        "secret that signs the callbacks of new runs", "whsec_simulator", secret=True
    )
    workspace_id: str = text("workspace that the key belongs to", "ws_simulator")
    shared_key: bool = flag(
        "the key sees the other workspaces as well; lists show the runs of all unless they are "
        "asked for one"
    )
    credits: float | None = number(
        "USD that may be spent; starts beyond it are refused with 402", None
    )

    # Callbacks
    drop: float = share("share of callbacks that are never sent")
    duplicate: float = share("share of callbacks that are sent again after they were accepted")
    early: float = share(
        "share of runs that end at once and whose callback precedes the answer to the start"
    )
    late: float = share("share of callbacks that are sent three `run_seconds` after the end")
    reorder: float = share(
        "share of callbacks delayed by up to one `run_seconds`, so that others overtake them"
    )
    bad_signature: float = share(
        "share of callbacks preceded by a forged one with the opposite status"
    )

    # Requests
    rate_limit: float = share("share of requests answered 429")
    retry_after: int = whole("seconds in the `Retry-After` of a 429", 1)
    errors: float = share("share of requests answered 500 or 503; nothing is started")
    cut: float = share(
        "share of requests whose connection is cut, before or after they are executed"
    )
    gateway: float = share("share of requests answered by a gateway in front of FLORA")
    gateway_starts: float = share("the same for starts alone")
    gateway_reads: float = share("the same for reads of one run, technique or workspace")
    gateway_pages: float = share("the same for lists")
    gateway_answers: tuple[str, ...] = listed(
        "answers of the gateway: `502`, `503`, `504`, `404` (HTML), `empty` (200 without "
        "body), `page` (200, HTML)",
        "502",
        "503",
        "504",
        each=one_of("502", "503", "504", "404", "empty", "page"),
    )
    gateway_works: float = share("share of these requests that FLORA executes all the same", 1.0)
    gateway_seconds: float | None = number(
        "seconds after which the gateway answers; none: when FLORA has finished", None
    )
    refuse: Mapping[str, str] = table(
        "routes and the error code that they answer, as `generations.list:not_found`; "
        "`filtered`: lists with a filter",
        one_of(*CODES),
    )
    refusals: float = share("share of the requests to these routes that are refused", 1.0)
    field_details: bool = flag("errors include `code` and `valid_values` of each field")

    # Starts
    slow_starts: float = share("share of starts that are answered late")
    slow_seconds: float = number("delay of such an answer, in seconds", 25.0)
    slow_run: str = choice(
        "whether the run of a slow start exists from its `first` moment or its `last`",
        "first",
        "last",
    )
    failed_starts: float = share("share of starts answered 500, in FLORA's shape, without a run")
    lost_starts: float = share(
        "share of starts answered 500, in FLORA's shape, although the run exists"
    )
    second_answer: str = choice(
        "error that refuses the next start with the key of a start that was answered 500",
        "none",
        "400",
        "402",
        "404",
    )
    idempotency: Literal["replay", "conflict"] = choice(
        "a used key returns the original answer for 24 hours (`replay`), or is refused with 409 "
        "for two hours (`conflict`)",
        "replay",
        "conflict",
    )
    key_hours: float | None = number("hours after which a key is forgotten", None)
    key_source: str = choice(
        "where a key is read: in body or header (`either`); or in the body for technique runs and "
        "in the header for generations (`by_type`)",
        "either",
        "by_type",
    )
    keys_known: str = choice(
        "when a key counts as used: `at_once`, or at the end of its request (`at_end`), so that "
        "two simultaneous requests both start a run",
        "at_once",
        "at_end",
    )
    keys_released: bool = flag("a start that was answered 500 leaves its key unused")
    colleague: float = share(
        "share of starts after which another program starts the same technique, without callback"
    )
    colleague_seconds: float = number("seconds between the two starts")
    run_per_value: bool = flag("an input with `allow_multiple` starts one run for each value")

    # Techniques
    price_factor: float = number("factor for the `run_cost` of every technique", 1.0)
    prices: Mapping[str, float] = table(
        "the `run_cost` of single techniques, as `icon-pack:20`", parse_number
    )
    new_inputs: Mapping[str, str] = table("inputs added to techniques, as `icon-pack:style:text?`")

    # Runs
    failures: float = share("share of runs that fail", 0.15)
    failure_codes: tuple[str, ...] = listed(
        "error codes of failed runs; none: the documented ones; `measured`: those measured in "
        "production"
    )
    full_progress: bool = flag("failed runs report a progress of 100")
    queued: float = share("share of runs that show `queued_name` as their status until they end")
    queued_name: str = text("an undocumented status", "queued")
    cancelled: float = share(
        "share of runs that end with `cancelled_name` as their status, without callback and cost"
    )
    cancelled_name: str = text("an undocumented final status", "cancelled")
    late_outputs: float = share("share of completed runs that show no outputs at first")
    outputs_seconds: float = number("seconds between the end and the outputs", 60.0)
    signed_links: bool = flag("each read returns output links with a new signature")
    time_unit: Literal["ms", "s"] = choice("unit of a run's times: `ms` or `s`", "ms", "s")

    # The bill
    quotes: float = share("share of runs that show a quote as `charged_cost` until they end")
    quote_factor: float = number(
        "quote as a multiple of `run_cost`; 0: from 0.25 to 1.5, depending on the seed"
    )
    bill_factor: float = number("final cost as a multiple of `run_cost`", 1.0)
    late_bills: float = share("share of completed runs that show no cost at first")
    bill_seconds: tuple[float, ...] = listed(
        "seconds between the end and a late cost or refund; of several, the seed selects one",
        60.0,
        each=parse_number,
    )
    missing_bills: float = share("share of completed runs that never show a cost")
    corrections: float = share(
        "share of completed runs whose first cost is too high or too low and corrected later"
    )
    correction_seconds: float = number("seconds between the first cost and the final one", 60.0)
    late_refunds: float = share("share of failed runs that show their quote at first")
    refund: str = choice(
        "cost of a failed run after its refund: 0 (`zero`), or none (`absent`)", "zero", "absent"
    )

    # The history
    history_outputs: bool = flag("completed items of lists include outputs and cost", True)
    history: int = whole("number of technique runs that ended before the simulator started")
    history_generations: int = whole(
        "number of generations that ended before the simulator started"
    )
    history_seconds: float = number("seconds over which their creation is spread", 2_592_000.0)
    retention: float | None = number("seconds after their creation at which runs are removed", None)
    deletions: float = share("share of history pages after which one of their runs is deleted")
    bad_offset: int | None = whole("offset of an item whose page cannot be read", None)
    bad_runs: tuple[str, ...] = listed("runs whose page cannot be read")
    bad_code: str = choice("error that answers such a page", "input_validation_error", *CODES)
    bad_bytes: int = whole("bytes by which such an item is longer, instead of an error")
    bad_fields: tuple[str, ...] = listed(
        "fields that are null in such an item, instead of an error"
    )
    max_offset: int | None = whole("offset from which pages are answered 400", None)
    cursor_type: str = choice(
        "JSON type of cursors: `text`, `number` or `object`", "text", "number", "object"
    )
    opaque_cursors: bool = flag("cursors hide their offset")
    cursor_seconds: float | None = number(
        "age in seconds from which opaque cursors are refused", None
    )
    cursor_epoch: int = whole("opaque cursors of another epoch are refused")

    # Clocks
    clock_offset: float = number("seconds that FLORA's clock is ahead", 0.0, low=-1e9)
    date_offset: float = number(
        "seconds that the header `Date` is ahead of FLORA's clock", 0.0, low=-1e9
    )

    def __post_init__(self) -> None:
        for name, value in self.changeable.items():
            object.__setattr__(self, name, _checked(name, value))
        for name in ("speed", "run_seconds", "callback_timeout"):
            _parsed(name, parse_positive, getattr(self, name))
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
        return replace(self, **{name: _checked(name, value) for name, value in changes.items()})


def _checked(name: str, value: object) -> Any:
    if name not in _PARSE:
        raise ValueError(f"{name}: is no option that can be changed")
    return _parsed(name, _PARSE[name], value)


def _parsed(name: str, parse: Parse, value: object) -> Any:
    try:
        return parse(value)
    except ValueError as exc:
        raise ValueError(f"{name}: {exc}") from None


_PARSE: Final[Mapping[str, Parse]] = {
    f.name: f.metadata["parse"] for f in fields(Options) if f.metadata
}

HELP: Final[Mapping[str, str]] = {f.name: f.metadata["help"] for f in fields(Options) if f.metadata}
"""What each option does that may be changed while the simulator runs."""

SECRETS: Final = frozenset(f.name for f in fields(Options) if f.metadata.get("secret"))
"""The options that are not shown."""
