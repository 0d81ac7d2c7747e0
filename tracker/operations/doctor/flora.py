"""FLORA: whether it accepts each workspace's key, and how far its clock and ours are apart."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from tracker.core import errors
from tracker.core.clock import Clock
from tracker.core.formatting import duration
from tracker.flora.client import FloraClient
from tracker.operations.doctor import Finding, failed, ok, warning
from tracker.operations.doctor.settings import LAST_ATTEMPT, label_of
from tracker.settings import Settings, WorkspaceSettings

ROUNDING: Final = timedelta(seconds=10)
"""Tolerated difference to FLORA's clock: `Date` has whole seconds, and answers take time."""
SERVER_ROUNDING: Final = timedelta(seconds=5)
_SET_CLOCK = "Set the machine's clock over the network (chrony, systemd-timesyncd)"


@dataclass(frozen=True, slots=True)
class FloraState:
    """What was found, for the report and for other checks.

    `clock_offset` is FLORA's clock minus this machine's, `None` if no answer showed it. `ids` are
    the ids of the configured workspaces, in their order, as far as they are known.
    """

    findings: Sequence[Finding]
    clock_offset: timedelta | None = None
    ids: Sequence[str | None] = ()


async def check(settings: Settings, *, clock: Clock, deadline: float) -> FloraState:
    """Read the newest run of each workspace with its key, within `deadline` seconds."""
    workspaces = settings.all_workspaces
    keys = Counter(one.api_key.get_secret_value() for one in workspaces if one.api_key)
    states = await asyncio.gather(
        *(_check_key(settings, one, keys, clock, deadline) for one in workspaces)
    )
    offsets = [state.clock_offset for state in states if state.clock_offset is not None]
    return FloraState(
        [
            replace(finding, workspace=label_of(settings, workspace))
            for workspace, state in zip(workspaces, states, strict=True)
            for finding in state.findings
        ],
        clock_offset=offsets[0] if offsets else None,
        ids=[workspace_id for state in states for workspace_id in state.ids],
    )


async def _check_key(
    settings: Settings,
    workspace: WorkspaceSettings,
    keys: Counter[str],
    clock: Clock,
    deadline: float,
) -> FloraState:
    several = len(settings.all_workspaces) > 1
    setting = "api_key of this workspace" if several else "FLORA_API_KEY"
    key = "" if workspace.api_key is None else workspace.api_key.get_secret_value()

    def unusable(seen: str, advice: str) -> FloraState:
        return FloraState([failed("key", seen, advice)], ids=[workspace.id])

    if not key:
        return unusable(
            "None is set: callbacks are received, but no run can be started or read, so outputs "
            "and costs stay unknown.",
            f"Set {setting} to a key of the workspace (sk_live_…), and restart.",
        )
    if keys[key] > 1:
        return unusable(
            "The same key is set for several workspaces; a key belongs to one.",
            f"Set {setting} to a key of its own.",
        )
    try:
        async with FloraClient(
            base_url=settings.flora_base_url,
            api_key=key,
            workspace_id=workspace.id,
            concurrency=1,
            deadline=deadline,
            clock=clock,
        ) as client:
            finding, workspace_id = await _read(client, settings.flora_base_url, workspace, setting)
            return FloraState([finding], client.clock_offset, [workspace_id])
    except errors.SettingsError as error:
        return unusable(f"{error}.", f"Copy the key again into {setting}.")


async def _read(
    client: FloraClient, base_url: str, workspace: WorkspaceSettings, setting: str
) -> tuple[Finding, str | None]:
    """The finding for a key, and the id of its workspace if known."""
    try:
        page = await client.history(limit=1)
    except errors.FloraError as error:
        return _read_failed(error, base_url, setting), workspace.id
    request_id = client.request_id
    seen: list[str] = []
    with suppress(errors.FloraError):
        seen = await client.list_workspaces()
    ids = [one.workspace_id for one in page.items if one.workspace_id]
    ids = ids or seen  # an empty history may be another workspace's
    found = workspace.id if workspace.id in ids else next(iter(ids), None)
    if found and workspace.id and found != workspace.id:
        finding = failed(
            "key",
            f"The key belongs to workspace {found}, but {workspace.id} is set.",
            f"Set FLORA_WORKSPACE_ID (or id under [[workspaces]]) to {found}, or set a key of "
            f"{workspace.id}.",
        )
        return finding, workspace.id
    if len(seen) > 1 and workspace.id is None:
        finding = failed(
            "key",
            f"The key sees several workspaces ({', '.join(seen)}), and none is set, so nothing is "
            "started.",
            "Set FLORA_WORKSPACE_ID to the one to track.",
        )
        return finding, None
    if len(seen) > 1:
        finding = warning(
            "key",
            f"The key sees {len(seen)} workspaces. Only {workspace.id} is tracked, and FLORA "
            "decides in which of them a run is started.",
            f"Set {setting} to a key of {workspace.id} alone.",
        )
        return finding, workspace.id
    of = f" of workspace {found}" if found else ""
    runs = "its newest run was read" if page.items or page.unreadable else "it has no runs yet"
    by = f" ({request_id})" if request_id else ""
    return ok("key", f"{base_url} accepts the key{of}: {runs}{by}."), workspace.id or found


