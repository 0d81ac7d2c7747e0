"""A callback: authentic or refused, and what an authentic one says."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from tracker.core.observation import Observation
from tracker.core.record import Delivery
from tracker.flora import parse, signature


def authenticate(
    body: bytes,
    header: str | None,
    secrets: Sequence[str],
    *,
    now: datetime,
    tolerance: float,
) -> int:
    """Which of `secrets` signed these raw bytes: its position.

    `tolerance` is in seconds, 0 for unchecked. Raises `SignatureError` where none did.
    """
    return signature.verify(header, body, secrets, now=now, tolerance=tolerance)


def delivery(
    body: bytes,
    *,
    at: datetime,
    webhook_id: str | None,
    signers: Sequence[str | None],
    token: str | None = None,
) -> Delivery:
    """An authentic callback as it is stored, understood or not. Never raises.

    `signers` are the workspaces whose secret signed it: one, unless several share a secret; then it
    is the one that the body names, else the first. `token` is the last part of the address that it
    came to.
    """
    told = parse.envelope(body, webhook_id=webhook_id)
    signer = told.workspace_id if told.workspace_id in signers else signers[0]
    return Delivery(
        delivery_id=told.delivery_id,
        received_at=at,
        body=body,
        run_id=told.run_id,
        event_type=told.event_type,
        api_version=told.api_version,
        workspace_id=signer or told.workspace_id,
        created_at=told.created_at,
        callback_token=token,
    )


def digest_id(body: bytes) -> str:
    """The id of a delivery whose own id another body has already."""
    return parse.digest_id(body)


def observe(body: bytes, *, at: datetime, signer: str | None) -> Observation | str:
    """What a stored callback, received at `at`, says of its run; or why it is not applied.

    `signer` is the workspace whose secret signed it, where that is known. Never raises.
    """
    seen = parse.callback(body, at=at)
    if isinstance(seen, str) or not signer:
        return seen
    if not seen.workspace_id:
        return replace(seen, workspace_id=signer)
    if seen.workspace_id == signer:
        return seen
    return f"it speaks of workspace {seen.workspace_id}, but the secret of {signer} signed it"
