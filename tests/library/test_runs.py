"""Starting and waiting from Python."""

from decimal import Decimal

from tests.library.conftest import INPUTS
from tracker import Tracker
from tracker.simulator import Simulator


async def test_a_script_starts_and_waits(tracker: Tracker, flora: Simulator) -> None:
    """With all callbacks lost and no worker, `wait` returns the run with its outputs and bill."""
    run = await tracker.start("icon-pack", INPUTS, tags={"campaign": "spring"})
    done = await run.wait(timeout=20)
    truth = flora.world.runs[run.run_id]
    assert (done.status, done.settled, done.succeeded) == ("completed", True, True)
    assert [one.url for one in done.outputs] == [one.url for one in truth.outputs]
    assert done.charged_cost == Decimal(str(truth.cost))
    assert done.inputs == ({"id": "prompt", "type": "text", "value": "garden tools"},)
    assert done.tags == {"campaign": "spring"}
    assert done == await run.refresh() != run
    assert [event.status for event in await run.events()][-1] == "completed"
