"""The core, tested without any I/O."""
