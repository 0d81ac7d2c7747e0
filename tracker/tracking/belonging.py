"""Whose a run is: only the workspace that a run is of may say, with its secret, that it ended.

A callback need not name its workspace, and whoever knows one workspace's signing secret can write
another's run into it. Believed, it would end that run and take it over: it would then be read with
a key that does not know it.
"""

from collections.abc import Collection

from tracker.core.observation import Observation
from tracker.store import read
from tracker.store.engine import Database


async def not_theirs(
    db: Database, seen: Observation, signers: Collection[str | None]
) -> str | None:
    """Why a callback of these workspaces cannot speak of its run; `None` where it can.

    A run that nobody has heard of may be anybody's. Raises `StoreUnavailable`.
    """
    record = await read.get_run(db, seen.run_id)
    owner = None if record is None else record.run.workspace_id
    if owner is None or owner in signers:
        return None
    return f"its run is of workspace {owner}, but the secret of {seen.workspace_id} signed it"
