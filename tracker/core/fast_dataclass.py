"""Dataclasses whose construction is on the hot path of callbacks."""

from typing import TYPE_CHECKING, Any

__all__ = ["fast_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as fast_dataclass
else:
    from dataclasses import dataclass

    def fast_dataclass(*, frozen: bool, **options: Any) -> Any:
        """`dataclass` whose `frozen` only the type checker enforces.

        Freezing at run time sets each field through a function call, which more than doubles the
        construction time of an object with twenty fields. The hash is that of a frozen class.
        """
        return dataclass(unsafe_hash=frozen, **options)
