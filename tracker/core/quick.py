"""Dataclasses that are made for each callback, several at a time."""

from typing import TYPE_CHECKING, Any

__all__ = ["quick_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as quick_dataclass
else:
    from dataclasses import dataclass

    def quick_dataclass(*, frozen: bool, **options: Any) -> Any:
        """`dataclass`, whose `frozen` the type checker alone enforces.

        A class that is frozen at run time as well sets each field through a function call, so that
        an object of twenty fields takes more than twice as long. The hash is a frozen class's.
        """
        return dataclass(unsafe_hash=frozen, **options)
