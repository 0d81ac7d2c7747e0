"""Runs and the start log: what is started, watched, shown and downloaded."""
