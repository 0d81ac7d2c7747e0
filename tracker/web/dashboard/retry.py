"""Start rows of a batch again, at a price that is confirmed first, or start no more of them."""

import asyncio
from decimal import Decimal, InvalidOperation
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.errors import BudgetExceeded, FieldFault, MaxCostReached
from tracker.core.formatting import counted, money
from tracker.core.tokens import Scope
from tracker.starting.batch_orders import Order
from tracker.starting.batch_rows import BatchPlan, Retry
from tracker.store.queries.batches import BatchRow
from tracker.web.auth import actor_of, may
from tracker.web.dashboard.batch import stored_batch
from tracker.web.dashboard.forms import check_csrf, query_choice, read_form
from tracker.web.dashboard.render import FlashMessage, PageGroup
from tracker.web.http.responses import Fault, invalid, unavailable

CHOICES: Final = {"failed": Retry.FAILED, "all": Retry.ALL, "unstarted": None}
"""Which rows: those that FLORA's codes advise to retry, all failed ones, or only those never
started. Rows that were never started are part of each."""
PRICE_SECONDS: Final = 5.0


class BatchActionPages(PageGroup):
    """Retry, with its confirmation, and stop."""

    def routes(self) -> list[Route]:
        return [
            Route("/batches/{batch_id:any}/retry", self.retry, methods=["GET", "POST"]),
            Route("/batches/{batch_id:any}/stop", self.stop, methods=["POST"]),
        ]

    async def retry(self, request: Request) -> Response:
        """`GET` shows what would be started, and its price; `POST` starts it, unless the price has
        risen since."""
        if request.method != "POST":
            batch = await stored_batch(self._database, request)
            if not may(request.scope, Scope.START):
                raise Fault(403, "forbidden", "This token may not start runs.")
            which = query_choice(request, "which", CHOICES) or "failed"
            return self._confirmation(request, await self._plan(batch, which), which)
        form = await read_form(request)
        await check_csrf(request, form)
        batch = await stored_batch(self._database, request)
        which = form.get("which", "")
        if which not in CHOICES:
            raise invalid(FieldFault("which", f"must be one of {', '.join(CHOICES)}"))
        plan = await self._plan(batch, which)
        order = Order(
            started_by=actor_of(request.scope).name,
            ordered_at=self._services.clock(),
            max_cost=_usd(form.get("max_cost", "")),
            at_once=which == "all",
        )
        try:
            await self._services.batch_orders.place(plan, order)
        except (MaxCostReached, BudgetExceeded) as error:
            return self._confirmation(request, plan, which, refusal=str(error))
        return _to_batch(batch)

    async def stop(self, request: Request) -> Response:
        """Starts no further row."""
        await check_csrf(request)
        batch = await stored_batch(self._database, request)
        await self._services.batch_orders.stop(batch, by=actor_of(request.scope).name)
        return _to_batch(batch)

    async def _plan(self, batch: BatchRow, which: str) -> BatchPlan:
        """What would be started now. Raises `Fault` 503 while FLORA does not tell the price."""
        try:
            async with asyncio.timeout(PRICE_SECONDS):
                return await self._services.batches.stored_plan(batch, retry=CHOICES[which])
        except TimeoutError:
            raise unavailable("FLORA does not answer, so the price is not known.") from None

    def _confirmation(
        self, request: Request, plan: BatchPlan, which: str, *, refusal: str | None = None
    ) -> Response:
        runs = counted(len(plan.missing), "run")
        price = "" if plan.cost is None else f", up to {money(plan.cost)}"
        return self._render(
            request,
            "retry.html",
            status=200 if refusal is None else 402,
            batch=plan.batch,
            plan=plan,
            which=which,
            max_cost="" if plan.cost is None else str(plan.cost),
            question=f"Start {runs}{'' if which == 'unstarted' else ' again'}{price}",
            to_change=len(plan.to_change) if which == "failed" else 0,
            flash=None if refusal is None else FlashMessage("bad", refusal),
        )


def _to_batch(batch: BatchRow) -> Response:
    return RedirectResponse(f"/batches/{quote(batch.batch_id, safe='')}", status_code=303)


def _usd(text: str) -> Decimal | None:
    """The confirmed price; `None` if there was none. Raises `Fault` 400."""
    try:
        price = Decimal(text) if text else None
    except InvalidOperation:
        price = Decimal(-1)
    if price is not None and not (price.is_finite() and price >= 0):
        raise invalid(FieldFault("max_cost", "must be an amount in USD"))
    return price
