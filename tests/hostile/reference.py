"""A second implementation of the rules of a callback, written from their description.

The tracker's results are compared with it. It shares no code with the tracker, and may be slow.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


def verdict(
    header: bytes, body: bytes, secrets: Sequence[str], *, now: int, tolerance: int
) -> int | str:
    """The position of the secret that signed, or in one word why none did."""
    if header == b"":
        return "missing"
    if len(header) > 4096 or len(header.split(b",")) > 64:
        return "malformed"
    pairs = [re.split(rb"\s*=\s*", part.strip(), maxsplit=1) for part in header.split(b",")]
    known = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    times = [
        int(value) for key, value in known if key == b"t" and re.fullmatch(rb"\d{1,12}", value)
    ]
    signatures = [value for key, value in known if key == b"v1" and value]
    if not times or not signatures:
        return "malformed"
    for position, secret in enumerate(secrets):
        signed = str(times[-1]).encode() + b"." + body
        expected = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest().encode()
        if secret and expected in signatures:
            return position if abs(now - times[-1]) <= tolerance else "expired"
    return "mismatch"


class Reading(NamedTuple):
    """The expected state of an authentic callback."""

    delivery_id: str
    digest: str
    """Its id where `delivery_id` belongs to another body."""
    run_id: str | None
    ends_run: bool


def reading(body: bytes, webhook_id: str | None, *, workspace_id: str) -> Reading:
    """How `body` is stored, and whether it is understood; `workspace_id` owns the secret."""
    try:
        event: Any = json.loads(body.decode(), parse_int=float)
    except (ValueError, RecursionError):
        event = None
    fields = event if isinstance(event, dict) else {}
    data = fields.get("data") if isinstance(fields.get("data"), dict) else {}
    run_id, workspace = _name(data.get("run_id")), data.get("workspace_id")
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    return Reading(
        delivery_id=_name(fields.get("id")) or _name(webhook_id) or digest,
        digest=digest,
        run_id=run_id,
        ends_run=run_id is not None
        and (fields.get("type"), data.get("status"))
        in [("run.completed", "completed"), ("run.failed", "failed")]
        and (workspace is None or _name(workspace) == workspace_id),
    )


def nesting(body: bytes) -> int:
    """A lower bound of the nesting of the JSON values in `body`, counted without parsing."""
    depth = most = 0
    for byte in body:
        depth += (byte in b"[{") - (byte in b"]}")
        most = max(most, depth)
    return most


def _name(value: object) -> str | None:
    """A text that is valid as an identifier, as databases store it."""
    if not isinstance(value, str) or not 1 <= len(value) <= 255:
        return None
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)
