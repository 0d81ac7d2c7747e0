"""FLORA: whether it answers, and takes each workspace's key, found out by a real read."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    RateLimited,
    ServerFault,
    SettingsError,
)
from tracker.flora.client import FloraClient, HistoryPage
from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.operations.doctor.given import name_of
from tracker.settings import Settings, WorkspaceSettings

PATIENCE: Final = 10.0
"""Seconds for the read, repetitions included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraState:
    """What was found.

    `clock_offset` is FLORA's clock minus this machine's, `None` where no answer told it. `ids` has
    the id of each configured workspace, in their order, as far as it is set or was read.
    """

    findings: tuple[Finding, ...]
    clock_offset: timedelta | None = None
    ids: tuple[str | None, ...] = ()


async def look(settings: Settings, *, clock: Clock) -> FloraState:
    """Read the newest run of each workspace, with its key."""
    workspaces = settings.all_workspaces
    keys = Counter(one.api_key.get_secret_value() for one in workspaces if one.api_key)
    seen = await asyncio.gather(
        *(_workspace(settings, one, keys=keys, clock=clock) for one in workspaces)
    )
    offsets = [offset for _, offset, _ in seen if offset is not None]
    return FloraState(
        findings=tuple(finding for finding, _, _ in seen),
        clock_offset=offsets[0] if offsets else None,
        ids=tuple(workspace_id for _, _, workspace_id in seen),
    )


async def _workspace(
    settings: Settings, workspace: WorkspaceSettings, *, keys: Counter[str], clock: Clock
) -> tuple[Finding, timedelta | None, str | None]:
    name = name_of(settings, workspace)
    where = "api_key of this workspace" if name else "FLORA_API_KEY"
    if workspace.api_key is None:
        finding = failed(
            "key",
            "None is set: callbacks are received, but no run can be started or read, so outputs "
            "and cost stay unknown.",
            f"Set {where} to a key of the workspace (sk_live_…), and restart.",
            workspace=name,
        )
        return finding, None, workspace.id
    key = workspace.api_key.get_secret_value()
    if keys[key] > 1:
        finding = failed(
            "key",
            "The same key is set for several workspaces, and a key belongs to one.",
            f"Set {where} to a key of its own.",
            workspace=name,
        )
        return finding, None, workspace.id
    try:
        async with FloraClient(
            base_url=settings.flora_base_url,
            api_key=key,
            concurrency=1,
            deadline=PATIENCE,
            clock=clock,
        ) as client:
            try:
                page = await client.history(limit=1)
            except FloraError as error:
                finding = _trouble(error, settings.flora_base_url, where, name)
                return finding, client.clock_offset, workspace.id
            shown = [one.workspace_id for one in page.items]
            if not any(shown):  # an empty history may be another workspace's
                with suppress(FloraError):
                    shown = [*await client.list_workspaces()]
            finding, workspace_id = _read(settings, workspace, page, shown, client.request_id, name)
            return finding, client.clock_offset, workspace_id
    except SettingsError as error:
        advice = f"Copy the key again into {where}."
        return failed("key", f"{error}.", advice, workspace=name), None, workspace.id


def _read(
    settings: Settings,
    workspace: WorkspaceSettings,
    page: HistoryPage,
    ids: Sequence[str | None],
    request_id: str | None,
    name: str | None,
) -> tuple[Finding, str | None]:
    """What a page of the history tells, and whose it is by the `ids` that FLORA gives."""
    shown = workspace.id if workspace.id in ids else next((one for one in ids if one), None)
    if shown and workspace.id and shown != workspace.id:
        finding = failed(
            "key",
            f"It is a key of workspace {shown}, and {workspace.id} is set.",
            f"Set FLORA_WORKSPACE_ID (or id under [[workspaces]]) to {shown}, or the key to one of "
            f"{workspace.id}.",
            workspace=name,
        )
        return finding, workspace.id
    of = f" of workspace {shown}" if shown else ""
    by = f" ({request_id})" if request_id else ""
    runs = "its newest run was read" if page.items or page.unreadable else "it has no runs yet"
    said = f"{settings.flora_base_url} takes the key{of}: {runs}{by}."
    return ok("key", said, workspace=name), workspace.id or shown


def _trouble(error: FloraError, base_url: str, where: str, name: str | None) -> Finding:
    """What it means that a read did not go well, and what to do about it."""
    seen = f"{base_url}: {error}."
    match error:
        case KeyRefused():
            advice = (
                f"Set {where} to a key that is valid at FLORA (developer settings of the "
                "workspace), whole and without quotes, and restart."
            )
        case Forbidden():
            advice = (
                "The key is known but may not read runs: give it that right at FLORA, or set "
                f"{where} to another key, and restart."
            )
        case RateLimited():
            advice = (
                "FLORA's limit is shared by all that use the workspace: use the key for less, or "
                "raise TRACKER_POLL_INTERVAL. The key itself could not be tried; run the doctor "
                "again."
            )
            return warning("key", seen, advice, workspace=name)
        case ServerFault():
            advice = (
                "The fault is FLORA's: wait, and run the doctor again. Its support asks for the "
                "request id (req_…). The tracker goes on trying."
            )
            return warning("key", seen, advice, workspace=name)
        case NotFound() | FloraUnreadable() | FloraRefusal():
            advice = (
                "Set FLORA_BASE_URL to the root of the API, https://app.flora.ai/api/v1 (or leave "
                "it out), and see whether a proxy for outgoing requests answers in FLORA's place."
            )
        case _:
            advice = (
                "Let this machine reach that address: its name (DNS), outgoing port 443, and "
                "HTTPS_PROXY where one is needed. `curl -I` with that address tells which it is."
            )
    return failed("key", seen, advice, workspace=name)
