"""What leaves the tracker: outputs of runs as files, and events to endpoints and handlers."""
