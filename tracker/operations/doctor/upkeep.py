"""What waits for a person: callbacks that do not come or are not applied, quarantine, open starts,
contradictions."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from tracker.core.formatting import percent
from tracker.operations.doctor.finding import Finding, ok, warning
from tracker.store.queries.attention import BOUND, Gauges

ENOUGH: Final = 10
"""So many callbacks have to be expected before their rate says anything."""
MISSED: Final = 0.1
BEHIND: Final = timedelta(seconds=60)
"""A callback that is not applied after this long is behind."""
SHOWN: Final = 3


def look(gauges: Gauges, conflicts: Sequence[str], *, now: datetime) -> list[Finding]:
    """All of it, from figures that were read before, at that moment."""
    return [
        _missed(gauges),
        _inbox(gauges, now),
        _quarantine(gauges.quarantined),
        _starts(gauges.unresolved_starts),
        _conflicts(conflicts),
        _bills(sum(gauges.unpriced.values())),
    ]


def _missed(gauges: Gauges) -> Finding:
    name: Final = "missed callbacks"
    counts: Counter[str] = Counter()
    for (_, word), count in gauges.callbacks.items():
        counts[word] += count
    expected = sum(counts[word] for word in ("came", "late", "missed"))
    if not expected:
        return ok(name, "No run that was started with a callback has ended lately.")
    told = f"{counts['missed']} of {expected} callbacks that were expected lately did not come"
    if expected >= ENOUGH and counts["missed"] >= MISSED * expected:
        return warning(
            name,
            f"{told} ({percent(counts['missed'] / expected)}).",
            "If all of the above is ok, see in the log under callback.refused whether they come "
            "and are not taken, and at the firewall whether FLORA is let in. Their runs were "
            "found by polling.",
        )
    return ok(name, f"{told}.")


def _inbox(gauges: Gauges, now: datetime) -> Finding:
    name: Final = "inbox"
    oldest = gauges.oldest_waiting_at
    if oldest is None or now - oldest < BEHIND:
        return ok(name, "Acknowledged callbacks are applied.")
    return warning(
        name,
        f"{_number(gauges.waiting)} acknowledged callbacks are not applied yet; the oldest came "
        f"{round((now - oldest).total_seconds())} s ago.",
        "They are stored, and none is lost. See that `tracker serve` or `tracker worker` of this "
        "version runs, and what inbox.not_applied says in the log; `tracker poll` applies too.",
    )


def _quarantine(count: int) -> Finding:
    name: Final = "quarantine"
    if not count:
        return ok(name, "Every callback was understood.")
    return warning(
        name,
        f"{_number(count)} authentic callbacks were not understood.",
        "`tracker deliveries list --outcome quarantined` says why; after an update `tracker "
        "deliveries replay --all` reads them again. Their runs were found by polling.",
    )


def _starts(count: int) -> Finding:
    name: Final = "starts"
    if not count:
        return ok(name, "Of every start it is known what became of it.")
    return warning(
        name,
        f"Of {_number(count)} starts it is not known whether FLORA began a run.",
        "Look for each in FLORA around its time (SELECT * FROM v_open_starts): if the run is "
        "there, `tracker runs track RUN_ID`; if it is not, start it again under another key.",
    )


def _conflicts(run_ids: Sequence[str]) -> Finding:
    name: Final = "conflicts"
    if not run_ids:
        return ok(name, "No two sources disagree about how a run ended.")
    shown = ", ".join(run_ids[:SHOWN]) + ("" if len(run_ids) <= SHOWN else ", …")
    return warning(
        name,
        f"Two sources disagreed about how {_number(len(run_ids))} runs ended ({shown}).",
        "`tracker runs explain RUN_ID` shows both; FLORA's API was believed. Where it may be "
        "wrong, ask FLORA's support.",
    )


def _bills(count: int) -> Finding:
    name: Final = "bills"
    if not count:
        return ok(name, "FLORA has billed every run of the last 7 days, or may still do so.")
    return warning(
        name,
        f"FLORA never billed {count} runs of the last 7 days: their cost is not known, and totals "
        "are at least what they say.",
        "Compare with FLORA's own billing page. `tracker reconcile --since 8d` reads their costs "
        "once more; TRACKER_COST_GIVE_UP says how long they are looked for.",
    )


def _number(count: int) -> str:
    return f"{count} or more" if count >= BOUND else str(count)
