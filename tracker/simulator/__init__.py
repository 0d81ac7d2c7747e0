"""A local FLORA: the API, the runs and the signed callbacks, with no key and no bill.

It is written from FLORA's documents alone and shares no code with the tracker's own client,
signature or parser, so that what the two agree on is agreed by two witnesses.

    options.py      the options of a simulated FLORA; option_types.py, which values they take
    catalogue.py    the techniques
    making.py       how the seed makes a run; runs.py, a run as a function of the clock
    history.py      pages and cursors, and runs from before the simulator started
    world.py        the state: techniques, runs, attempts, in memory
    api.py          the routes of FLORA; starts.py, how starts are checked and answered
    callbacks.py    signed callbacks, their attempts, and where they may be sent
    faults.py       FLORA's errors, cut connections, and a gateway in front
    control.py      the simulator's own routes, and the files behind output links
    serve.py        all of it over HTTP, for a test (`running`) or a terminal (`serve`)
"""

from tracker.simulator.option_types import parse_rate
from tracker.simulator.options import HELP, Options, SimulatedWorkspace, fault_of
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
