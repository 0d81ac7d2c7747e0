"""The settings: where they come from, the signing secrets, and who may look."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Final

from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.settings import Settings, WorkspaceSettings

LAST_ATTEMPT: Final = 375
"""Seconds: FLORA's last attempt at a delivery may be signed that long before it comes."""
EXPIRES_SOON: Final = timedelta(days=14)
"""A token that expires within this time is reported, so that its successor is made in time."""
PREFIX: Final = "whsec_"


def look(settings: Settings, sources: Mapping[str, str], *, now: datetime) -> list[Finding]:
    """All that the settings tell by themselves."""
    workspaces = settings.all_workspaces
    return [
        _sources(sources),
        *(_secrets(settings, one) for one in workspaces),
        _tolerance(settings.tracker_signature_tolerance),
        _token(settings, now),
    ]


def name_of(settings: Settings, workspace: WorkspaceSettings) -> str | None:
    """What tells a workspace's lines from the others'; `None` where there is only one."""
    return workspace.id if len(settings.all_workspaces) > 1 else None


def _sources(sources: Mapping[str, str]) -> Finding:
    if not sources:
        return warning(
            "settings",
            "Nothing is set; every setting has its default.",
            "Run the doctor with the environment of the service: the same variables, or the same "
            "TRACKER_CONFIG (systemd, sudo and cron pass on none by themselves). README.md lists "
            "the variables.",
        )
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        found[source].append(name)
    told = [f"From {source}: {', '.join(sorted(names))}" for source, names in found.items()]
    return ok("settings", f"{'. '.join(told)}.")


def _secrets(settings: Settings, workspace: WorkspaceSettings) -> Finding:
    name = name_of(settings, workspace)
    where = "webhook_secrets of this workspace" if name else "FLORA_WEBHOOK_SECRET"
    clear = [secret.get_secret_value() for secret in workspace.webhook_secrets]
    if not clear:
        advice = (
            f"Set {where} to the signing secret (whsec_…) that FLORA shows for this workspace, and "
            "restart `tracker serve`."
        )
        if settings.callback_url is None:
            return warning(
                "secrets", "None is set, so a callback would be refused.", advice, workspace=name
            )
        return failed(
            "secrets",
            "None is set, so every callback is refused, though runs are started with a "
            "callback URL.",
            advice,
            workspace=name,
        )
    odd = list(_odd(clear))
    if odd:
        return warning(
            "secrets",
            " ".join(odd),
            f"Copy the whole secret from FLORA into {where}, `{PREFIX}` included: FLORA signs with "
            "all of it.",
            workspace=name,
        )
    if len(clear) == 1:
        return ok("secrets", "One signing secret is set.", workspace=name)
    return ok(
        "secrets",
        f"{len(clear)} signing secrets are set, as during a rotation: leave the old one out once "
        "FLORA signs with the new one.",
        workspace=name,
    )


def _odd(secrets: list[str]) -> Iterator[str]:
    """Which of them do not look like FLORA's; they are told by their place, never shown."""
    for number, secret in enumerate(secrets, start=1):
        which = "The secret" if len(secrets) == 1 else f"Secret {number}"
        if secret.startswith("sk_"):
            yield f"{which} begins with sk_, as API keys do."
        elif not secret.startswith(PREFIX):
            yield f"{which} does not begin with {PREFIX}."


def _tolerance(tolerance: float) -> Finding:
    name: Final = "tolerance"
    if tolerance == 0:
        return warning(
            name,
            "TRACKER_SIGNATURE_TOLERANCE is 0: signed times are not looked at, so a recorded "
            "delivery can be sent again at any time (it counts once).",
            "Leave TRACKER_SIGNATURE_TOLERANCE out, unless this machine's clock cannot be set.",
        )
    if tolerance < LAST_ATTEMPT:
        return warning(
            name,
            f"Signed times may be {tolerance:g} s off. FLORA's last attempt at a delivery may be "
            f"signed {LAST_ATTEMPT} s before, and would be refused.",
            "Leave TRACKER_SIGNATURE_TOLERANCE out (900 s), or set it to at least "
            f"{LAST_ATTEMPT + 25}.",
        )
    return ok(name, f"Signed times may be {tolerance:g} s off.")


def _token(settings: Settings, now: datetime) -> Finding:
    name: Final = "token"
    tokens = settings.access_tokens
    if not len(tokens):
        if not settings.is_public:
            return ok(name, "None is set: API and dashboard are for this machine alone.")
        return failed(
            name,
            "TRACKER_PUBLIC_URL is set and no token is: API, dashboard and metrics refuse "
            "everybody, this machine too.",
            "Set TRACKER_API_TOKEN, for instance to what `openssl rand -hex 32` prints, and "
            "restart.",
        )
    if expired := [token.name for token in tokens if token.expired(now)]:
        return warning(
            name,
            f"Expired and refused: {', '.join(expired)}.",
            "Give it a new value and a later day under [[tokens]], or take it out.",
        )
    if soon := [token.name for token in tokens if token.expired(now + EXPIRES_SOON)]:
        return warning(
            name,
            f"Expires within {EXPIRES_SOON.days} days: {', '.join(soon)}.",
            "Add its successor under another name in [[tokens]], hand that out, and then take the "
            "old one out.",
        )
    listed = [f"{token.name} ({', '.join(sorted(token.scopes))})" for token in tokens]
    return ok(name, f"API, dashboard and metrics ask for a token: {'; '.join(listed)}.")
