"""A callback: authentic or refused, understood or not."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from tracker.core.entry import TRIAL, Delivered, Delivery, DeliveryOutcome
from tracker.flora import parse, signature


def authenticate(
    body: bytes,
    header: str | None,
    secrets: Sequence[str],
    *,
    now: datetime,
    tolerance: float,
) -> str:
    """The secret that signed these raw bytes.

    `tolerance` is in seconds, 0 for unchecked. Raises `SignatureError` where none of `secrets` did.
    """
    return secrets[signature.verify(header, body, secrets, now=now, tolerance=tolerance)]


def read(
    body: bytes, *, at: datetime, webhook_id: str | None, workspace_id: str | None
) -> Delivered:
    """The delivery and what it says, from the bytes of an authentic callback.

    `workspace_id` is the workspace whose secret signed it, where that is known. A callback that is
    not understood, or that speaks of another workspace, is quarantined: kept, and applied to
    nothing. A trial is understood, and applied to nothing too. Never raises, whatever the bytes.
    """
    callback = parse.callback(body, at=at, webhook_id=webhook_id)
    seen, reason = callback.observation, callback.reason
    named = callback.workspace_id
    if seen is not None and named and workspace_id and named != workspace_id:
        reason = f"it speaks of workspace {named}, but the secret of {workspace_id} signed it"
        seen = None
    if seen is not None and not named:
        seen = replace(seen, workspace_id=workspace_id)
    understood = seen is not None or callback.event_type == TRIAL
    return Delivered(
        delivery=Delivery(
            delivery_id=callback.delivery_id,
            received_at=at,
            body=body,
            outcome=DeliveryOutcome.APPLIED if understood else DeliveryOutcome.QUARANTINED,
            run_id=callback.run_id,
            event_type=callback.event_type,
            api_version=callback.api_version,
            # Whose secret signed it: a replay goes by that, not by what the body claims.
            workspace_id=workspace_id or named,
            created_at=callback.created_at,
            reason=None if understood else reason,
        ),
        observation=seen,
    )


def quarantined(delivered: Delivered, reason: str) -> Delivered:
    """The same delivery, kept and applied to nothing."""
    delivery = replace(delivered.delivery, outcome=DeliveryOutcome.QUARANTINED, reason=reason)
    return replace(delivered, delivery=delivery, observation=None)


def by_digest(delivered: Delivered) -> Delivered:
    """The same delivery, filed under the digest of its body."""
    delivery = delivered.delivery
    return replace(
        delivered, delivery=replace(delivery, delivery_id=parse.digest_id(delivery.body))
    )
