"""Brings every FLORA run to its true end, outputs and cost, whether or not its callback arrives."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    # Looked up when it is asked for: to find it takes a fifth of the time of `tracker --help`.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # noqa: PLC0415

    return version("flora-run-tracker")
