"""Models of the requests and responses about batches."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, RootModel, WithJsonSchema

from tracker.core.budget import check_tag_key
from tracker.core.run import RetryAdvice
from tracker.store.queries.sheet_rows import RowOutcome
from tracker.web.api.requests import (
    BY_TAG,
    NONE_IF_EMPTY,
    Body,
    Filter,
    Name,
    PageQuery,
    Query,
    TagsField,
    one_of,
)
from tracker.web.api.responses import ResponseModel, RunInput

MOST_ROWS: Final = 10_000
"""Rows of one batch."""

_ROW: Final = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"type": ["string", "number", "null"]},
            {"type": "array", "items": {"type": "string"}},
        ]
    },
}


class OrderBody(Body):
    """What starts rows of a batch."""

    max_cost: float | None = Field(
        None,
        ge=0,
        le=1e9,
        allow_inf_nan=False,
        description="Start nothing if the rows could cost more than this, in USD.",
    )
    wait_for_budget: bool = Field(
        False, description="Wait for a used-up budget to start again, in place of an error."
    )
    dry_run: bool = Field(False, description="Only return what would be started, and its price.")


class BatchBody(OrderBody):
    """Rows to start a run of each. Unknown fields are refused."""

    model_config = ConfigDict(
        title="NewBatch",
        json_schema_extra={
            "examples": [
                {
                    "technique": "icon-pack",
                    "name": "Spring icons",
                    "rows": [
                        {"prompt": "garden tools", "sku": "SKU-0001"},
                        {"prompt": "beach toys", "sku": "SKU-0002"},
                    ],
                    "tag_columns": {"sku": "sku"},
                    "max_cost": 5,
                }
            ]
        },
    )

    technique: Name = Field(description="Its id or its slug.")
    rows: list[Annotated[dict[str, Any], WithJsonSchema(_ROW)]] = Field(
        min_length=1,
        max_length=MOST_ROWS,
        description="An object for each run. A field with the id or name of an input is that "
        "input: a text, or several in a list. All other fields are carried into the results.",
    )
    columns: dict[str, Name] = Field(
        {}, description="The field of an input, by the input's id, where their names differ."
    )
    name: Name | None = Field(None, description="What lists and pages call it.")
    workspace_id: Name | None = Field(
        None, description="Required if several workspaces are configured."
    )
    tags: TagsField = Field({}, description="Labels of all runs, for filters and budgets.")
    tag_columns: Annotated[
        dict[Annotated[str, AfterValidator(check_tag_key)], Name],
        BY_TAG,
    ] = Field({}, description="Fields whose values tag the runs of their rows, by tag.")
    retry: Literal["failed", "all"] | None = Field(
        None,
        description="Also start rows again that failed: temporarily (`failed`), or for any reason "
        "(`all`).",
    )
    accept_changes: bool = Field(
        False,
        description="Start rows again whose fields are other inputs since the technique changed.",
    )


class RetryBody(OrderBody):
    """Which rows of a batch to start again. Unknown fields are refused."""

    model_config = ConfigDict(
        title="Retry", json_schema_extra={"examples": [{"which": "failed", "max_cost": 2.5}]}
    )

    which: Literal["unstarted", "failed", "all"] = Field(
        description="`unstarted`: rows without a run. `failed`: also rows that failed temporarily, "
        "once, after a wait where advised. `all`: also every other row that failed."
    )


class RowsQuery(PageQuery):
    """The query of `GET /api/batches/{batch_id}/rows`."""

    outcome: Annotated[RowOutcome | None, NONE_IF_EMPTY, one_of(RowOutcome)] = Field(
        None, description="Default: all rows."
    )
    code: Filter = Field(None, description="Rows of the error group with this code.")


class ResultsQuery(Query):
    """The query of `GET /api/batches/{batch_id}/results.csv`."""

    bom: bool = Field(False, description="Begin with a byte order mark, as Excel needs it.")


_BATCH: Final[dict[str, Any]] = {
    "batch_id": "bat_0123456789abcdef",
    "workspace_id": "ws_abc123",
    "technique_id": "tech_icon-pack",
    "name": "Spring icons",
    "source": "api",
    "created_at": "2026-06-11T12:00:00.123000Z",
    "finished_at": None,
    "launching": True,
    "stopped": None,
    "columns": ["sku"],
    "rows": 2,
    "started": 1,
    "completed": 0,
    "failed": 0,
    "active": 1,
    "lost": 0,
    "refused": 0,
    "unresolved": 0,
    "in_doubt": 0,
    "cost": 0,
    "cost_final": False,
    "quoted": 0.25,
}


class Batch(ResponseModel):
    """A batch, with the number of its rows in each state. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_BATCH]})

    batch_id: str
    workspace_id: str
    technique_id: str
    name: str
    source: Literal["cli", "api", "page", "python"] | None = Field(
        description="`cli`: `tracker batch`."
    )
    created_at: datetime
    finished_at: datetime | None = Field(description="When all of its runs had ended.")
    launching: bool = Field(description="A worker starts rows, or is about to.")
    stopped: str | None = Field(
        description="Why the last launch ended early, or what it waits for."
    )
    columns: list[str] = Field(description="The fields that are carried into the results.")
    rows: int = Field(ge=0)
    started: int = Field(
        ge=0, description="Rows with a run: the sum of completed, failed, active and lost."
    )
    completed: int = Field(ge=0)
    failed: int = Field(ge=0)
    active: int = Field(ge=0)
    lost: int = Field(ge=0)
    refused: int = Field(ge=0, description="Starts that FLORA refused.")
    unresolved: int = Field(ge=0, description="Starts that a person has to resolve.")
    in_doubt: int = Field(ge=0, description="Starts that were sent and not answered.")
    cost: float = Field(ge=0, description="Billed so far.")
    cost_final: bool = Field(description="No bill may change any more.")
    quoted: float = Field(ge=0, description="Quotes of runs without a bill.")


