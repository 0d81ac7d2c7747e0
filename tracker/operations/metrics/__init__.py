"""What Prometheus is told: what this process does, and how things stand in the database."""

from tracker.operations.metrics.exposition import Metrics

__all__ = ["Metrics"]
