"""Callbacks as the model of FLORA sends them, and forged ones."""

import json
from dataclasses import dataclass
from typing import Any, Final

from tests.stateful.clocks import Clocks
from tests.stateful.flora import WORKSPACE
from tracker.flora.callback import sign

TOLERANCE: Final = 900
FORGERIES: Final = ("unsigned", "wrong secret", "altered body", "old time", "future time")


@dataclass(slots=True, kw_only=True, eq=False)
class Callback:
    """An event that FLORA reports, with the same bytes at each attempt.

    `outcomes` are its permitted outcomes in the inbox. `tries` counts the attempts with a valid
    signature, `acknowledged` those that were answered with 2xx.
    """

    delivery_id: str
    run_id: str
    status: str
    body: bytes
    signed_at: int
    outcomes: tuple[str, ...] = ("applied",)
    tries: int = 0
    acknowledged: int = 0


def callback(clocks: Clocks, delivery_id: str, run_id: str, status: str, **more: Any) -> Callback:
    """A callback that is first sent now. `more` is added to its data, or replaces its type."""
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
    """The header of an attempt: the time of the first one, and a signature with each secret."""
    headers = [sign(one.body, secret, at=one.signed_at) for secret in secrets]
    return ",".join([headers[0], *(header.partition(",")[2] for header in headers[1:])])


def forged(how: str, body: bytes, secret: str, clocks: Clocks) -> tuple[bytes, str | None]:
    """A body and a header that must be refused."""
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
