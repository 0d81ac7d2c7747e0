"""FLORA's callbacks: whether one is authentic, and what it says.

`verify` its signature, or `sign` like FLORA::

    Flora-Signature: t=<unix seconds>,v1=<hex>[,v1=<hex>…]

Each `v1` is the lower-case hex of HMAC-SHA256 over `<t>.<raw body>`. The key is the whole secret,
`whsec_` included, as UTF-8: this is not the Standard Webhooks scheme. While a secret is rotated a
header holds several `v1`, one of which has to match. Other parts of a header are ignored.

A body is read as tolerantly as by `parse`: `delivery_of` is how it is stored, understood or not,
and `observation_of` is what it says of its run.
"""

import hmac
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import Final, Literal

from tracker.core.errors import FloraUnreadable, TrackerError
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery
from tracker.core.run import RunStatus
from tracker.flora.parse import as_id, as_object, as_time, decode, required_object, run_error

LONGEST_HEADER: Final = 4096
MOST_PARTS: Final = 64
"""FLORA's own header has about 80 bytes in two parts."""
LONGEST_TIME: Final = 12
"""Digits of a `t`."""

_EVENTS: Final = {"run.completed": RunStatus.COMPLETED, "run.failed": RunStatus.FAILED}

Reason = Literal["missing", "malformed", "expired", "mismatch"]


class SignatureError(TrackerError):
    """A callback is not authentic.

    `reason` is "missing" (no header), "malformed" (no usable time or signature), "mismatch" (of
    another secret or body) or "expired" (authentic, but of another time).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def verify(
    header: str | bytes | None,
    body: bytes,
    secrets: Sequence[str],
    *,
    now: datetime,
    tolerance: float,
) -> int:
    """The position of the secret among `secrets` that signed these raw bytes.

    `now` is aware; `tolerance` is how many whole seconds the signed time may be off, either way, as
    in FLORA's SDK; 0 does not check it. The time is checked last, so that "expired" implies an
    authentic signature. An empty secret matches nothing.

    Raises `SignatureError` and nothing else, whatever the header holds.
    """
    if not header:
        raise SignatureError("missing", "there is no Flora-Signature header")
    signed_at, signatures = _parts(header if isinstance(header, bytes) else _utf8(header))
    message = b"%d.%b" % (signed_at, body)
    position = _signed_with(secrets, message, signatures)
    if tolerance > 0 and abs(int(now.timestamp()) - signed_at) > tolerance:
        raise SignatureError("expired", f"the signed time is over {tolerance:g} s off")
    return position


def sign(body: bytes, secret: str, *, at: datetime | int) -> str:
    """The header value that FLORA would send with `body` at `at` (aware, or Unix seconds)."""
    signed_at = at if isinstance(at, int) else int(at.timestamp())
    digest = _hex_digest(secret, b"%d.%b" % (signed_at, body))
    return f"t={signed_at},v1={digest.decode()}"


def delivery_of(
    body: bytes,
    *,
    at: datetime,
    webhook_id: str | None = None,
    signers: Sequence[str | None] = (None,),
    token: str | None = None,
) -> Delivery:
    """An authentic callback, received at `at`, as it is stored, understood or not.

    Its id is the body's, else `webhook_id` (the header `Flora-Webhook-Id`), else the body's digest.
    `signers` are the workspaces whose secret signed it: one, unless several share a secret; then it
    is the one that the body names, else the first. `token` is that of its address. Raises nothing,
    whatever the bytes.
    """
    try:
        event = as_object(decode(body))
    except FloraUnreadable:
        event = {}
    data = as_object(event.get("data"))
    named = as_id(data.get("workspace_id"))
    signer = named if named in signers else signers[0]
    return Delivery(
        delivery_id=as_id(event.get("id")) or as_id(webhook_id) or digest_id(body),
        received_at=at,
        body=body,
        run_id=as_id(data.get("run_id")),
        event_type=as_id(event.get("type")),
        api_version=as_id(event.get("api_version")),
        workspace_id=signer or named,
        created_at=as_time(event.get("created_at")),
        callback_token=token,
    )


def observation_of(body: bytes, *, at: datetime) -> Observation | str:
    """The observation of an authentic callback, received at `at`; or why it is not understood.

    Raises nothing, whatever the bytes.
    """
    try:
        event = required_object(decode(body), "the body")
    except FloraUnreadable as exc:
        return str(exc)
    status, data = _EVENTS.get(as_id(event.get("type")) or ""), event.get("data")
    if status is None:
        return "the type is neither run.completed nor run.failed"
    if not isinstance(data, dict):
        return "data is not a JSON object"
    run_id, workspace_id = as_id(data.get("run_id")), as_id(data.get("workspace_id"))
    if run_id is None:
        return "data has no run_id that can be one"
    if workspace_id is None and data.get("workspace_id") is not None:
        return "data.workspace_id can be no workspace"
    if as_id(data.get("status")) != status:
        return "data.status does not agree with the type"
    return Observation(
        run_id=run_id,
        source=Source.CALLBACK,
        at=at,
        status=status,
        run_type=as_id(data.get("run_type")),
        workspace_id=workspace_id,
        error=run_error(data),
    )


def digest_id(body: bytes) -> str:
    """The id of a delivery that has none of its own."""
    return f"sha256:{sha256(body).hexdigest()}"


def _parts(header: bytes) -> tuple[int, list[bytes]]:
    """The signed time (the last of several, as in FLORA's SDK) and all signatures."""
    if len(header) > LONGEST_HEADER or header.count(b",") >= MOST_PARTS:
        raise SignatureError("malformed", "the Flora-Signature header is far too long")
    signed_at = None
    signatures = []
    for part in header.split(b","):
        key, _, value = part.partition(b"=")
        key, value = key.strip(), value.strip()
        if key == b"v1" and value:
            signatures.append(value)
        elif key == b"t" and value.isdigit() and len(value) <= LONGEST_TIME:
            signed_at = int(value)
    if signed_at is None:
        raise SignatureError("malformed", "the Flora-Signature header has no time (t=)")
    if not signatures:
        raise SignatureError("malformed", "the Flora-Signature header has no signature (v1=)")
    return signed_at, signatures


def _signed_with(secrets: Sequence[str], message: bytes, signatures: list[bytes]) -> int:
    """The position of the secret that made one of the signatures."""
    for position, secret in enumerate(secrets):
        if not secret:
            continue
        expected = _hex_digest(secret, message)
        for signature in signatures:
            if hmac.compare_digest(expected, signature):
                return position
    raise SignatureError("mismatch", "no signing secret matches the signature")


def _hex_digest(secret: str, message: bytes) -> bytes:
    keyed = _keyed(secret).copy()
    keyed.update(message)
    return keyed.hexdigest().encode()


@lru_cache(maxsize=64)
def _keyed(secret: str) -> hmac.HMAC:
    """An HMAC with its key. Setting it up takes ten microseconds in a busy process, more than the
    rest of verifying."""
    return hmac.new(_utf8(secret), digestmod="sha256")


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # a header or setting may hold any code point
