"""Batches for `tracker.sync`."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from dataclasses import fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from tracker.errors import TrackerNotOpen
from tracker.library.batches import Batch as AsyncBatch
from tracker.library.batches import BatchFields, BatchResult
from tracker.library.client import Tracker as AsyncTracker
from tracker.library.inputs import Rows
from tracker.library.run import Run as AsyncRun

if TYPE_CHECKING:
    from tracker.sync import Run

T = TypeVar("T")


class Batch(BatchFields):
    """A batch, as it was when it was read, and what can be done with it."""

    __slots__ = ("_owner",)  # no field: neither compared, shown, copied nor pickled

    _owner: "BlockingBatchCalls"

    @classmethod
    def _of(cls, batch: BatchFields, owner: "BlockingBatchCalls") -> Self:
        blocking = cls(**_values(batch))
        object.__setattr__(blocking, "_owner", owner)
        return blocking

    def wait(self, timeout: float | None = None) -> "Batch":
        """The batch when each row was tried and its runs have ended."""
        return self._call(self._asynchronous.wait(timeout))

    def refresh(self) -> "Batch":
        """The batch as it is stored now."""
        return self._call(self._asynchronous.refresh())

    def results(self) -> "list[BatchResult[Run]]":
        """Each row with its run, in order."""
        rows = self._tracker._call(self._asynchronous.results())
        return [self._tracker._result(row) for row in rows]

    def stop(self) -> "Batch":
        """Start no further row; runs that are started go on."""
        return self._call(self._asynchronous.stop())

    def retry(
        self,
        which: Literal["unstarted", "failed", "all"] = "failed",
        *,
        max_cost: Decimal | float | None = None,
        wait_for_budget: bool = False,
    ) -> "Batch":
        """Start rows without a run, and those that failed temporarily (`all`: for any reason)."""
        return self._call(
            self._asynchronous.retry(which, max_cost=max_cost, wait_for_budget=wait_for_budget)
        )

    def _call(self, work: Coroutine[Any, Any, AsyncBatch]) -> "Batch":
        return Batch._of(self._tracker._call(work), self._tracker)

    @property
    def _asynchronous(self) -> AsyncBatch:
        return AsyncBatch(**_values(self))._with(self._tracker._tracker)

    @property
    def _tracker(self) -> "BlockingBatchCalls":
        owner: BlockingBatchCalls | None = getattr(self, "_owner", None)
        if owner is None:
            raise TrackerNotOpen(
                f"this copy of batch {self.batch_id} belongs to no tracker: use tracker.batch(id)"
            )
        return owner


class BlockingBatchCalls(ABC):
    """The part of `tracker.sync.Tracker` about batches."""

    _tracker: AsyncTracker

    def start_batch(
        self,
        technique: str,
        rows: Rows,
        *,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        tag_columns: Mapping[str, str] | None = None,
        workspace_id: str | None = None,
        retry: Literal["failed", "all"] | None = None,
        accept_changes: bool = False,
        max_cost: Decimal | float | None = None,
        wait_for_budget: bool = False,
    ) -> Batch:
        """Start a run for each row, once each; the same rows again are the same batch."""
        started = self._tracker.start_batch(
            technique,
            rows,
            name=name,
            columns=columns,
            tags=tags,
            tag_columns=tag_columns,
            workspace_id=workspace_id,
            retry=retry,
            accept_changes=accept_changes,
            max_cost=max_cost,
            wait_for_budget=wait_for_budget,
        )
        return Batch._of(self._call(started), self)

    def batch(self, batch_id: str) -> Batch:
        """A stored batch. Raises `BatchUnknown`."""
        return Batch._of(self._call(self._tracker.batch(batch_id)), self)

    def batches(self) -> Iterator[Batch]:
        """All stored batches, newest first, read in pages as the loop goes on."""
        return (Batch._of(one, self) for one in self._iterate(self._tracker.batches()))

    def _result(self, row: BatchResult[AsyncRun]) -> "BatchResult[Run]":
        run = None if row.run is None else self._run(row.run)
        values: dict[str, Any] = {one.name: getattr(row, one.name) for one in fields(row)}
        values["run"] = run
        return BatchResult(**values)

    @abstractmethod
    def _call(self, work: Coroutine[Any, Any, T]) -> T: ...

    @abstractmethod
    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]: ...

    @abstractmethod
    def _run(self, run: AsyncRun) -> "Run": ...


def _values(batch: BatchFields) -> dict[str, Any]:
    return {one.name: getattr(batch, one.name) for one in fields(BatchFields)}
