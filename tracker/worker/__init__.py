"""The worker: APScheduler decides when; `polling` and `starting` do the work."""
