"""The trials: what the promises are about, and what the defaults are argued with."""

from dataclasses import replace
from typing import Final

from bench.economy.trial import Trial

INTERVALS: Final = (1, 2, 5, 10, 30)
"""Values of `TRACKER_POLL_INTERVAL` in seconds, the default among them."""
GATHERS: Final = (0.0, 5.0, 10.0)
"""How long due runs may gather at most, in seconds, the tracker's own among them."""
DEFAULT_INTERVAL: Final = 5
DEFAULT_GATHER: Final = 10.0
MANY_SECONDS: Final = 60.0
"""Runs that begin together then end within the minute from the 30th second to the 90th."""
ALONE: Final = 30
SOME: Final = 45
FOLLOWED: Final = 300
"""So many of the many runs are followed by the recipe. All thousand would be 500 reads a second,
which no client here keeps up with; what a run costs does not depend on how many there are."""


def promises(runs: int) -> list[Trial]:
    """What must not cost more than so many reads for each run."""
    many = Trial(
        name="ending within a minute", runs=runs, seconds=MANY_SECONDS, most_for_bills=0.05
    )
    return [
        replace(
            many,
            name=f"{many.name}, callbacks, outputs in the history",
            most=0.1,
        ),
        replace(
            many,
            name=f"{many.name}, callbacks, none in the history",
            history_outputs=False,
            most=1.1,
            most_for_bills=1.1,
        ),
        replace(many, name=f"{many.name}, all callbacks lost", lost=True, most=0.2),
        one_by_one(),
    ]


def one_by_one() -> Trial:
    """Each run starts when the one before has ended."""
    return Trial(
        name="ending one by one, callbacks",
        runs=ALONE,
        seconds=3.0,
        every=None,
        most=1.2,
        most_for_bills=1.0,
    )


def recipes(runs: int) -> tuple[Trial, Trial]:
    """The runs that are also followed by the recipe: one by one, and many."""
    many = Trial(name="many", runs=min(runs, FOLLOWED), seconds=MANY_SECONDS)
    return replace(one_by_one(), name="one"), many


def freshness() -> list[Trial]:
    """A run each second, of 10 to 30 s: with callbacks, and without them at several intervals."""
    steady = Trial(name="with callbacks", runs=SOME, seconds=20.0, every=1.0)
    return [
        steady,
        *(
            replace(
                steady,
                name=f"without, durations {'known' if known else 'unknown'}, interval {seconds} s",
                callbacks=False,
                known=known,
                settings={"TRACKER_POLL_INTERVAL": str(seconds)},
            )
            for known in (True, False)
            for seconds in INTERVALS
        ),
    ]


def gathering(runs: int) -> list[Trial]:
    """Many runs at once with callbacks, by how long they may gather."""
    many = promises(runs)[0]
    return [
        replace(many, name=f"{seconds:g} s", longest_gather=seconds, most=None)
        for seconds in GATHERS
    ]
