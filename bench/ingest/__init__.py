"""How fast signed callbacks become rows: the tracker against its ceiling and against a peer.

python -m bench.ingest [--database both] [--rounds 5] [--seconds 6] [--connections 64 256]

load.py        unique signed callbacks, sent by wrk or, where that is missing, by Python
contenders.py  the servers that are compared, each a process of its own
ceiling.py     the tracker's own server and route, which verifies, parses and stores nothing
peer.py        what one would write by hand: FastAPI, a session and a commit for each callback
rounds.py      alternating rounds, and what came out of them
pair.py        two receivers on one PostgreSQL, beside one
latency.py     how long a callback waits, at what share of the most
"""
