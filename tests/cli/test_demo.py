"""The comparison of `tracker demo` finds every difference; tests/deploy/test_package.py runs it."""

from copy import deepcopy
from typing import Any

import pytest

from tracker.demo.report import compare_runs

RECORD: dict[str, Any] = {
    "run_id": "run_1",
    "workspace_id": "ws_1",
    "technique": {"technique_id": "tech_a", "name": "A"},
    "callback_url": "http://127.0.0.1/callbacks/flora",
    "faults": ["drop"],
    "end": {
        "status": "completed",
        "created_at": 1750000000123,
        "started_at": 1750000001000,
        "completed_at": 1750000002000,
        "charged_cost": 0.25,
        "outputs": [{"output_id": "o1", "type": "text", "url": "words"}],
    },
}
RUN: dict[str, Any] = {
    "run_id": "run_1",
    "workspace_id": "ws_1",
    "technique_id": "tech_a",
    "tracking": "settled",
    "status": "completed",
    "created_at": "2025-06-15T15:06:40.123000Z",
    "started_at": "2025-06-15T15:06:41.000000Z",
    "completed_at": "2025-06-15T15:06:42.000000Z",
    "charged_cost": 0.25,
    "error_code": None,
    "error_message": None,
    "outputs": [{"position": 0, "output_id": "o1", "type": "text", "url": "words"}],
}


def test_an_equal_run_has_no_difference() -> None:
    """A run that is as the simulator recorded it shows no difference."""
    (comparison,) = compare_runs([RUN], [RECORD])
    assert comparison.differences == ()
    assert comparison.callback == "lost"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "failed"),
        ("tracking", "active"),
        ("charged_cost", 0.24),
        ("completed_at", "2025-06-15T15:06:42.001000Z"),
        ("started_at", None),
        ("error_code", "internal_error"),
        ("outputs", []),
        ("outputs", [{"position": 0, "output_id": "o1", "type": "text", "url": "other"}]),
        ("technique_id", None),
    ],
)
def test_any_difference_is_found(field: str, value: object) -> None:
    """The comparison covers status, outputs, cost, times, errors and ids."""
    run = deepcopy(RUN) | {field: value}
    (comparison,) = compare_runs([run], [RECORD])
    assert comparison.differences == (field,)


def test_a_run_known_to_one_side_only_is_a_difference() -> None:
    """Both a missed run and an invented one are reported."""
    (missed,) = compare_runs([], [RECORD])
    assert "status" in missed.differences
    made_up = compare_runs([RUN, deepcopy(RUN) | {"run_id": "run_2"}], [RECORD])[1]
    assert made_up.differences == ("unknown to FLORA",)
