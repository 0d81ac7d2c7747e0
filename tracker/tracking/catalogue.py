"""The techniques, as far as starting a run needs them: a slug's id, a definition's input types."""

from tracker.core.clock import Clock
from tracker.flora.parse import Technique
from tracker.store import techniques
from tracker.store.engine import Database
from tracker.store.techniques import TechniqueRow
from tracker.tracking.workspaces import Workspace


class Catalogue:
    """Definitions of techniques, read from FLORA once for each process and kept in the database."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._by_name: dict[tuple[str, str], Technique] = {}

    async def definition(self, workspace: Workspace, technique: str) -> Technique:
        """The definition of a technique, by id or slug.

        Raises `NotFound` where FLORA knows none, `SettingsError` without a key, and the rest of the
        `FloraError` tree.
        """
        found = self._by_name.get((workspace.slot, technique))
        if found is None:
            found = await workspace.require_client().get_technique(technique)
            await techniques.upsert(self._database, [_row(found, technique)], self._clock())
            self._by_name[workspace.slot, technique] = found
        return found

    async def technique_id(self, workspace: Workspace, technique: str) -> str:
        """The `tech_…` form of an id or slug; FLORA is asked only for a slug."""
        if technique.startswith("tech_"):
            return technique
        return (await self.definition(workspace, technique)).technique_id


def _row(found: Technique, asked_for: str) -> TechniqueRow:
    return TechniqueRow(
        technique_id=found.technique_id,
        slug=None if asked_for == found.technique_id else asked_for,
        name=found.name,
        description=found.description,
        run_cost=found.run_cost,
        inputs=found.inputs,
        outputs=found.outputs,
    )
