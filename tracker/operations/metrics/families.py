"""Families of gauges, with their samples."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Family = type[GaugeMetricFamily | CounterMetricFamily]
UNKNOWN: Final = "unknown"
"""The `workspace_id` of runs whose workspace is not known."""


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(f"tracker_{name}", meaning, value=value)


def labelled(
    name: str,
    meaning: str,
    values: Mapping[Any, float | Decimal | None],
    *,
    labels: Sequence[str] = ("workspace_id",),
    family: Family = GaugeMetricFamily,
) -> Metric:
    """A metric with samples; the keys of `values` are one label value or a tuple of them."""
    metric = family(f"tracker_{name}", meaning, labels=labels)
    for key, value in values.items():
        if value is not None:
            words = (key,) if isinstance(key, str) else key
            metric.add_metric([word or UNKNOWN for word in words], float(value))
    return metric


def timestamp(at: datetime | None) -> float:
    """Unix seconds; 0 for never."""
    return at.timestamp() if at else 0


def age(now: datetime, since: datetime | None) -> float:
    """Seconds since then; 0 for never."""
    return max((now - since).total_seconds(), 0) if since else 0
