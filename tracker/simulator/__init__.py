"""A local FLORA: the API, the runs and the signed callbacks, with no key and no bill.

It is written from FLORA's documents alone and shares no code with the tracker's own client,
signature or parser, so that what the two agree on is agreed by two witnesses.

    options.py    what a simulated FLORA is like; kinds.py, the kinds of values
    catalogue.py  the techniques
    fate.py       what becomes of the n-th run: a pure function of the seed
    runs.py       a run as a function of the clock, and the shapes in which it is told; bill.py, its
                  cost over time; making.py, how it is made
    preset.py     a history from before the beginning
    world.py      everything that exists, in memory
    validation.py what a start refuses; destination.py, which callback addresses it refuses
    idempotency.py, pages.py, problems.py   keys, cursors, errors
    delivery.py   a callback as bytes, signed; callbacks.py, its attempts
    faults.py     429, 500, 503 and cut connections; gateway.py, a gateway in front
    starts.py     keys, slow and lost answers; background.py, work that outlives its request
    media.py      the small files behind output links
    api.py        the routes of FLORA; control.py, the simulator's own; app.py, both together
    serve.py      over real HTTP, for a test (`running`) or a terminal (`serve`)
"""

from tracker.simulator.app import build_app
from tracker.simulator.kinds import parse_rate
from tracker.simulator.options import HELP, RATES, Options, Workspace
from tracker.simulator.serve import Simulator, running, serve

__all__ = [
    "HELP",
    "RATES",
    "Options",
    "Simulator",
    "Workspace",
    "build_app",
    "parse_rate",
    "running",
    "serve",
]
