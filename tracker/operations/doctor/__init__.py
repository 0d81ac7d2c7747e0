"""`tracker doctor`: a deployment looked at from end to end, and what to mend in it.

It is a room of its own, beside the demo, because it looks at all the parts without the wiring: what
is broken must not keep it from looking at the rest. Each module knows one part and returns
findings; nothing is changed but the doctor's own test deliveries, which are taken out again.

    finding.py     what a look brings: a name, a level, what was seen, what to do
    examination.py all looks at once, in bounded time, secrets taken out of what they say
    threads.py     threads that hang hold nothing up
    given.py       the settings: what is set, signing secrets, the token
    database.py    the database and its schema; room.py, the disk under it
    flora.py       the key, by a real read; clocks.py, FLORA's clock and ours
    address.py     where the public URL leads; delivery.py, one delivery sent; verdict.py, what its
                   answer means; public.py, the test deliveries together
    work.py        whether somebody polls and sweeps; upkeep.py, what waits for a person
"""

from tracker.operations.doctor.examination import examine
from tracker.operations.doctor.finding import Finding, Level, worst

__all__ = ["Finding", "Level", "examine", "worst"]
