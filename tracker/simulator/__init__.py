"""A local FLORA: the API, the runs and the signed callbacks, with no key and no bill.

It is written from FLORA's documents alone and shares no code with the tracker's own client,
signature or parser, so that what the two agree on is agreed by two witnesses.

    options.py      the options of a simulated FLORA
    catalogue.py    the techniques, and the files behind output links
    runs.py         how the seed makes a run, and the run as a function of the clock
    world.py        the state: techniques, runs, those from before the start, attempts, in memory
    faults.py       FLORA's errors, cut connections, and a gateway in front
    callbacks.py    signed callbacks, their attempts, and where they may be sent
    starts.py       how starts are checked and answered
    api.py          the routes of FLORA, with pages and cursors; the simulator's own routes
    serve.py        all of it over HTTP, for a test (`running`) or a terminal (`serve`)
"""

from tracker.simulator.options import HELP, Options, SimulatedWorkspace, fault_of, parse_rate
from tracker.simulator.serve import Simulator, build_app, running, serve

__all__ = [
    "HELP",
    "Options",
    "SimulatedWorkspace",
    "Simulator",
    "build_app",
    "fault_of",
    "parse_rate",
    "running",
    "serve",
]
