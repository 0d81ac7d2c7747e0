"""The catalogue of techniques: what can be started, with which inputs and at what price."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Self

from tracker.core.formatting import money
from tracker.errors import FloraError, SettingsError, TechniqueUnknown, TrackerError
from tracker.library.batches import BatchCalls
from tracker.library.inputs import check_text, valid

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.store.queries.techniques import TechniqueRow

PAGE_SIZE: Final = 100
SYNC_SECONDS: Final = 24.0
"""How long a call waits for FLORA's list of techniques."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Technique:
    """A technique as the catalogue has it; `run_cost` is USD for each run.

    `inputs` and `outputs` are FLORA's own objects; a list may leave them out, `technique` reads
    them. `obstacle` is why it cannot be started, if so. `defined_at` is when the definition was
    last read, `synced_at` when anything was; `gone_at` is when FLORA's list first lacked it.
    """

    technique_id: str
    slug: str | None
    name: str
    description: str | None
    run_cost: Decimal | None
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    obstacle: str | None
    synced_at: datetime | None
    defined_at: datetime | None
    gone_at: datetime | None

    @classmethod
    def _of(cls, row: "TechniqueRow") -> Self:
        """The value of a stored technique."""
        from tracker.core.starts import obstacle
        from tracker.flora.parse import ports

        values: dict[str, Any] = {one.name: getattr(row, one.name, None) for one in fields(cls)}
        values["obstacle"] = obstacle(ports(row.inputs))
        return cls(**values)

    def __hash__(self) -> int:
        return hash(self.technique_id)

    def __repr__(self) -> str:
        price = "" if self.run_cost is None else f" · {money(self.run_cost)}"
        return f"<Technique {self.slug or self.technique_id} · {self.name}{price}>"


class TechniqueCalls(BatchCalls):
    """The part of `Tracker` about the catalogue."""

    async def techniques(
        self, text: str = "", *, gone: bool = False
    ) -> AsyncGenerator[Technique, None]:
        """The techniques of the catalogue by name: those with all words of `text` in their id,
        slug, name or description; with `gone` retired ones, too.

        FLORA's list is read first if no process has read it for six hours. If that fails, the
        stored ones are yielded; where there are none, raises `FloraError`, or `SettingsError`
        without an API key.
        """
        from tracker.store.queries import techniques as stored

        text = valid("text", check_text, text)
        services = self._services()
        error = await _sync(services)
        if error is not None and not (await stored.page(services.database, limit=1))[0]:
            raise error
        cursor: str | None = None
        while True:
            rows, cursor = await stored.page(
                self._services().database, query=text, gone=gone, cursor=cursor, limit=PAGE_SIZE
            )
            for row in rows:
                yield Technique._of(row)
            if cursor is None:
                return

    async def technique(self, technique: str) -> Technique:
        """A technique, by its id or slug, with its inputs and outputs.

        FLORA is read if the definition is not known or older than an hour. Raises
        `TechniqueUnknown`, and `FloraError` where nothing is known and FLORA cannot be read.
        """
        technique = valid("technique", check_text, technique)
        services = self._services()
        found = await services.catalogue.find(technique)
        if found is None:
            asked = "" if services.workspaces.keyed else "; FLORA_API_KEY is not set"
            raise TechniqueUnknown(
                f"there is no technique {technique!r}: `tracker.techniques()` yields all{asked}"
            )
        return Technique._of(found)


async def _sync(services: "Services") -> TrackerError | None:
    """Read FLORA's list if it is due; why that failed, if it did."""
    if not services.workspaces.keyed:
        return SettingsError("no technique is known, and FLORA cannot be asked: set FLORA_API_KEY")
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            report = await services.catalogue_sync.sync_if_due()
    except TimeoutError:
        return FloraError(f"FLORA has not answered for {SYNC_SECONDS:g} s: try again")
    errors = () if report is None else [one.error for one in report.lists]
    failure = next(filter(None, errors), None)
    return None if failure is None else FloraError(f"the techniques cannot be read: {failure}")
