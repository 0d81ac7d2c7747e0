"""Start a run, wait until it has ended, print what it cost and save its files.

    export FLORA_API_KEY=sk_live_…
    python script.py order-17 "garden tools"

The order is the idempotency key: the command may be interrupted and repeated at any time, and the
run is paid once.
"""

import asyncio
import sys

from tracker import Tracker
from tracker.errors import RunFailed, TrackerError


async def main(order: str, prompt: str) -> None:
    """Start the order's run, or continue it."""
    async with Tracker.from_env() as tracker:
        run = await tracker.start(
            "icon-pack", {"prompt": prompt}, idempotency_key=order, tags={"order": order}
        )
        print(f"{run.run_id} is {run.status}", flush=True)
        done = await run.wait(timeout=600)  # seconds; raises RunFailed if it did not complete
        print(f"{done.run_id} cost {done.charged_cost} USD")
        report = await tracker.download(done, "files")
        for result in report.results:
            print(f"saved files/{result.entry.file}" if result.entry else result.error)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except RunFailed as error:
        sys.exit(f"{error}; advice: {error.retry_advice}")
    except TrackerError as error:  # its message says what to do
        sys.exit(str(error))
