"""Brings every FLORA run to its true end, outputs and cost, whether or not its callback arrives."""

from importlib.metadata import version

__version__ = version("flora-run-tracker")
