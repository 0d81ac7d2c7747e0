"""Keeps the final status, outputs and cost of every FLORA run, even when its callback is lost."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    # On demand: reading it takes a fifth of the time of `tracker --help`.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # noqa: PLC0415

    return version("flora-run-tracker")
