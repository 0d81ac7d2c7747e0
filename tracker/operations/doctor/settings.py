"""The settings: where they come from, secrets and tokens, whether FLORA accepts each workspace's
key, and how far its clock, which signatures go by, and ours are apart."""

import asyncio
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from tracker.core import errors
from tracker.core.clock import Clock
from tracker.core.formatting import duration
from tracker.flora.client import FloraClient
from tracker.operations.doctor import Finding, failed, ok, warning
from tracker.settings import Settings, WorkspaceSettings

LAST_ATTEMPT: Final = 375
"""Seconds: FLORA's last attempt at a delivery may carry the signature of the first, this old."""
EXPIRES_SOON: Final = timedelta(days=14)
PREFIX: Final = "whsec_"
_CERTAIN: Final = 10
"""Characters from which on a secret in a file is no other word."""
ROUNDING: Final = timedelta(seconds=10)
"""Tolerated difference to FLORA's clock: `Date` has whole seconds, and answers take time."""
SERVER_ROUNDING: Final = timedelta(seconds=5)
_SET_CLOCK = "Set the machine's clock over the network (chrony, systemd-timesyncd)"


def check_settings(
    settings: Settings, sources: Mapping[str, str], unknown: Sequence[str] = (), *, now: datetime
) -> list[Finding]:
    """Everything that the settings alone show. `sources` says where each setting comes from,
    `unknown` names the unknown ones."""
    return [
        _sources(settings, sources, unknown),
        *(
            replace(_secrets(settings, one), workspace=label_of(settings, one))
            for one in settings.all_workspaces
        ),
        _tolerance(settings.tracker_signature_tolerance),
        _token(settings, now),
    ]


def label_of(settings: Settings, workspace: WorkspaceSettings) -> str | None:
    """What marks a workspace's lines; `None` if it is the only one."""
    return workspace.id if len(settings.all_workspaces) > 1 else None


def _sources(settings: Settings, sources: Mapping[str, str], unknown: Sequence[str]) -> Finding:
    if unknown:
        return failed(
            "settings",
            " ".join(f"{text[0].upper()}{text[1:]}" for text in unknown),
            "Correct or remove these environment variables: they have no effect.",
        )
    if not sources:
        return warning(
            "settings",
            "Nothing is set; every setting has its default.",
            "Run the doctor with the environment of the service: the same variables, or the same "
            "TRACKER_CONFIG (systemd, sudo and cron do not pass them on). README.md lists them.",
        )
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        found[source].append(name)
    parts = [f"From {source}: {', '.join(sorted(names))}" for source, names in found.items()]
    seen = f"{'. '.join(parts)}."
    if open_file := next((one for one in found if _shows_secrets(Path(one), settings)), None):
        return warning(
            "settings",
            f"{seen} All users of this machine can read the secrets in {open_file}.",
            f"`chmod o= {open_file}`, or refer to them with env:NAME or file:PATH. Rotate them if "
            "others use this machine.",
        )
    return ok("settings", seen)


def _shows_secrets(path: Path, settings: Settings) -> bool:
    """Whether a file has a secret in clear, and may be read by everyone."""
    try:
        if os.name != "posix" or not path.stat().st_mode & stat.S_IROTH:
            return False
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # "the environment", and what has changed since
        return False
    # A short one, such as the database's password "tracker", may stand there as something else.
    return any(len(secret) >= _CERTAIN and secret in text for secret in settings.secret_values)


def _secrets(settings: Settings, workspace: WorkspaceSettings) -> Finding:
    several = len(settings.all_workspaces) > 1
    setting = "webhook_secrets of this workspace" if several else "FLORA_WEBHOOK_SECRET"
    secrets = workspace.clear_secrets
    if not secrets:
        advice = (
            f"Set {setting} to the signing secret (whsec_…) that FLORA shows for this workspace, "
            "and restart `tracker serve`."
        )
        if settings.callback_url is None:
            return warning("secrets", "None is set, so callbacks would be refused.", advice)
        seen = "None is set: every callback is refused, but runs start with a callback URL."
        return failed("secrets", seen, advice)
    if malformed := _malformed(secrets):
        advice = f"Copy the whole secret from FLORA into {setting}, including `{PREFIX}`."
        return warning("secrets", malformed, advice)
    if len(secrets) == 1:
        return ok("secrets", "One signing secret is set.")
    return ok(
        "secrets",
        f"{len(secrets)} signing secrets are set (rotation): remove the old one once FLORA signs "
        "with the new one.",
    )


