"""Where callbacks come: the bare address, and below it those of starts."""

from typing import Final

CALLBACKS_PATH: Final = "/callbacks/flora"
LONGEST_TOKEN: Final = 64
"""Characters: what is longer is no token of ours, and counts as the bare address."""


def token_in(path: str) -> str | None:
    """The last part of a start's own callback address; `None` for the bare one."""
    _, below, token = path.rpartition(f"{CALLBACKS_PATH}/")
    return token if below and 0 < len(token) <= LONGEST_TOKEN else None


def shown(path: str) -> str:
    """The path as others may see it: whoever knows the token of a start can speak of its run."""
    before, below, rest = path.partition(f"{CALLBACKS_PATH}/")
    return f"{before}{below}*" if rest else path
