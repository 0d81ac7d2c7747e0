"""What a simulated FLORA is like, and how often each of its faults strikes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

from tracker.simulator.errors import CODES
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
    """One simulated FLORA; what each option does stands beside it.

    `run_seconds` is the middle of the runs' durations, which spread from half of it to one and a
    half. `speed` divides the durations, the waits between a callback's attempts, and every wait in
    seconds below, except `retry_after`, `callback_timeout`, `cursor_seconds`, the offsets of
    clocks, and the times of creation (`retention`, `history_seconds`). Money is in USD. What
    happens to a run is decided when it starts, what happens to a request when it comes.

    The options that have a `help` may be changed while the simulator runs (`with_changes`);
    `later` changes them by itself: pairs of seconds after the beginning, by the world's clock, and
    of the changes that hold from then on.

    Raises `ValueError` where a value is out of its range.
    """

    seed: int = 0
    speed: float = 1.0
    run_seconds: float = 20.0
    callback_timeout: float = 10.0
    project_id: str = "prj_simulator"
    more_workspaces: tuple[SimulatedWorkspace, ...] = ()
    later: tuple[tuple[float, Mapping[str, object]], ...] = field(default=(), repr=False)

    # The workspace
    api_key: str = text(
        "the workspace's key; the old one is refused", "sk_test_simulator", secret=True
    )
    webhook_secret: str = text("signs the callbacks of new runs", "whsec_simulator", secret=True)
    workspace_id: str = text("the workspace that the key belongs to", "ws_simulator")
    credits: float | None = number("USD that may be spent before starts are refused with 402", None)

    # Callbacks
    drop: float = share("callbacks never come")
    duplicate: float = share("callbacks come a second time, although they were taken")
    early: float = share(
        "runs end at once, and their callback comes before the answer to the start"
    )
    late: float = share("callbacks come three `run_seconds` after the end")
    reorder: float = share("callbacks are held back up to one `run_seconds`: others overtake them")
    bad_signature: float = share("a forged callback comes first and tells the opposite")

    # Requests
    rate_limit: float = share("requests are answered 429")
    retry_after: int = whole("seconds that a 429 asks for", 1)
    errors: float = share("requests are answered 500 or 503; nothing is started")
    cut: float = share("the connection is cut, before or after the work")
    gateway: float = share("a gateway in front answers in FLORA's place, whatever is asked")
    gateway_starts: float = share("a gateway answers, for starts")
    gateway_reads: float = share("a gateway answers, for reads of one run, technique or workspace")
    gateway_pages: float = share("a gateway answers, for lists")
    gateway_answers: tuple[str, ...] = listed(
        "what the gateway answers: `502`, `503`, `504`, `404` (HTML), `empty` (200 without body),"
        " `page` (200, HTML)",
        "502",
        "503",
        "504",
        each=one_of("502", "503", "504", "404", "empty", "page"),
    )
    gateway_works: float = share("requests that reach FLORA behind the gateway all the same", 1.0)
    gateway_seconds: float | None = number(
        "seconds after which the gateway answers while the work goes on; none: when it is done",
        None,
    )
    refuse: Mapping[str, str] = table(
        "routes and the error code they answer, as `generations.list:not_found`; `filtered`: lists"
        " with a filter",
        one_of(*CODES),
    )
    refusals: float = share("requests of these routes that are refused", 1.0)
    field_details: bool = flag("errors name `code` and `valid_values` of each field")

    # Starts
    slow_starts: float = share("starts are answered late")
    slow_seconds: float = number("how late, in seconds", 25.0)
    slow_run: str = choice(
        "the run of a slow start exists from the first moment or the last", "first", "last"
    )
    failed_starts: float = share("starts are answered 500, in FLORA's shape, and nothing runs")
    lost_starts: float = share("starts are answered 500, in FLORA's shape, and the run exists")
    second_answer: str = choice(
        "how the next start with the key of one that was answered 500 is refused",
        "none",
        "400",
        "402",
        "404",
    )
    idempotency: Literal["replay", "conflict"] = choice(
        "a used key gives the original answer again for 24 hours, or is refused with 409 for two",
        "replay",
        "conflict",
    )
    key_hours: float | None = number("after how many hours a key is forgotten", None)
    key_source: str = choice(
        "where a key is read: body or header; or technique runs in the body, generations in the"
        " header",
        "either",
        "by_type",
    )
    keys_known: str = choice(
        "when a key is known: at once, or at the end of its request, so that two at once both run",
        "at_once",
        "at_end",
    )
    keys_released: bool = flag("a start that was answered 500 leaves its key free")
    colleague: float = share(
        "starts after which a colleague starts the technique too, without callback"
    )
    colleague_seconds: float = number("seconds between the start and the colleague's")
    run_per_value: bool = flag("an input with `allow_multiple` starts one run for each value")

    # Techniques
    price_factor: float = number("multiplies every technique's `run_cost`", 1.0)
    prices: Mapping[str, float] = table(
        "techniques and their `run_cost`, as `icon-pack:20`", parse_number
    )
    new_inputs: Mapping[str, str] = table(
        "techniques and an input each gains, as `icon-pack:style:text?`"
    )

    # Runs
    failures: float = share("runs fail", 0.15)
    failure_codes: tuple[str, ...] = listed(
        "their error codes; none: those documented; `measured`: those that FLORA measured"
    )
    full_progress: bool = flag("failed runs report progress 100")
    queued: float = share(
        "unfinished runs show `queued_name` as their status, from the start's answer on"
    )
    queued_name: str = text("a status that is not documented", "queued")
    cancelled: float = share(
        "runs end with `cancelled_name` as their status, without callback and cost"
    )
    cancelled_name: str = text("an end that is not documented", "cancelled")
    late_outputs: float = share("completed runs show no outputs at first")
    outputs_seconds: float = number("seconds between the end and the outputs", 60.0)
    signed_links: bool = flag("output links are signed anew at each read")
    time_unit: Literal["ms", "s"] = choice("the unit of a run's times", "ms", "s")

    # The bill
    quotes: float = share(
        "unfinished runs show a quote as `charged_cost`, from the start's answer on"
    )
    quote_factor: float = number(
        "the quote as a multiple of `run_cost`; 0: from 0.25 to 1.5, by the seed"
    )
    bill_factor: float = number("the bill as a multiple of `run_cost`", 1.0)
    late_bills: float = share("completed runs show no cost at first")
    bill_seconds: tuple[float, ...] = listed(
        "seconds between the end and a late bill or refund; of several, one by the seed",
        60.0,
        each=parse_number,
    )
    missing_bills: float = share("completed runs never show a cost")
    corrections: float = share("the cost shown first is too high or too low and corrected later")
    correction_seconds: float = number("seconds between the first cost and the right one", 60.0)
    late_refunds: float = share("failed runs show their quote at first")
    refund: str = choice(
        "what a failed run shows once it is refunded: 0, or no cost", "zero", "absent"
    )

    # The history
    history_outputs: bool = flag("completed items of lists have outputs and cost", True)
    history: int = whole("technique runs that ended before the beginning")
    history_generations: int = whole("generations that ended before the beginning")
    history_seconds: float = number("seconds over which these were created", 2_592_000.0)
    retention: float | None = number("runs that were created more seconds ago are removed", None)
    deletions: float = share("pages of a history after which one of their runs is deleted")
    bad_offset: int | None = whole("a page with the item at this offset cannot be read", None)
    bad_runs: tuple[str, ...] = listed("a page with one of these runs cannot be read")
    bad_code: str = choice("the error that answers such a page", "input_validation_error", *CODES)
    bad_bytes: int = whole("instead of an error, that item has so many bytes more")
    max_offset: int | None = whole("pages from this offset on cannot be read: 400", None)
    opaque_cursors: bool = flag("cursors are no offsets that can be decoded")
    cursor_seconds: float | None = number(
        "opaque cursors that are more seconds old are refused", None
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
        for _, changes in self.later:
            for name, value in changes.items():
                _checked(name, value)

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
