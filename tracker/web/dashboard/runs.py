"""`/runs`: every run, newest first, as far as it fits what is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.core.retry import RetryAdvice
from tracker.core.tags import parse_tag
from tracker.services import Services
from tracker.store.queries import techniques
from tracker.store.queries.search import STATES, Wanted, search_runs
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import invalid

PAGE: Final = 50
STATE_NAMES: Final = (
    ("open", "open: not known to the end"),
    ("pending", "pending"),
    ("running", "running"),
    ("details", "ended, details to come"),
    ("completed", "completed"),
    ("failed", "failed"),
    ("other", "another status"),
    ("lost", "lost: not found at FLORA"),
    ("conflict", "in conflict"),
)
ADVICE_NAMES: Final[Mapping[str, str]] = {
    RetryAdvice.RETRY_NOW: "retry now",
    RetryAdvice.RETRY_LATER: "retry later",
    RetryAdvice.CHANGE_INPUT: "change the input",
    RetryAdvice.NOT_RETRYABLE: "do not retry",
}
SPANS: Final = (
    ("", "any time"),
    ("1h", "in the last hour"),
    ("24h", "in the last 24 hours"),
    ("7d", "in the last 7 days"),
    ("30d", "in the last 30 days"),
)
_LENGTHS: Final[Mapping[str, timedelta]] = {
    "1h": timedelta(hours=1),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The fields of the form, as they were given."""

    text: str | None
    state: str | None
    technique: str | None
    workspace: str | None
    project: str | None
    tag: str | None
    advice: str | None
    within: str | None
    from_: str | None
    to: str | None

    def wanted(self, now: datetime) -> Wanted:
        """What they mean at this moment. Raises `Fault` 400 that names the field which is wrong."""
        if self.state is not None and self.state not in STATES:
            raise invalid(FieldFault("state", f"must be one of {', '.join(STATES)}"))
        if self.advice is not None and self.advice not in ADVICE_NAMES:
            raise invalid(FieldFault("advice", f"must be one of {', '.join(ADVICE_NAMES)}"))
        if self.within is not None and self.within not in _LENGTHS:
            raise invalid(FieldFault("within", f"must be one of {', '.join(_LENGTHS)}"))
        since = now - _LENGTHS[self.within] if self.within else None
        return Wanted(
            state=self.state,
            advice=self.advice,
            technique_id=self.technique,
            workspace_id=self.workspace,
            project_id=self.project,
            tag=_tag(self.tag),
            since=_moment("from", self.from_) or since,
            until=_moment("to", self.to),
            text=self.text,
        )

    def url(self, cursor: str | None = None) -> str:
        """The address of a page of these runs."""
        return query(
            "/runs",
            text=self.text,
            state=self.state,
            technique=self.technique,
            workspace=self.workspace,
            project=self.project,
            tag=self.tag,
            advice=self.advice,
            within=self.within,
            **{"from": self.from_, "to": self.to},
            cursor=cursor,
        )


class RunsPage:
    """The page."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Its route."""
        return [Route("/runs", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """A page of runs."""
        plain = ("text", "state", "technique", "workspace", "project", "tag", "advice", "within")
        filters = Filters(
            **{name: given(request, name) for name in plain},
            from_=given(request, "from"),
            to=given(request, "to"),
        )
        cursor = given(request, "cursor")
        wanted = filters.wanted(self._services.clock())
        found = await search_runs(self._services.database, wanted, cursor=cursor, limit=PAGE)
        workspaces = list(self._services.workspaces)
        names = await self._names()
        return self._render.page(
            request,
            "runs.html",
            filters=filters,
            moments={
                "from": _field(_moment("from", filters.from_)),
                "to": _field(wanted.until),
            },
            filtered=filters.url() != "/runs" or cursor is not None,
            found=found,
            states=STATE_NAMES,
            advices=ADVICE_NAMES,
            spans=SPANS,
            names=names,
            techniques=_with(names, filters.technique),
            workspaces=_with(
                {one.workspace_id: one.workspace_id for one in workspaces if one.workspace_id},
                filters.workspace,
            ),
            has_key=any(one.client is not None for one in workspaces),
            older=filters.url(found.next_cursor) if found.next_cursor else None,
            newest=filters.url() if cursor else None,
        )

    async def _names(self) -> dict[str, str]:
        """What techniques are called, by id and in the order of their names."""
        rows = await techniques.list_all(self._services.database)
        return {row.technique_id: row.name for row in rows}


def _with(known: Mapping[str, str], chosen: str | None) -> list[tuple[str, str]]:
    """Choices by value and name, the chosen one among them."""
    choices = dict(known)
    if chosen is not None:
        choices.setdefault(chosen, chosen)
    return list(choices.items())


def _tag(text: str | None) -> str | None:
    """A tag as the form gives it. Raises `Fault` 400."""
    if text is None:
        return None
    try:
        return "=".join(parse_tag(text))
    except ValueError as error:
        raise invalid(FieldFault("tag", str(error))) from None


def _field(moment: datetime | None) -> str:
    """A moment as the form's field holds it: without a zone, and it is UTC."""
    return "" if moment is None else f"{moment:%Y-%m-%dT%H:%M:%S}"


def _moment(name: str, text: str | None) -> datetime | None:
    """A moment as the form gives it; without a zone it is UTC. Raises `Fault` 400."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise invalid(FieldFault(name, "must be a moment such as 2026-06-01T12:00")) from None
