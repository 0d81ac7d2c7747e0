"""One TLS context for all of httpx's clients, which are opened by the thousand: reading the
authorities that each of them trusts is half of what that takes."""

import os
import ssl
from typing import Any

import httpx

_contexts: dict[Any, ssl.SSLContext] = {}
_create = httpx._transports.default.create_ssl_context


def one_context(verify: Any = True, **options: Any) -> ssl.SSLContext:
    """The context of a client; a new one where something about it is set."""
    if verify is not True or options.get("cert"):
        return _create(verify, **options)
    trusted = [os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]
    key = (options.get("trust_env", True), *trusted)
    if key not in _contexts:
        _contexts[key] = _create(verify, **options)
    return _contexts[key]


def share_context() -> None:
    """Let clients have it from now on."""
    httpx._transports.default.create_ssl_context = one_context
    httpx.create_ssl_context = one_context
