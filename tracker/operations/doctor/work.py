"""The work: whether something polls and sweeps, and what waits for a person.

Judged by what is done, not by which processes exist: one may be there and stuck.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from tracker.core.contact import ContactState
from tracker.core.errors import StoreError
from tracker.core.formatting import counted, duration, moment, percent
from tracker.operations.doctor import Finding, Name, failed, ok, warning
from tracker.operations.doctor.settings import label_of
from tracker.settings import Settings
from tracker.settings.values import longest_wait
from tracker.store.engine import Database
from tracker.store.queries import endpoints, overview, sweeps
from tracker.store.queries.endpoints import Backlog, EndpointRow
from tracker.store.queries.overview import BOUND, LATE_AFTER, Gauges
from tracker.store.queries.sweeps import SweepHealth, UnreadSpan
from tracker.store.queries.workspaces import stored_contacts

STUCK_AFTER: Final = timedelta(minutes=5)
"""How late a sweep may start, or a due run be read, before no worker seems to run."""
NAMED: Final = 3
_START: Final = (
    "Start `tracker serve` (without --no-worker) or `tracker worker` with the same settings; if "
    "cron runs `tracker poll` and `tracker reconcile`, check its log."
)
_STUCK: Final = (
    "If one is running, its log says what blocks it (poll.flora_down, flora.rate_limited, "
    "loop.database_down)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkState:
    """What the database shows of the work.

    `now` is on the tracker's clock, `interval` the longest time between two scheduled sweeps,
    `sweeping` whether a sweep is running. `unread` are the spans of the history that FLORA did not
    let the tracker read.
    """

    now: datetime
    interval: timedelta
    sweeps: Sequence[SweepHealth]
    gauges: Gauges
    sweeping: bool
    unread: Sequence[UnreadSpan] = ()
    conflicts: Sequence[str] = ()
    contacts: Mapping[str, ContactState] = field(default_factory=dict)
    endpoints: Sequence[EndpointRow] = ()
    backlogs: Mapping[str, Backlog] = field(default_factory=dict)


async def check(settings: Settings, ids: Sequence[str | None], now: datetime) -> list[Finding]:
    """Judge worker, sweeps and backlog by the database.

    `ids` are the workspaces' ids, as far as known; `now` is on the tracker's clock.
    """
    url = settings.tracker_database_url
    try:
        async with await Database.open(url, application_name="tracker-doctor") as database:
            state = WorkState(
                now=now,
                interval=timedelta(seconds=longest_wait(settings.tracker_reconcile_cron, now)),
                sweeps=await sweeps.sweep_health(database),
                gauges=await overview.read_gauges(database, now=now),
                sweeping=await sweeps.sweeping(database, now=now),
                unread=sweeps.unread(await sweeps.everything(database)),
                conflicts=await overview.conflicts(database),
                contacts=await stored_contacts(database, now=now),
                endpoints=await endpoints.list_endpoints(database),
                backlogs=await endpoints.backlogs(database),
            )
    except StoreError as error:
        advice = "Fix the database first, and run the doctor again."
        return [failed("worker", f"The database could not be read: {error}.", advice)]
    workspaces = settings.all_workspaces
    keyed = [one for one in workspaces if one.api_key]
    findings = [
        replace(
            check_connection(state.contacts.get(settings.place_of(one)), state),
            workspace=label_of(settings, one),
        )
        for one in keyed
    ]
    findings += [check_worker(state)] if keyed else []
    for workspace, workspace_id in zip(workspaces, ids, strict=True):
        if workspace.api_key is not None:  # without one there are no sweeps
            own = _of_workspace(state, workspace_id, is_only=len(workspaces) == 1)
            findings.append(replace(check_sweeps(own), workspace=label_of(settings, workspace)))
    findings += check_backlog(state.gauges, state.conflicts, now=now)
    return findings + check_messages(state, [one.id for one in settings.endpoints])


def _of_workspace(state: WorkState, workspace_id: str | None, *, is_only: bool) -> WorkState:
    """The sweeps and unread spans of one workspace."""
    names = {workspace_id}
    if is_only:  # it may have been swept before its id was known
        names |= {"default", None}
    any_sweep = is_only and workspace_id is None
    return replace(
        state,
        sweeps=[one for one in state.sweeps if any_sweep or one.workspace_id in names],
        unread=[one for one in state.unread if workspace_id in (None, one.workspace_id)],
    )


def check_connection(contact: ContactState | None, state: WorkState) -> Finding:
    """Whether FLORA answers the processes of the tracker; the doctor's own request is another."""
    if contact is None:
        return warning("connection", "No process of the tracker has asked FLORA yet.", _START)
    if state.now - contact.asked_at > state.interval + STUCK_AFTER:
        seen = f"The tracker has not asked FLORA since {moment(contact.asked_at)}."
        return warning("connection", seen, _START)
    if (found := contact.trouble) is not None:
        what = "FLORA has not answered the tracker" if found.silent else f"{found.trouble}"
        return failed(
            "connection",
            f"{what[0].upper()}{what[1:]} since {moment(found.since)}: {found.reason.rstrip('.')}.",
            f"{found.advice[0].upper()}{found.advice[1:]}.",
        )
    if contact.answered_at is None:
        advice = "Run the doctor again in a minute: a first failure is reported after 30 s."
        return warning("connection", "FLORA has not answered the tracker yet.", advice)
    ago = duration(max(state.now - contact.answered_at, timedelta(0)))
    return ok("connection", f"FLORA answered the tracker {ago} ago.")


