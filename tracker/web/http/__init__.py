"""The HTTP server and its limits on clients."""
