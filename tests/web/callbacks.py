"""Callbacks as FLORA posts them."""

import json
from datetime import datetime
from typing import Any

from tracker.core.clock import utc_now
from tracker.flora.callback import sign

SECRET = "whsec_of_the_tests"
PATH = "/callbacks/flora"


def event(run_id: str = "run_1", *, status: str = "completed", **more: Any) -> bytes:
    """The body of a callback."""
    return json.dumps(
        {
            "id": f"whd_{run_id}",
            "type": f"run.{status}",
            "api_version": "2026-06-11",
            "created_at": 1_750_000_000_000,
            "data": {"run_id": run_id, "run_type": "technique", "status": status},
        }
        | more
    ).encode()


def signature(body: bytes, secret: str = SECRET, at: datetime | None = None) -> str:
    """What stands in `Flora-Signature`."""
    return sign(body, secret, at=at or utc_now())


def signed(body: bytes, secret: str = SECRET) -> dict[str, str]:
    """The headers of a callback."""
    return {"Flora-Signature": signature(body, secret), "Content-Type": "application/json"}
