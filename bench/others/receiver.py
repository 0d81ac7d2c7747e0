"""What the benchmark asks of a receiver that others wrote."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from bench.ingest.contenders import Running


class Receiver(Protocol):
    """A receiver of signed callbacks, and how it is installed, run and asked for its rows."""

    @property
    def name(self) -> str:
        """What it is called, with its release."""

    @property
    def kind(self) -> str:
        """The kind of database that it keeps callbacks in; the tracker gets the same."""

    @property
    def path(self) -> str:
        """Where it takes them."""

    @property
    def header(self) -> str:
        """The header that holds their signature."""

    def install(self, into: Path) -> None:
        """Put it into an empty directory. Raises `NotInstalled` where that cannot be done."""

    def signed(self, count: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Signature header and body of that many callbacks, each of a thing of its own."""

    def storage(self) -> AbstractContextManager[str]:
        """An empty place for what it keeps, gone afterwards."""

    def started(
        self, installed: Path, storage: str, *, connections: int
    ) -> AbstractContextManager[Running]:
        """Its process, ready for that many connections."""

    def kept(self, storage: str) -> int:
        """How many rows it has made of callbacks."""
