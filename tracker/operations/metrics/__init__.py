"""Prometheus metrics: what this process does (counters.py), and current values (gauges.py).

Each set of services has its own registry, so two sets in one process share nothing. Multi-process
mode of prometheus-client is not used: each process has a port of its own, and what must be the same
everywhere comes from the database.
"""

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from tracker.core.clock import Clock
from tracker.operations.metrics.counters import Counters
from tracker.operations.metrics.gauges import DatabaseGauges, ProcessGauges

# Without this, each counter has a second series with the time of its first increase.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(Counters):
    """All metrics of a process: the hooks of `Counters`, and gauges read at each scrape."""

    def __init__(self, *, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry, clock=clock)
        self._database: DatabaseGauges | None = None
        ProcessCollector(registry=self.registry)

    def watch(self, process: ProcessGauges, database: DatabaseGauges) -> None:
        """Add the gauges. Call `aclose` before the database is closed."""
        self._database = database
        self.registry.register(process)
        self.registry.register(database)

    async def aclose(self) -> None:
        if self._database is not None:
            await self._database.aclose()

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text in the format that `accept` asks for, and its content type."""
        if self._database is not None:
            await self._database.refresh()
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is not a number
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type
