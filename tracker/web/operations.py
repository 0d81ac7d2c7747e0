"""What can be done under `/api`: one entry for each method of each route.

A test holds this list to the routes, so a new route is described here as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from tracker.web import shapes
from tracker.web.schemas import (
    ListQuery,
    SpendingQuery,
    StartBody,
    StartsQuery,
    TechniqueQuery,
    TrackBody,
)
from tracker.web.stream.endpoint import StreamQuery

ERROR: Final = shapes.Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. `headers` gives each header's description and schema."""

    description: str
    shape: type[BaseModel] | None = None
    content_type: str = "application/json"
    headers: Mapping[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error that several operations share, by its name in the document."""

    name: str
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route.

    `in_path` gives description and example of each part of the path; `refusals` are statuses of
    `REFUSALS`, beside those that every operation has.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    description: str = ""
    in_path: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    takes_key: bool = False
    refusals: tuple[int, ...] = ()


def _error(description: str, **headers: tuple[str, dict[str, Any]]) -> Answer:
    named = {name.replace("_", "-"): told for name, told in headers.items()}
    return Answer(description=description, shape=ERROR, headers=named)


_SECONDS: Final = {"type": "string", "pattern": "^[0-9]+$"}

REFUSALS: Final = {
    400: Refusal(name="Invalid", answer=_error("What was asked is wrong; `fields` says where.")),
    401: Refusal(
        name="Unauthorized",
        answer=_error(
            "The token is missing, wrong or expired.",
            WWW_Authenticate=("How to show it.", {"type": "string", "const": "Bearer"}),
        ),
    ),
    402: Refusal(
        name="NoCredits",
        answer=_error(
            "FLORA: the workspace has no credits left. `budget_exceeded`: the price does not fit "
            "what a budget has left; nothing was sent."
        ),
    ),
    403: Refusal(
        name="Forbidden",
        answer=_error("The token lacks the scope; where none is set, only this machine is served."),
    ),
    404: Refusal(name="NotFound", answer=_error("There is no such thing.")),
    408: Refusal(name="TooSlow", answer=_error("The body did not come in time.")),
    409: Refusal(
        name="Unresolved",
        answer=_error("It cannot be told whether FLORA started it; nothing is sent again."),
    ),
    413: Refusal(name="TooLarge", answer=_error("The body is longer than a mebibyte.")),
    422: Refusal(name="KeyConflict", answer=_error("The key was used for another body.")),
    429: Refusal(
        name="TooManyWrongTokens",
        answer=_error(
            "Too many wrong tokens came from this address; a right one is taken at any time.",
            Retry_After=("Seconds to wait.", _SECONDS),
        ),
    ),
    502: Refusal(name="FloraFailed", answer=_error("FLORA cannot be used, or refuses the key.")),
    503: Refusal(name="Unavailable", answer=_error("Something is down or busy, or not set up.")),
    504: Refusal(
        name="FloraTimeout",
        answer=_error(
            "FLORA gave no answer in time; `start_pending`: a start was sent and its outcome is "
            "not known yet, the same key tells later what came of it."
        ),
    ),
}

_RUN_ID: Final = {"run_id": ("FLORA's `run_…` identifier.", "run_abc123")}
_TECHNIQUE: Final = {"technique": ("Its id or its slug.", "icon-pack")}
_OF_BODIES: Final = (400, 408, 413)
_OF_FLORA: Final = (502, 504)

OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/api/runs",
        name="listRuns",
        tag="runs",
        summary="List runs, newest first",
        query=ListQuery,
        answers={200: Answer(description="A page of runs.", shape=shapes.RunPage)},
        refusals=(400,),
    ),
    Operation(
        method="POST",
        path="/api/runs",
        name="startRun",
        tag="runs",
        summary="Start a run, once for each key",
        description="The inputs are checked against the technique's definition before anything is "
        "paid for. What FLORA itself refuses comes through as it said it.",
        body=StartBody,
        takes_key=True,
        answers={
            201: Answer(description="The run that was started.", shape=shapes.Run),
            200: Answer(
                description="The run that this key had started before.",
                shape=shapes.Run,
                headers={
                    "Idempotent-Replayed": (
                        "Nothing new was started.",
                        {"type": "string", "const": "true"},
                    )
                },
            ),
        },
        refusals=(*_OF_BODIES, 402, 404, 409, 422, *_OF_FLORA),
    ),
    Operation(
        method="POST",
        path="/api/runs/track",
        name="trackRun",
        tag="runs",
        summary="Track a run that was started elsewhere",
        description="What is said of its state is not believed: the run is read at once.",
        body=TrackBody,
        answers={
            201: Answer(description="The run, tracked from now on.", shape=shapes.Run),
            200: Answer(description="The run, which was tracked already.", shape=shapes.Run),
        },
        refusals=_OF_BODIES,
    ),
    Operation(
        method="GET",
        path="/api/runs/{run_id}",
        name="showRun",
        tag="runs",
        summary="Show a run with its outputs",
        in_path=_RUN_ID,
        answers={200: Answer(description="The run.", shape=shapes.Run)},
        refusals=(404,),
    ),
    Operation(
        method="GET",
        path="/api/runs/{run_id}/events",
        name="showEvents",
        tag="runs",
        summary="Show what was seen of a run, and by whom",
        in_path=_RUN_ID,
        answers={200: Answer(description="Its timeline.", shape=shapes.Timeline)},
        refusals=(404,),
    ),
    Operation(
        method="GET",
        path="/api/starts",
        name="listStarts",
        tag="starts",
        summary="List starts, by default those whose outcome is not known",
        query=StartsQuery,
        answers={200: Answer(description="A page of starts.", shape=shapes.StartPage)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/spending",
        name="showSpending",
        tag="spending",
        summary="Show what was spent, and how far each budget is used",
        query=SpendingQuery,
        answers={200: Answer(description="What the runs cost.", shape=shapes.SpendingReport)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/techniques",
        name="listTechniques",
        tag="techniques",
        summary="Search the catalogue",
        query=TechniqueQuery,
        answers={200: Answer(description="A page of techniques.", shape=shapes.TechniquePage)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/techniques/{technique}",
        name="showTechnique",
        tag="techniques",
        summary="Show a technique with its inputs and outputs",
        description="FLORA is asked where the definition is not known, or an hour old.",
        in_path=_TECHNIQUE,
        answers={200: Answer(description="The technique.", shape=shapes.Technique)},
        refusals=(404, *_OF_FLORA),
    ),
    Operation(
        method="GET",
        path="/api/stream",
        name="followRuns",
        tag="runs",
        summary="Follow changes of runs as they happen",
        description="Server-sent events, one for each change of a run; `Last-Event-ID` goes on "
        "where a connection broke off.",
        query=StreamQuery,
        answers={
            200: Answer(
                description="Events, for as long as the connection lasts.",
                content_type="text/event-stream",
            )
        },
        refusals=(400,),
    ),
)
