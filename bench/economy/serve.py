"""`tracker`, with another `LONGEST_GATHER` where `BENCH_LONGEST_GATHER` gives one, in seconds."""

import os

from tracker.cli import main
from tracker.polling import poll

if __name__ == "__main__":
    if "BENCH_LONGEST_GATHER" in os.environ:
        poll.LONGEST_PAUSE = float(os.environ["BENCH_LONGEST_GATHER"])  # type: ignore[misc]
    main()
