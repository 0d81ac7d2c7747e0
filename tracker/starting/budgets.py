"""How far the budgets that are set are used, for whoever shows them."""

from tracker.core.budget import Budgets
from tracker.core.clock import Clock
from tracker.polling.workspaces import Workspaces
from tracker.store.engine import Database
from tracker.store.queries import spending
from tracker.store.queries import workspaces as stored
from tracker.store.queries.spending import Usage


class BudgetReader:
    """Reads what each budget has used: those of every workspace, and those of `[[budgets]]`."""

    def __init__(
        self, *, database: Database, budgets: Budgets, workspaces: Workspaces, clock: Clock
    ) -> None:
        self._database = database
        self._budgets = budgets
        self._workspaces = workspaces
        self._clock = clock

    async def usages(self) -> list[Usage]:
        """All of them, as of now. Raises `StoreUnavailable`."""
        ids = {one.workspace_id for one in self._workspaces}
        if None in ids and self._budgets.of_each_workspace:
            # An id that this process has not learnt yet may be known from another.
            ids |= set(await stored.all_ids(self._database))
        known = self._budgets.known(sorted(each for each in ids if each is not None))
        return await spending.usages(self._database, known, now=self._clock())
