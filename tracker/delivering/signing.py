"""Signatures of the messages that the tracker sends, as Standard Webhooks (v1) has them.

The key is the base64 after `whsec_`; signed is `webhook-id.webhook-timestamp.body`.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from tracker import __version__

_PREFIX: Final = "whsec_"


def new_secret() -> str:
    """A signing secret of 24 random bytes."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def check_secret(secret: str) -> str:
    """`secret`, if it is `whsec_` and the base64 of at least 16 bytes. Raises `ValueError`."""
    try:
        long_enough = len(_key(secret)) >= 16
    except ValueError:
        long_enough = False
    if not long_enough or not secret.startswith(_PREFIX):
        raise ValueError(
            "must be whsec_ and the base64 of a key of at least 16 bytes, as "
            '`echo "whsec_$(openssl rand -base64 24)"` prints'
        )
    return secret


def signed_headers(
    message_id: str, body: bytes, secret_values: Sequence[str], *, at: datetime
) -> dict[str, str]:
    """The headers of an attempt, with a signature for each secret."""
    timestamp = str(int(at.timestamp()))
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(_key(secret), signed, hashlib.sha256) for secret in secret_values)
    return {
        "content-type": "application/json",
        "user-agent": f"flora-run-tracker/{__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(one).decode()}" for one in digests),
    }


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
