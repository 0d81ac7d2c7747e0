"""What the tracker's knowledge costs in reads of FLORA, and how fresh it is.

python -m bench.economy [--database sqlite] [--runs 1000] [--only economy gathering freshness]

Every trial is a real `tracker serve` with its defaults, worker included, and a simulated FLORA of
its own over real HTTP. Reads are counted there: every request but starts and the catalogue's. The
counts follow from waits of seconds, not from the machine's speed, so trials run at the same time.

trials.py   the trials
trial.py    what a trial is, and what came out of one
flora.py    the simulated FLORA: its clock, its runs, its count of reads
tracked.py  a trial with the tracker
recipe.py   the same runs with the loop of FLORA's own recipe: a read every two seconds for each run
serve.py    `tracker`, which may be told to gather for longer or shorter than it does
quiet.py    what a sweep costs that finds nothing new
alone.py    what the schedule costs a run whose pages nobody shares: computed
tables.py   what was found, told in tables
"""