def check_worker(state: WorkState) -> Finding:
    """Whether due runs are read, and sweeps start in time."""
    gauges = state.gauges
    oldest = gauges.oldest_due_at
    waited = timedelta(0) if oldest is None else state.now - oldest
    overdue = f"{counted(gauges.overdue, 'run is', 'runs are')} overdue" + (
        f", the oldest by {duration(waited)}." if waited > LATE_AFTER else ", waiting for a retry."
    )
    started = max((one.last_started_at for one in state.sweeps), default=None)
    if waited > STUCK_AFTER:
        return failed("worker", overdue, f"{_START} {_STUCK}")
    if started is None:
        return failed("worker", "No process has ever polled or swept here.", _START)
    since = state.now - started
    if since > state.interval + STUCK_AFTER and not state.sweeping:
        return failed(
            "worker",
            f"No sweep has started for {duration(since)}; one is due every "
            f"{duration(state.interval)}.",
            f"{_START} {_STUCK}",
        )
    if gauges.overdue:
        advice = f"Run the doctor again in a few minutes; none should be left. {_STUCK}"
        return warning("worker", overdue, advice)
    return ok("worker", f"No run is overdue, and a sweep started {duration(since)} ago.")


def check_sweeps(state: WorkState) -> Finding:
    """Whether one workspace's history was swept completely, and when."""
    newest = max(state.sweeps, key=lambda one: one.last_started_at, default=None)
    complete = max((one.complete_at for one in state.sweeps if one.complete_at), default=None)
    since = None if complete is None else state.now - complete
    overdue = complete is None or sweeps.is_sweep_late(complete, state.now, interval=state.interval)
    last = "None was ever complete" if since is None else f"Last complete {duration(since)} ago"
    reconcile = "`tracker reconcile` runs one now and reports what it finds."
    if newest is not None and (error := newest.last_error) is not None:
        cause = "If it is a 5xx or a rate limit it passes; otherwise check the key."
        advice = f"{cause if 'FLORA' in error else 'Check the database.'} {reconcile}"
        say = failed if overdue else warning
        return say("sweeps", f"The last sweep failed: {error}. {last}.", advice)
    if overdue and state.sweeping:
        return warning(
            "sweeps",
            f"A sweep is running. {last}.",
            "Wait for it: a first one goes back TRACKER_HISTORY_SINCE, a hundred runs a page.",
        )
    if overdue:
        return failed("sweeps", f"{last}.", f"Check the key and the worker; {reconcile}")
    if state.unread:
        gap = state.unread[0]
        return warning(
            "sweeps",
            f"{last}. {counted(len(state.unread), 'span')} of FLORA's history could not be read, "
            f"the newest up to {moment(gap.to_at)} ({gap.run_type} runs): {gap.error}.",
            "They are retried automatically, with growing waits. Runs that others started there "
            "are missing until then: `tracker verify` names them.",
        )
    if newest is not None and newest.generations_error is not None:
        return warning(
            "sweeps",
            f"{last}. Generations could not be listed: {newest.generations_error}.",
            "Technique runs are not affected. Check whether the key may list generations.",
        )
    through = max((one.through for one in state.sweeps if one.through), default=None)
    checked = through and f" Checked against FLORA up to {moment(through)}."
    return ok("sweeps", f"{last}.{checked or ''}")


