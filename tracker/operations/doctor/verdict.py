"""What the answer to a delivery that was not taken means, and what to do about it.

Errors of the tracker's own are told from those of what stands in front of it: they are JSON of a
known shape, and numbered.
"""

from typing import Final, NamedTuple
from urllib.parse import urlsplit

from tracker.core.plain import plain
from tracker.operations.doctor.delivery import Reply
from tracker.settings import CALLBACK_PATH as _PATH

_SERVER: Final = "`tracker serve`"
LONGEST_QUOTE: Final = 120


class Verdict(NamedTuple):
    """What was seen, as a clause that goes on after "a delivery", and what to do."""

    seen: str
    advice: str


def verdict(reply: Reply) -> Verdict:
    """Why a delivery was not taken as it should have been."""
    if reply.kind != "answer":
        return _no_answer(reply)
    if reply.error_code is not None or reply.to_sign_in:
        return _of_the_tracker(reply)
    return _in_front(reply)


def _no_answer(reply: Reply) -> Verdict:
    if reply.kind == "timeout":
        return Verdict(
            f"gets no answer within {reply.seconds:.0f} s, after which FLORA gives an attempt up",
            f"See whether {_SERVER} runs and answers on its own port (`curl http://127.0.0.1:8080"
            "/healthz`), whether the proxy in front passes on to that port, and whether a firewall "
            "drops what comes.",
        )
    if reply.kind == "certificate":
        return Verdict(
            f"is not sent, because the certificate is not valid: {quote(reply.trouble)}",
            "Give the proxy in front a certificate for this very name, from a public authority, "
            "with its whole chain (for instance by Caddy or certbot), and renew it in time.",
        )
    return Verdict(
        f"cannot be sent: {quote(reply.trouble)}",
        f"Start {_SERVER} and the proxy in front, and let the firewall pass this address and port. "
        "Where this machine cannot reach its own public address (a router that does not lead "
        "back), run the doctor from another one, with the same settings.",
    )


def _of_the_tracker(reply: Reply) -> Verdict:
    seen = f"is answered {reply.status} by the tracker: {quote(reply.error_message)}"
    match reply.status:
        case 401 if reply.signature == "missing":
            return Verdict(
                "comes without its Flora-Signature header",
                "Let the proxy in front pass on all request headers; it drops this one.",
            )
        case 401 if reply.signature == "wrong":
            return Verdict(
                seen,
                f"{_SERVER} has another FLORA_WEBHOOK_SECRET than the doctor: restart it with the "
                "same settings. If it has the same, the proxy in front changes the body (it must "
                "pass the bytes on as they are), or the machine there has a wrong clock.",
            )
        case 303 | 401 | 403 | 404 | 405:
            # Where a token is set, what is no route is not told from what is closed.
            return Verdict(
                f"comes to the tracker, but not as POST {_PATH} ({reply.status})",
                "Let the proxy in front pass method and path on as they are, without a prefix "
                "taken off or put on; TRACKER_PUBLIC_URL holds the path below which it does.",
            )
        case 503 if "not set up" in reply.error_message:
            return Verdict(
                "is answered 503 by the tracker, which has no signing secret",
                f"Set FLORA_WEBHOOK_SECRET where {_SERVER} runs too, and restart it.",
            )
        case 503:
            return Verdict(
                seen,
                f"The database does not take rows from {_SERVER} in time: its log says why, under "
                "callback.refused.",
            )
        case _:
            return Verdict(seen, f"The log of {_SERVER} says more, under the same time.")


def _in_front(reply: Reply) -> Verdict:
    status = f"is answered {reply.status} by something in front of the tracker"
    match reply.status:
        case code if 200 <= code < 300:
            return Verdict(
                f"{status}, and does not come to it: FLORA takes that as delivered",
                f"Let the proxy in front pass POST {_PATH} on to {_SERVER}; what answers now is "
                "another site, a start page, or a sign-in.",
            )
        case code if 300 <= code < 400:
            return Verdict(
                f"is answered {code}, a redirect{_target(reply)}, and FLORA follows none",
                "Set TRACKER_PUBLIC_URL to the address that it is redirected to, if that is this "
                f"service; else take the redirect off for POST {_PATH}.",
            )
        case 401 | 403 | 407:
            return Verdict(
                status,
                f"Let {_PATH} pass without a sign-in, an address list or a bot filter: FLORA has "
                "none of these, and its deliveries are signed.",
            )
        case 404 | 405 | 410:
            return Verdict(
                status,
                f"Let the proxy in front pass POST {_PATH} on to {_SERVER}, or mend the name, port "
                "or path in TRACKER_PUBLIC_URL.",
            )
        case 413:
            return Verdict(
                status,
                "Let the proxy in front take bodies of 256 KiB (nginx: client_max_body_size 1m).",
            )
        case 429:
            return Verdict(
                status,
                f"Take the rate limit off {_PATH}: callbacks of a batch come in bursts.",
            )
        case 502 | 503 | 504:
            return Verdict(
                f"{status}, which does not reach it",
                f"Start {_SERVER}, and let the proxy in front lead to its address and port; from "
                "another container or host it is reached only with --host 0.0.0.0 and "
                "TRACKER_API_TOKEN set.",
            )
        case _:
            return Verdict(status, "The log of what stands in front of the tracker says why.")


def _target(reply: Reply) -> str:
    """Where a redirect leads: without its query, which may be somebody's secret."""
    try:
        parts = urlsplit(reply.headers.get("location", ""))
        host = parts.hostname or ""
        shown = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return ""
    return f" to {quote(shown if host else parts.path)}" if host or parts.path else ""


def quote(text: str) -> str:
    """Other people's text, on one line, and not too much of it."""
    line = plain(" ".join(text.split())).rstrip(".")
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"
