"""How fast signed callbacks become rows, and rows become runs: against two ceilings and a peer.

python -m bench.ingest [--database both] [--rounds 5] [--seconds 4] [--connections 64 256]

load.py        unique signed callbacks, sent by wrk or, where that is missing, by Python
contenders.py  the servers that are compared, each a process of its own
bare.py        a bare ASGI application under the same uvicorn, which verifies and answers
ceiling.py     the tracker's own server and route, which verifies, parses and stores nothing
peer.py        what one would write by hand: FastAPI, a session and a commit for each callback
rounds.py      alternating rounds, and what came out of them
effects.py     which of the acknowledged callbacks are applied, and when
burst.py       what waits after a burst, and in what time it is applied
pair.py        two receivers on one PostgreSQL, beside one
latency.py     how long a callback waits for its answer and its effect, at what share of the most
"""
