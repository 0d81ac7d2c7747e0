"""A callback as bytes: FLORA's body and signature, and what came of an attempt to deliver it."""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tracker.simulator.runs import SimulatedRun

API_VERSION: Final = "2026-06-11"
_FORGED_SECRET: Final = "whsec_forged"  # noqa: S105 - its very point is to be the wrong one

Kind = Literal["callback", "duplicate", "forged"]


def sign(timestamp: int, body: bytes, secrets: Sequence[str]) -> str:
    """The `Flora-Signature` header: HMAC-SHA256 over `<t>.<body>`, keyed by each whole secret."""
    signed = b"%d.%s" % (timestamp, body)
    digests = [hmac.new(key.encode(), signed, hashlib.sha256).hexdigest() for key in secrets]
    return ",".join([f"t={timestamp}", *(f"v1={digest}" for digest in digests)])


@dataclass(frozen=True, slots=True)
class Letter:
    """A callback ready to be sent, byte for byte."""

    run_id: str
    delivery_id: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One POST of a callback and what came of it.

    `number` counts the attempts from 1, `at_ms` is when it left (Unix milliseconds). `status` is
    the receiver's answer; None where there was none, and then `error` names what happened.
    """

    run_id: str
    delivery_id: str
    kind: Kind
    number: int
    at_ms: int
    status: int | None
    error: str | None = None

    @property
    def taken(self) -> bool:
        """Whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


def write_letter(run: SimulatedRun, now_ms: int) -> Letter:
    """The callback that tells of a run's end, signed at this moment."""
    secrets = run.workspace.webhook_secrets
    return _letter(run, run.fate.delivery_id, run.end, run.error, secrets, now_ms)


def forge_letter(run: SimulatedRun, now_ms: int) -> Letter:
    """A callback that tells the opposite, signed with a secret that is not the workspace's."""
    status, error = (
        ("failed", {"error_code": "provider_error"}) if run.succeeds else ("completed", {})
    )
    secrets = (_FORGED_SECRET,)
    return _letter(run, run.fate.forged_delivery_id, status, error, secrets, now_ms)


def _letter(
    run: SimulatedRun,
    delivery_id: str,
    status: str,
    error: dict[str, str],
    secrets: Sequence[str],
    now_ms: int,
) -> Letter:
    event = f"run.{status}"
    data = {
        "run_id": run.run_id,
        "run_type": run.run_type,
        "workspace_id": run.workspace.workspace_id,
        "status": status,
    }
    content: dict[str, Any] = {
        "id": delivery_id,
        "type": event,
        "api_version": API_VERSION,
        "created_at": run.completed_ms,
        "data": data | error,
    }
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "Flora-Signature": sign(now_ms // 1000, body, secrets),
        "Flora-Webhook-Id": delivery_id,
        "Flora-Event": event,
    }
    return Letter(run.run_id, delivery_id, body, headers)
