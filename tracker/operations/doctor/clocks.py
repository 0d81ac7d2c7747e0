"""FLORA's clock and ours: signed times are compared with ours, and so are leases."""

from datetime import timedelta
from typing import Final

from tracker.core.formatting import duration
from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.operations.doctor.given import LAST_ATTEMPT

ROUGH: Final = timedelta(seconds=10)
"""A `Date` has whole seconds, and the answer that carries it was on its way for some."""
APART: Final = timedelta(seconds=5)
_SET = "Let the machine's clock be set over the network (chrony, systemd-timesyncd)"


def compare(
    flora: timedelta | None, server: timedelta | None, *, tolerance: float
) -> list[Finding]:
    """Compare them.

    `flora` and `server` are FLORA's and the database server's clock minus this machine's, as far as
    they are known; `tolerance` is how many seconds a signed time may be off, 0 for unchecked. With
    PostgreSQL the tracker goes by the server's clock.
    """
    findings = [_with_flora(flora, server, tolerance)]
    if server is not None:
        findings.append(_with_server(server))
    return findings


def _with_flora(flora: timedelta | None, server: timedelta | None, tolerance: float) -> Finding:
    name: Final = "clock"
    whose = "This machine's clock" if server is None else "The database server's clock"
    if flora is None:
        return warning(
            name,
            f"{whose} could not be compared with FLORA's, which gave no answer.",
            "Mend the key first, and run the doctor again.",
        )
    ahead = (server or timedelta(0)) - flora
    if abs(ahead) <= ROUGH:
        return ok(name, f"{whose} agrees with FLORA's to within {ROUGH.total_seconds():g} s.")
    seen = f"{whose} is {_apart(ahead)} FLORA's"
    advice = f"{_SET}{'' if server is None else ' where PostgreSQL runs'}."
    allowed = timedelta(seconds=tolerance)
    if allowed and abs(ahead) > allowed:
        return failed(
            name,
            f"{seen}, over the {tolerance:g} s that a signed time may be off: every callback is "
            "refused as too old or too new.",
            advice,
        )
    if allowed and ahead + timedelta(seconds=LAST_ATTEMPT) > allowed:
        return warning(
            name,
            f"{seen}. A callback that comes at FLORA's last attempt is signed up to "
            f"{LAST_ATTEMPT} s before, and would be refused.",
            advice,
        )
    return warning(name, f"{seen}.", advice)


def _with_server(server: timedelta) -> Finding:
    name: Final = "machine clock"
    if abs(server) <= APART:
        return ok(name, "This machine's clock agrees with the database server's.")
    return warning(
        name,
        f"This machine's clock is {_apart(-server)} the database server's. The tracker goes by the "
        "server's, but the times of its log and of its cron do not.",
        f"{_SET} here.",
    )


def _apart(ahead: timedelta) -> str:
    return f"{duration(abs(ahead))} {'ahead of' if ahead > timedelta(0) else 'behind'}"