def check_backlog(gauges: Gauges, conflicts: Sequence[str], *, now: datetime) -> list[Finding]:
    """What waits for a person: missed and unapplied callbacks, quarantine, starts, conflicts."""
    shown = ", ".join(conflicts[:NAMED]) + ("" if len(conflicts) <= NAMED else ", …")
    unpriced = sum(gauges.unpriced.values())
    return [
        _missed_callbacks(gauges),
        _inbox(gauges, now),
        _none_wait(
            "quarantine",
            gauges.quarantined,
            "Every callback was understood.",
            f"{_counted(gauges.quarantined, 'authentic callback was', 'authentic callbacks were')} "
            "not understood.",
            "`tracker deliveries list --outcome quarantined` shows why; after an update `tracker "
            "deliveries replay --all` reads them again. No results lost: polling found them.",
        ),
        _none_wait(
            "starts",
            gauges.unresolved_starts,
            "No start waits for a person."
            if gauges.open_starts
            else "The outcome of every start is known.",
            f"{_counted(gauges.unresolved_starts, 'start is', 'starts are')} unresolved: FLORA may "
            "have started a run, or not.",
            "`tracker starts list` lists them, and `tracker starts show KEY` shows which runs one "
            "may have become and what to compare; `tracker starts resolve` says what it became.",
        ),
        _none_wait(
            "conflicts",
            len(conflicts),
            "Callback and API agree about how every run ended.",
            f"Callback and API disagree about how {_counted(len(conflicts), 'run', 'runs')} ended "
            f"({shown}).",
            "`tracker runs explain RUN_ID` shows both; the API's end is kept. If it may be wrong, "
            "ask FLORA's support.",
        ),
        _none_wait(
            "bills",
            unpriced,
            "Every run of the last 7 days is billed, or its bill may still arrive.",
            f"FLORA never billed {counted(unpriced, 'run')} of the last 7 days: the cost is not "
            "known, and totals are minimums.",
            "Compare with FLORA's own billing page. `tracker reconcile --since 8d` reads their "
            "costs once more; TRACKER_COST_GIVE_UP sets how long that is retried.",
        ),
    ]


def check_messages(state: WorkState, wanted: Collection[str]) -> list[Finding]:
    """Whether events are sent to the endpoints in use, and to those that are `wanted` by the
    settings here. A test event that is answered shows nothing of that."""
    used = {one.endpoint_id: one for one in state.endpoints if one.is_configured(state.now)}
    if unused := sorted(set(wanted) - used.keys()):
        return [
            failed(
                "messages",
                f"No process sends events to {', '.join(unused)}: the worker's settings lack it.",
                "Restart the processes with a worker, with the settings of the doctor. What ends "
                "before an endpoint is first in use is never sent to it.",
            )
        ]
    if disabled := next((one for one in used.values() if not one.enabled), None):
        name = disabled.endpoint_id
        return [
            failed(
                "messages",
                f"Nothing is sent to {name}, which is disabled: {disabled.disabled_reason}.",
                f"Correct that, and run `tracker endpoints enable {name}`: its messages wait.",
            )
        ]
    for name, one in used.items():
        backlog = state.backlogs.get(name, Backlog())
        if backlog.oldest_at is not None and backlog.is_late(state.now):
            error = f" Last error: {one.last_error}." if one.failing_since is not None else ""
            waited = duration(state.now - backlog.oldest_at)
            return [
                warning(
                    "messages",
                    f"A message has waited {waited} for {name}.{error}",
                    f"`tracker messages list --endpoint {name}` shows the attempts. Check that a "
                    "worker runs; messages are retried for three days.",
                )
            ]
    return [ok("messages", "Messages are sent to every endpoint.")] if used else []


def _none_wait(name: Name, count: int, fine: str, seen: str, advice: str) -> Finding:
    return warning(name, seen, advice) if count else ok(name, fine)


def _missed_callbacks(gauges: Gauges) -> Finding:
    health = gauges.callback_health()
    if health.miss_rate is None:
        return ok("missed callbacks", "No run with a callback has ended recently.")
    seen = f"{health.missed} of {health.expected} callbacks expected recently did not arrive"
    # An alert waits for enough runs; a person who has just set up the tracker has only a few.
    if health.miss_rate < overview.MISS_RATE:
        return ok("missed callbacks", f"{seen}.")
    return warning(
        "missed callbacks",
        f"{seen} ({percent(health.miss_rate)}).",
        "If everything above is ok, look for callback.refused in the log: with the reason "
        "mismatch, FLORA signs with another secret than FLORA_WEBHOOK_SECRET. Without it, "
        "something keeps FLORA out, such as a firewall. No results lost: polling found them.",
    )


def _inbox(gauges: Gauges, now: datetime) -> Finding:
    oldest = gauges.oldest_waiting_at
    if oldest is None or not overview.is_inbox_behind(oldest, now):
        return ok("inbox", "Acknowledged callbacks are applied.")
    return warning(
        "inbox",
        f"{_counted(gauges.waiting, 'acknowledged callback is', 'acknowledged callbacks are')} not "
        f"applied yet; the oldest arrived {round((now - oldest).total_seconds())} s ago.",
        "They are stored, and none is lost. Check that `tracker serve` or `tracker worker` of this "
        "version runs, and its log for loop.database_down; `tracker poll` applies them too.",
    )


def _counted(count: int, one: str, many: str) -> str:
    return f"{BOUND:,} or more {many}" if count >= BOUND else counted(count, one, many)
