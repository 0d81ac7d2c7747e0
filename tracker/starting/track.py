"""A run that was started elsewhere is tracked from now on."""

from dataclasses import dataclass

from tracker.core.clock import Clock
from tracker.core.errors import FloraError, InvalidRequest, SettingsError
from tracker.core.observation import Observation, Source
from tracker.core.record import Record, Seen
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.starting.catalogue import Catalogue
from tracker.store.writing.writer import Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run as it stands now, and whether it was known before."""

    record: Record
    known: bool


class Tracker:
    """Takes over runs that somebody names. What is said of their state is not believed."""

    def __init__(
        self, *, writer: Writer, workspaces: Workspaces, catalogue: Catalogue, clock: Clock
    ) -> None:
        self._writer = writer
        self._workspaces = workspaces
        self._catalogue = catalogue
        self._clock = clock

    async def track(
        self,
        run_id: str,
        *,
        technique: str | None = None,
        workspace_id: str | None = None,
        poll_url: str | None = None,
    ) -> Tracked:
        """Track `run_id`; it is due to be read at once.

        `technique` is an id or a slug. Raises `InvalidRequest` for an unknown workspace and
        `StoreUnavailable`.
        """
        workspace = self._workspaces.pick(workspace_id)
        passed = await self._writer.submit(
            Seen(
                observation=Observation(
                    run_id=run_id,
                    source=Source.TRACK,
                    at=self._clock(),
                    workspace_id=workspace_id or workspace.workspace_id,
                    technique_id=await self._technique_id(workspace, technique),
                    poll_url=poll_url,
                )
            )
        )
        if passed.after is None:
            raise AssertionError("a sight of a run always leaves a record")
        return Tracked(record=passed.after, known=passed.before is not None)

    async def _technique_id(self, workspace: Workspace, technique: str | None) -> str | None:
        """The technique's id where it can be told; a run is tracked without it just as well."""
        if technique is None:
            return None
        try:
            return await self._catalogue.technique_id(workspace, technique)
        except (FloraError, InvalidRequest, SettingsError):
            return None
