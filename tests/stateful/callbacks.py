"""Callbacks as the model of FLORA posts them, and as somebody forges them."""

import json
from dataclasses import dataclass
from typing import Any, Final

from tests.stateful.clocks import Clocks
from tests.stateful.flora import WORKSPACE
from tracker.flora.signature import sign

TOLERANCE: Final = 900
FORGERIES: Final = ("unsigned", "wrong secret", "altered body", "old time", "coming time")


@dataclass(slots=True, kw_only=True, eq=False)
class Callback:
    """An event as FLORA tells of it: the same bytes at each attempt.

    `outcomes` are what the tracker may make of it. `tries` counts the attempts with a signature
    that has to be believed, `taken` those that were answered with 2xx.
    """

    delivery_id: str
    run_id: str
    status: str
    body: bytes
    signed_at: int
    outcomes: tuple[str, ...] = ("applied",)
    tries: int = 0
    taken: int = 0


def callback(clocks: Clocks, delivery_id: str, run_id: str, status: str, **more: Any) -> Callback:
    """A callback that is first sent now. `more` goes into its data, or in place of its type."""
    kind = more.pop("type", f"run.{status}")
    understood = kind == f"run.{status}" and more.get("workspace_id", WORKSPACE) == WORKSPACE
    data = {"run_id": run_id, "run_type": "technique", "workspace_id": WORKSPACE, "status": status}
    now = clocks.flora()
    body = {
        "id": delivery_id,
        "type": kind,
        "api_version": "2026-06-11",
        "created_at": round(now.timestamp() * 1000),
        "data": data | more,
    }
    return Callback(
        delivery_id=delivery_id,
        run_id=run_id,
        status=status,
        body=json.dumps(body).encode(),
        signed_at=int(now.timestamp()),
        outcomes=("applied",) if understood else ("quarantined",),
    )


def signed(one: Callback, secrets: list[str]) -> str:
    """The header of an attempt: the first one's time, and a signature with each secret in use."""
    headers = [sign(one.body, secret, at=one.signed_at) for secret in secrets]
    return ",".join([headers[0], *(header.partition(",")[2] for header in headers[1:])])


def forged(how: str, body: bytes, secret: str, clocks: Clocks) -> tuple[bytes, str | None]:
    """A body and a header that must not be believed."""
    now = int(clocks.ours().timestamp())
    match how:
        case "unsigned":
            return body, None
        case "wrong secret":
            return body, sign(body, f"{secret}_", at=now)
        case "altered body":
            return body.replace(b'"run.', b'"run. ', 1), sign(body, secret, at=now)
        case "old time":
            return body, sign(body, secret, at=now - TOLERANCE - 1)
        case _:
            return body, sign(body, secret, at=now + TOLERANCE + 1)