def _malformed(secrets: Sequence[str]) -> str:
    """Which secrets do not look like FLORA's, by their position."""
    found = []
    for number, secret in enumerate(secrets, start=1):
        which = "The secret" if len(secrets) == 1 else f"Secret {number}"
        if secret.startswith("sk_"):
            found.append(f"{which} begins with sk_, like an API key.")
        elif not secret.startswith(PREFIX):
            found.append(f"{which} does not begin with {PREFIX}.")
    return " ".join(found)


def _tolerance(tolerance: float) -> Finding:
    if tolerance == 0:
        return warning(
            "tolerance",
            "TRACKER_SIGNATURE_TOLERANCE is 0: signature times are not checked, so a recorded "
            "delivery can be repeated at any time (it counts once).",
            "Unset TRACKER_SIGNATURE_TOLERANCE, unless this machine's clock cannot be set.",
        )
    seen = f"Signature times may be off by {tolerance:g} s."
    if tolerance >= LAST_ATTEMPT:
        return ok("tolerance", seen)
    return warning(
        "tolerance",
        f"{seen} FLORA's last attempt at a delivery may be signed {LAST_ATTEMPT} s earlier, and "
        "would be refused.",
        f"Unset TRACKER_SIGNATURE_TOLERANCE (900 s), or set it to at least {LAST_ATTEMPT + 25}.",
    )


def _token(settings: Settings, now: datetime) -> Finding:
    tokens = settings.access_tokens
    if not len(tokens):
        if not settings.is_public:
            return ok("token", "None is set: API and dashboard are served to this machine only.")
        return failed(
            "token",
            "TRACKER_PUBLIC_URL is set without a token: API, dashboard and metrics refuse all "
            "requests, also from this machine.",
            "Set TRACKER_API_TOKEN, for example to the output of `openssl rand -hex 32`, and "
            "restart.",
        )
    if expired := [token.name for token in tokens if token.expired(now)]:
        return warning(
            "token",
            f"Expired and refused: {', '.join(expired)}.",
            "Under [[tokens]], give it a new value and a later date, or remove it.",
        )
    if soon := [token.name for token in tokens if token.expired(now + EXPIRES_SOON)]:
        return warning(
            "token",
            f"Expires within {EXPIRES_SOON.days} days: {', '.join(soon)}.",
            "Add a successor under another name in [[tokens]], hand it out, then remove the old "
            "one.",
        )
    listed = [f"{token.name} ({', '.join(sorted(token.scopes))})" for token in tokens]
    return ok("token", f"API, dashboard and metrics require a token: {'; '.join(listed)}.")


# FLORA


@dataclass(frozen=True, slots=True)
class FloraState:
    """What was found, for the report and for other checks.

    `clock_offset` is FLORA's clock minus this machine's, `None` if no answer showed it. `ids` are
    the ids of the configured workspaces, in their order, as far as they are known.
    """

    findings: Sequence[Finding]
    clock_offset: timedelta | None = None
    ids: Sequence[str | None] = ()


async def check_keys(settings: Settings, *, clock: Clock, deadline: float) -> FloraState:
    """Read the newest run of each workspace with its key, within `deadline` seconds."""
    workspaces = settings.all_workspaces
    keys = Counter(one.api_key.get_secret_value() for one in workspaces if one.api_key)
    found = await asyncio.gather(
        *(_check_key(settings, one, keys, clock, deadline) for one in workspaces)
    )
    return FloraState(
        [
            replace(finding, workspace=label_of(settings, workspace))
            for workspace, (finding, _, _) in zip(workspaces, found, strict=True)
        ],
        clock_offset=next((offset for _, _, offset in found if offset is not None), None),
        ids=[workspace_id for _, workspace_id, _ in found],
    )


async def _check_key(
    settings: Settings,
    workspace: WorkspaceSettings,
    keys: Counter[str],
    clock: Clock,
    deadline: float,
) -> tuple[Finding, str | None, timedelta | None]:
    """The finding for a key; the id of its workspace, and FLORA's clock minus ours, if known."""
    several = len(settings.all_workspaces) > 1
    setting = "api_key of this workspace" if several else "FLORA_API_KEY"
    key = "" if workspace.api_key is None else workspace.api_key.get_secret_value()

    def unusable(seen: str, advice: str) -> tuple[Finding, str | None, None]:
        return failed("key", seen, advice), workspace.id, None

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
            found = await _read(client, settings.flora_base_url, workspace, setting)
            return *found, client.clock_offset
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