class ErrorGroup(ResponseModel):
    """Rows that failed for the same reason."""

    code: str = Field(description="FLORA's code, or `lost`, `unresolved` or `not_started`.")
    message: str | None = Field(description="An example.")
    retry_advice: RetryAdvice | None
    count: int = Field(ge=1)
    retryable: int = Field(ge=0, description="Rows that a retry of `failed` starts again.")


class ShownBatch(Batch):
    """A batch with its errors."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**_BATCH, "errors": []}]})

    errors: list[ErrorGroup]


class BatchPrice(ResponseModel):
    """The result of a dry run."""

    batch_id: str
    rows: int = Field(ge=0)
    to_start: int = Field(ge=0, description="Rows without a run.")
    run_cost: float | None = Field(ge=0, description="FLORA's price for one run, in USD.")
    cost: float | None = Field(ge=0, description="The most that starting them can cost, in USD.")
    refusal: str | None = Field(
        description="Why the request would be refused: the maximum cost or a budget."
    )


class PlacedBatch(RootModel[Batch | BatchPrice]):
    """The batch, or the result of a dry run."""


class BatchOutput(ResponseModel):
    """One output of a row."""

    output_id: str
    type: str
    url: str


class Row(ResponseModel):
    """One row of a batch. Costs are USD."""

    row: int = Field(ge=1)
    line: int = Field(ge=1, description="Its first line in the sheet.")
    key: str = Field(description="The idempotency key of its start.")
    run_id: str | None
    status: str = Field(
        description="FLORA's status of its run; `not_started`, `sending`, `in_doubt`, `refused` or "
        "`unresolved` before there is one; `lost` or `forgotten` if there is none any more."
    )
    cost: float | None = Field(ge=0)
    cost_final: bool
    quoted_cost: float | None = Field(ge=0)
    retry_advice: RetryAdvice | None
    error: str | None
    inputs: list[RunInput] | None
    tags: dict[str, str]
    carried: dict[str, str] = Field(description="The fields that are no input.")
    outputs: list[BatchOutput]
