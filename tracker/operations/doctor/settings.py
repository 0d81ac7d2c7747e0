"""The settings: where they come from, signing secrets, signature tolerance, access tokens."""

import os
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from tracker.operations.doctor import Finding, failed, ok, warning
from tracker.settings import Settings, WorkspaceSettings

LAST_ATTEMPT: Final = 375
"""Seconds: FLORA's last attempt at a delivery may carry the signature of the first, this old."""
EXPIRES_SOON: Final = timedelta(days=14)
PREFIX: Final = "whsec_"

_CERTAIN: Final = 10
"""Characters from which on a secret in a file is no other word."""


def check(
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
