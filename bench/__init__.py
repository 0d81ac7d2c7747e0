"""Benchmarks: how the tracker does under load and at scale. Not part of the package."""
