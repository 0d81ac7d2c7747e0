"""Callbacks that an application receives itself: verify one, or hand it over."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tracker.core.clock import utc_now
from tracker.flora import parse
from tracker.flora.signature import verify
from tracker.receiving.receive import NoSecrets
from tracker.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCallback:
    """A callback that FLORA signed. `status` is `None` if this version does not understand it.

    It says that a run ended, and has neither outputs nor cost: the run's details are polled.
    """

    delivery_id: str
    event_type: str | None
    run_id: str | None
    status: str | None
    workspace_id: str | None
    created_at: datetime | None


def signature_headers(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """`Flora-Signature` and `Flora-Webhook-Id`, whatever the case of their names."""
    lower = {name.lower(): value for name, value in headers.items()}
    return lower.get("flora-signature"), lower.get("flora-webhook-id")


def verified(settings: Settings, body: bytes, headers: Mapping[str, str]) -> VerifiedCallback:
    """The callback in these raw bytes. Raises `SignatureError`, and `SettingsError` without any
    signing secret."""
    signature, webhook_id = signature_headers(headers)
    secrets = [secret for one in settings.all_workspaces for secret in one.clear_secrets]
    if not secrets:
        raise NoSecrets(
            "no signing secret is set, so no callback can be verified: set FLORA_WEBHOOK_SECRET"
        )
    now = utc_now()
    verify(signature, body, secrets, now=now, tolerance=settings.tracker_signature_tolerance)
    delivery = parse.delivery(body, at=now, webhook_id=webhook_id)
    seen = parse.callback(body, at=now)
    return VerifiedCallback(
        delivery_id=delivery.delivery_id,
        event_type=delivery.event_type,
        run_id=delivery.run_id,
        status=None if isinstance(seen, str) else str(seen.status),
        workspace_id=delivery.workspace_id,
        created_at=delivery.created_at,
    )
