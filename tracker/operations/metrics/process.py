"""Current values of this process, read at each scrape."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tracker import __version__
from tracker.core.clock import Clock
from tracker.core.contact import Trouble
from tracker.flora.request_limit import RequestLimitState
from tracker.operations.metrics.counters import Counters
from tracker.operations.metrics.families import Family, gauge, labelled, timestamp
from tracker.polling.contacts import Contacts
from tracker.polling.workspaces import Workspaces

_MISCONFIGURED: Final = (Trouble.NOT_FLORA, Trouble.LISTS_REFUSED, Trouble.OTHER_WORKSPACE)
_GAUGE, _TOTAL = GaugeMetricFamily, CounterMetricFamily
_Value = Callable[[RequestLimitState], float | None]
_REQUEST_LIMITS: Final[tuple[tuple[Family, str, str, _Value], ...]] = (
    (_GAUGE, "flora_requests_in_flight", "Requests to FLORA in flight.", lambda one: one.in_flight),
    (_GAUGE, "flora_requests_waiting", "Queued requests to FLORA.", lambda one: one.waiting),
    (_GAUGE, "flora_paused_seconds", "Rest of a wait set by FLORA.", lambda one: one.paused),
    (_GAUGE, "flora_budget_rate", "Allowed requests per second, if limited.", lambda one: one.rate),
    (_TOTAL, "flora_rate_limited", "Requests that FLORA answered 429.", lambda one: one.limited),
    (_TOTAL, "flora_budget_wait_seconds", "Time in the request queue.", lambda one: one.waited),
)


@dataclass(eq=False)
class ProcessGauges(Collector):
    """Current values of this process."""

    counters: Counters
    _: KW_ONLY
    waiting: Callable[[], int]
    workspaces: Workspaces
    contacts: Contacts
    sweep_seconds: Callable[[], float]
    clock: Clock

    def collect(self) -> Iterator[Metric]:
        """The metrics with their current values."""
        yield labelled("build_info", "1, with the version.", {__version__: 1}, labels=["version"])
        yield gauge("queue_entries", "Entries not committed yet.", self.waiting())
        yield gauge("worker_running", "1 in a process with a worker.", self.counters.worker_running)
        yield gauge(
            "worker_last_round_timestamp_seconds",
            "When the worker last checked for due runs; 0 if never.",
            timestamp(self.counters.last_round_at),
        )
        yield gauge(
            "sweep_interval_seconds",
            "Longest time between two scheduled sweeps.",
            self.sweep_seconds(),
        )
        yield from self._flora()

    def _flora(self) -> Iterator[Metric]:
        keyed = {one.name: one for one in self.workspaces if one.client is not None}
        limits = {name: one.require_client().request_limit.state() for name, one in keyed.items()}
        for family, name, meaning, value in _REQUEST_LIMITS:
            values = {workspace: value(limit) for workspace, limit in limits.items()}
            yield labelled(name, meaning, values, family=family)
        now = self.clock()
        states = {name: self.contacts.of(one) for name, one in keyed.items()}
        troubles = {
            name: one.trouble.trouble
            for name, one in states.items()
            if one and one.trouble and one.is_current(now)
        }
        yield labelled(
            "flora_breaker_open",
            "1 while FLORA refuses the API key.",
            {name: troubles.get(name) is Trouble.KEY_REFUSED for name in keyed},
        )
        yield labelled(
            "flora_up",
            "0 if FLORA was asked and has not answered for 30 s; absent if nothing asks it.",
            {name: one.answers(now) for name, one in states.items() if one},
        )
        yield labelled(
            "flora_misconfigured",
            "1 if FLORA_BASE_URL does not lead to FLORA, or the key belongs to another workspace.",
            {name: troubles.get(name) in _MISCONFIGURED for name in keyed},
        )
        yield labelled(
            "flora_last_answer_timestamp_seconds",
            "When FLORA last answered any process; 0 if never.",
            {name: timestamp(one.answered_at if one else None) for name, one in states.items()},
        )
