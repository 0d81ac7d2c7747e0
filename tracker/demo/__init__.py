"""The demo: the whole tracker at work against a local FLORA, judged by that FLORA's own records.

It is a room of its own, beside the command line at the top of the house, because it is the one
thing that needs both the wired-up tracker and the simulator, which know nothing of each other.

    stage.py   the simulator and the tracker, served over real HTTP on free loopback ports
    play.py    what happens: runs are started, some callbacks get lost, everything settles
    verdict.py what the tracker holds, field by field against what the simulator did
    screen.py  how it is shown: live on a terminal, line by line elsewhere

All of it is one process, so that nothing is left behind however it ends; between the parts there
is nothing but HTTP and a SQLite file in a folder that is thrown away.
"""

from tracker.demo.play import run

__all__ = ["run"]
