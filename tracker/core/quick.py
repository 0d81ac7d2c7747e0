"""Dataclasses that are made for each callback, several at a time."""

from typing import TYPE_CHECKING, Any

__all__ = ["quick_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as quick_dataclass
else:
    from dataclasses import dataclass

    def quick_dataclass(*, frozen: bool, **options: Any) -> Any:
        """`dataclass`, whose `frozen` the type checker alone enforces.

        At run time nothing looks: a frozen class sets each field through a function of its own,
        which makes an object of twenty fields take three times as long.
        """
        return dataclass(unsafe_hash=frozen, **options)
