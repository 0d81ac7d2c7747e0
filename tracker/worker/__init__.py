"""The worker: APScheduler says when; what is done lies in `tracker.tracking`."""

from tracker.worker.scheduler import Worker

__all__ = ["Worker"]
