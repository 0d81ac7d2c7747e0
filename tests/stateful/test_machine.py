"""The promises, under faults and events in any order."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import TrackerMachine
from tests.stateful.quiet import quiet

# The same examples at each run. A failure is printed unshrunk: bench.soak_stateful searches the
# smallest program, which takes minutes.
SETTINGS = settings(
    max_examples=7,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(180)
def test_nothing_is_lost_whatever_happens(database_url: str, thorough: bool) -> None:
    """Faults, crashes, forgeries and wrong clocks, in any order: after every step all promises
    hold, and once the faults stop everything settles."""
    chosen = SETTINGS if thorough else settings(SETTINGS, max_examples=4)
    with quiet():
        run_state_machine_as_test(lambda: TrackerMachine(database_url), settings=chosen)
