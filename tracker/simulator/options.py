"""What a simulated FLORA is like, and how often each of its faults strikes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal

CALLBACK_FAULTS: Final = ("drop", "duplicate", "early", "late", "reorder", "bad_signature")
"""What can happen to a run's callback. Decided when the run starts."""

REQUEST_FAULTS: Final = ("rate_limit", "errors", "cut")
"""What can happen to a request to the API. Decided when it comes in."""

RATES: Final = (*CALLBACK_FAULTS, *REQUEST_FAULTS, "failures")
"""The options that are shares, 0 to 1, and may be changed while the simulator runs."""


def parse_rate(text: str) -> float:
    """A share from `0.4` or `40%`.

    Raises `ValueError` for what is no number or lies outside 0 to 1 (0 % to 100 %).
    """
    number = text.strip()
    try:
        rate = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share: give 0 to 1, or 0% to 100%") from None
    return _checked_rate(rate)


def _checked_rate(rate: float) -> float:
    if not 0 <= rate <= 1:
        raise ValueError(f"{rate:g} is not a share: give 0 to 1, or 0% to 100%")
    return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
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
    """One simulated FLORA.

    `run_seconds` is the middle of the runs' durations, which spread from half of it to one and a
    half; `speed` divides them and the waits between a callback's attempts. The rates named in
    `RATES` are shares from 0 to 1:

    * `failures`: runs that fail;
    * `drop`: callbacks that never come;
    * `duplicate`: callbacks that come a second time, although they were taken;
    * `early`: runs that end at once and whose callback comes before the answer to their start;
    * `late`: callbacks that come three `run_seconds` after the end;
    * `reorder`: callbacks held back by up to one `run_seconds`, so that others overtake them;
    * `bad_signature`: callbacks before which a forged one comes, telling the opposite;
    * `rate_limit`: requests answered 429, `errors`: 500 or 503, `cut`: with a cut connection.

    `history_outputs=False` leaves outputs and cost out of the history's completed items.
    `idempotency` is which of FLORA's two accounts holds: "replay" gives the original answer for 24
    hours, "conflict" answers 409 for two. `time_unit` is that of a run's times. `credits` is what
    may be spent in USD before starts are refused with 402. `retry_after` is what a 429 asks for,
    in whole seconds, not divided by `speed`. `more_workspaces` are served beside the first.

    Raises `ValueError` where a value is out of its range.
    """

    seed: int = 0
    speed: float = 1.0
    run_seconds: float = 20.0
    failures: float = 0.15
    drop: float = 0.0
    duplicate: float = 0.0
    early: float = 0.0
    late: float = 0.0
    reorder: float = 0.0
    bad_signature: float = 0.0
    rate_limit: float = 0.0
    errors: float = 0.0
    cut: float = 0.0
    history_outputs: bool = True
    idempotency: Literal["replay", "conflict"] = "replay"
    time_unit: Literal["ms", "s"] = "ms"
    credits: float | None = None
    retry_after: int = 1
    callback_timeout: float = 10.0
    api_key: str = field(default="sk_test_simulator", repr=False)
    webhook_secret: str = field(default="whsec_simulator", repr=False)
    workspace_id: str = "ws_simulator"
    project_id: str = "prj_simulator"
    more_workspaces: tuple[Workspace, ...] = ()

    def __post_init__(self) -> None:
        for name in RATES:
            try:
                _checked_rate(getattr(self, name))
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from None
        for name in ("speed", "run_seconds", "callback_timeout"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: has to be above 0")
        if self.retry_after < 0:
            raise ValueError("retry_after: has to be 0 or more")
        if self.idempotency not in ("replay", "conflict"):
            raise ValueError("idempotency: has to be replay or conflict")
        if self.time_unit not in ("ms", "s"):
            raise ValueError("time_unit: has to be ms or s")
        keys = [workspace.api_key for workspace in self.workspaces]
        if len(set(keys)) < len(keys):
            raise ValueError("more_workspaces: one key belongs to one workspace")
        if not all(workspace.webhook_secrets for workspace in self.workspaces):
            raise ValueError("webhook_secret: is missing")

    @property
    def workspaces(self) -> tuple[Workspace, ...]:
        """All workspaces, the first one first."""
        first = Workspace(
            workspace_id=self.workspace_id,
            api_key=self.api_key,
            webhook_secret=self.webhook_secret,
            project_id=self.project_id,
        )
        return (first, *self.more_workspaces)

    @property
    def rates(self) -> dict[str, float]:
        """The rates by name."""
        return {name: getattr(self, name) for name in RATES}

    def with_rates(self, changes: Mapping[str, object]) -> "Options":
        """A copy with other rates (numbers, or text as `parse_rate` takes it) or `history_outputs`.

        Raises `ValueError` for any other name, and for values that are out of range.
        """
        known = {f.name for f in fields(self)} & {*RATES, "history_outputs"}
        values: dict[str, float | bool] = {}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"{name}: cannot be changed while the simulator runs")
            if name == "history_outputs":
                if not isinstance(value, bool):
                    raise ValueError("history_outputs: has to be true or false")
                values[name] = value
            elif isinstance(value, str):
                values[name] = parse_rate(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                values[name] = float(value)
            else:
                raise ValueError(f"{name}: has to be a number from 0 to 1")
        return replace(self, **values)  # type: ignore[arg-type]
