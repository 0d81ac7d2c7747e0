"""The tracker beside two webhook receivers that others wrote.

python -m bench.others [--rounds 3] [--seconds 4] [--connections 64] [--results bench/results]

hookspool.py       hookspool's intake, compared on SQLite
stripe_sync.py     Stripe Sync Engine, compared on PostgreSQL
receiver.py        what the benchmark asks of either
rounds.py          alternating rounds with the tracker, and what came out of them
installing.py      each in a directory that goes with the run; the project itself needs neither
serve_*            the processes that are measured
hookspool.txt, package.json, package-lock.json
                   the very releases, with their hashes

None of the three does another's work, so the figures tell what each one's work costs, not which is
the better one. All three verify an HMAC-SHA256 of the body and commit to disk before they answer;
what else each of the others does for a callback stands at the top of its module. The tracker keeps
the body once for each delivery id, merges it into the run's row, writes the run's timeline and
rollups, and sets when the run is polled next. It commits the callbacks that wait together in one
transaction, where each of the others commits each by itself.
"""