_IN_FORCE: Final = "From a file it takes effect within a second; else restart."


def _read_failed(error: errors.FloraError, base_url: str, setting: str) -> Finding:
    say = failed
    match error:
        case errors.KeyRefused():
            advice = (
                f"Set {setting} to a key that is valid at FLORA (developer settings of the "
                f"workspace), whole and without quotes. {_IN_FORCE}"
            )
        case errors.Forbidden():
            advice = (
                "The key is known but may not read runs: grant that at FLORA, or set "
                f"{setting} to another key. {_IN_FORCE}"
            )
        case errors.RateLimited():
            say = warning
            advice = (
                "FLORA's rate limit is shared by all who use the workspace: use the key for less, "
                "or raise TRACKER_POLL_INTERVAL. The key itself was not checked; run the doctor "
                "again."
            )
        case errors.ServerFault():
            say = warning
            advice = (
                "The fault is FLORA's: wait, and run the doctor again. Its support asks for the "
                "request id (req_…). The tracker keeps trying."
            )
        case errors.NotFound() | errors.FloraUnreadable() | errors.FloraRefusal():
            advice = (
                "Set FLORA_BASE_URL to the root of the API, https://app.flora.ai/api/v1 (or unset "
                "it), and check whether a proxy for outgoing requests answers instead of FLORA."
            )
        case _:
            advice = (
                "Let this machine reach that address: its name (DNS), outgoing port 443, and "
                "HTTPS_PROXY if one is needed. `curl -I` with that address shows which it is."
            )
    return say("key", f"{base_url}: {error}.", advice)


def compare_clocks(
    flora: timedelta | None, server: timedelta | None, *, tolerance: float
) -> list[Finding]:
    """Compare the clocks of FLORA, the database server and this machine.

    `flora` and `server` are their clocks minus this machine's, if known; `tolerance` is how many
    seconds a signature time may be off, 0 for unchecked. With PostgreSQL the tracker uses the
    server's clock.
    """
    findings = [_compare_with_flora(flora, server, timedelta(seconds=tolerance))]
    if server is not None and abs(server) <= SERVER_ROUNDING:
        findings.append(
            ok("machine clock", "This machine's clock agrees with the database server's.")
        )
    elif server is not None:
        findings.append(
            warning(
                "machine clock",
                f"This machine's clock is {_apart(-server)} the database server's. The tracker "
                "uses the server's, except for log times and cron.",
                f"{_SET_CLOCK} here.",
            )
        )
    return findings


def _compare_with_flora(
    flora: timedelta | None, server: timedelta | None, tolerance: timedelta
) -> Finding:
    ours = "This machine's clock" if server is None else "The database server's clock"
    if flora is None:
        return warning(
            "clock",
            f"{ours} could not be compared with FLORA's, which did not answer.",
            "Fix the key first, and run the doctor again.",
        )
    ahead = (server or timedelta(0)) - flora
    if abs(ahead) <= ROUNDING:
        return ok("clock", f"{ours} agrees with FLORA's within {ROUNDING.total_seconds():g} s.")
    seen = f"{ours} is {_apart(ahead)} FLORA's"
    advice = f"{_SET_CLOCK}{'' if server is None else ' where PostgreSQL runs'}."
    if tolerance and abs(ahead) > tolerance:
        return failed(
            "clock",
            f"{seen}, more than the {tolerance.total_seconds():g} s that a signature time may be "
            "off: every callback is refused as too old or too new.",
            advice,
        )
    if tolerance and ahead + timedelta(seconds=LAST_ATTEMPT) > tolerance:
        seen += (
            f". A callback of FLORA's last attempt is signed up to {LAST_ATTEMPT} s earlier, and "
            "would be refused"
        )
    return warning("clock", f"{seen}.", advice)


def _apart(ahead: timedelta) -> str:
    return f"{duration(abs(ahead))} {'ahead of' if ahead > timedelta(0) else 'behind'}"
