"""What millions of runs cost, against thousands: ingest, claims, pages, dashboards, and disk.

python -m bench.scale [--runs 1000000] [--against 10000] [--database both] [--only ingest …]

databases.py  the two databases that are compared, filled, on one disk and one server
ingest.py     callbacks through `tracker serve`, in turn on the one and on the other
questions.py  what workers, pages, views and dashboards ask, and how long each takes
disk.py       bytes for each run, by table and index
"""
