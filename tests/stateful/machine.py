"""The state machine: events and faults of a tracker in any order, against the model of FLORA.

Rules that select a run take `nth`, counted from the oldest and wrapped around. Faults of a later
request or commit (`trouble`, `meanwhile`, `crash`) are armed by rules of their own, so that a
failure shrinks to the few steps that matter. After a crash the next process starts at once. When
the steps are over, all faults stop and everything has to settle.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from hypothesis import stateful
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
)

from tests.stateful.callbacks import FORGERIES, callback, forged
from tests.stateful.flora import FAULTS, WORKSPACE, ModelRun, inputs_for
from tests.stateful.process import POINTS
from tests.stateful.settling import settle
from tests.stateful.world import World

_NTH: Final = st.integers(0, 7)
_END: Final = st.sampled_from(["completed", "failed"])
_SOON: Final = st.integers(0, 3)

ACCOUNTS: Final = ("lean", "seconds", "late_bills", "forgets", "releases", "queues")
"""Variants of FLORA's behaviour, by the attributes of the model."""

_there_are_runs = precondition(lambda self: self.world.flora.runs)


def rule(**strategies: Any) -> Callable[[Callable[..., Any]], Any]:
    """A rule of the machine, counted in the figures as "rule <its name>"."""

    def decorate(step: Callable[..., Any]) -> Any:
        @functools.wraps(step)
        def counted(self: "TrackerMachine", **values: Any) -> Any:
            self.world.figures[f"rule {step.__name__}"] += 1
            return step(self, **values)

        return stateful.rule(**strategies)(counted)

    return decorate


class TrackerMachine(RuleBasedStateMachine):
    """A tracker on the database at `url`; `figures` counts what was done."""

    keys = Bundle("keys")

    def __init__(self, url: str, figures: Counter[str] | None = None) -> None:
        super().__init__()
        self.world = World(url, Counter() if figures is None else figures)
        self.world.figures["examples"] += 1

    @initialize(
        idempotency=st.sampled_from(["replay", "conflict"]),
        true=st.sets(st.sampled_from(ACCOUNTS)),
        known=st.booleans(),
        runs=st.integers(0, 5),
    )
    def begin(self, idempotency: str, true: set[str], known: bool, runs: int) -> None:
        """FLORA's variants, whether the settings contain the workspace's id, and existing runs."""
        flora = self.world.flora
        flora.idempotency = idempotency
        for account in ACCOUNTS:
            setattr(flora, account, account in true)
        for _ in range(runs):
            flora.begin("tech_cards")
        self.world.configured_id = WORKSPACE if known else None
        self.world.begin()

    # FLORA

    @rule(generation=st.booleans(), ours=st.booleans())
    def begins_elsewhere(self, generation: bool, ours: bool) -> None:
        """Another program starts a run, perhaps of the technique that we start."""
        self.world.flora.begin(None if generation else "tech_icons" if ours else "tech_cards")

    @_there_are_runs
    @rule(nth=_NTH, status=st.sampled_from(["running", "completed", "failed"]))
    def goes_on(self, nth: int, status: str) -> None:
        """A run progresses, or ends."""
        self.world.flora.go_on(self._run(nth), status)

    @rule(fault=st.sampled_from(FAULTS), after=_SOON, times=st.sampled_from([1, 2, 15]))
    def trouble(self, fault: str, after: int, times: int) -> None:
        """The next requests fail: one that is repeated at once, or enough that a call gives up."""
        self.world.flora.arm(fault, after=after, times=times)

    @rule(status=_END, reported=st.booleans(), after=_SOON)
    def meanwhile(self, status: str, reported: bool, after: int) -> None:
        """During a later request the newest run ends, and another one starts.

        Where that request is a start and FLORA reports the end, the callback precedes the answer.
        """
        flora = self.world.flora

        async def happens() -> None:
            run = self._run(-1) if flora.runs else flora.begin("tech_cards")
            flora.go_on(run, status)
            flora.begin("tech_cards")
            if reported:
                await self.world.deliver(self.world.callback(run))

        flora.arm(happens, after=after)

    @rule(price=st.sampled_from([0.25, 4.0]))
    def price_changes(self, price: float) -> None:
        """New runs have this cost."""
        self.world.flora.price = price

    @rule()
    def key_is_exchanged(self) -> None:
        """FLORA refuses the present key from now on; the next process has the new one."""
        self.world.flora.exchange_key()

    # Callbacks

    @_there_are_runs
    @rule(nth=_NTH, contrary=st.booleans(), apply=st.booleans())
    def calls_back(self, nth: int, contrary: bool, apply: bool) -> None:
        """FLORA reports a run's end, perhaps again, before reads show it, or wrongly; the inbox
        applies it now or later."""
        sent = self.world.callback(self._run(nth), contrary=contrary)
        self.world.do(self.world.deliver(sent, apply=apply))

    @precondition(lambda self: self.world.memory.callbacks)
    @rule(nth=_NTH)
    def calls_back_again(self, nth: int) -> None:
        """An attempt is repeated unchanged: once it was acknowledged, only `receipts` changes."""
        memory, flora = self.world.memory, self.world.flora
        sent = list(memory.callbacks.values())[nth % len(memory.callbacks)]
        self.world.do(self.world.process.services.applier.drain())
        self.world.check()
        repeated, before = sent.acknowledged > 0, (flora.requests, memory.events.copy())
        self.world.do(self.world.deliver(sent))
        self.world.check()
        assert not repeated or before == (flora.requests, memory.events)

    @rule(kind=st.sampled_from(["unknown run", "another workspace", "not understood"]))
    def calls_back_strangely(self, kind: str) -> None:
        """An authentic callback about an unknown run, of another workspace, or of a new type."""
        world = self.world
        if kind == "another workspace" and world.configured_id is None:
            return  # until the id is learnt, every workspace counts as ours
        more = {
            "another workspace": {"workspace_id": "ws_other"},
            "not understood": {"type": "run.paused"},
        }
        run_id = f"run_odd_{world.next()}"
        odd = callback(world.clocks, f"whd_{run_id}", run_id, "completed", **more.get(kind, {}))
        world.do(world.deliver(world.record_callback(odd)))

    @_there_are_runs
    @rule(nth=_NTH)
    def calls_back_in_vain(self, nth: int) -> None:
        """Under a wrong workspace id a callback is quarantined until its replay."""
        sent = self.world.callback(self._run(nth))
        if not sent.tries:
            sent.outcomes = ("quarantined", "applied")
        workspace = self.world.workspace
        self.world.do(self.world.process.services.applier.drain())  # what came before
        workspace = self.world.workspace
        right, workspace.workspace_id = workspace.workspace_id, "ws_wrong"
        self.world.do(self.world.deliver(sent))
        workspace.workspace_id = right

    @_there_are_runs
    @rule(nth=_NTH, status=_END, how=st.sampled_from(FORGERIES))
    def is_forged(self, nth: int, status: str, how: str) -> None:
        """A third party posts a forged callback."""
        world = self.world
        fake = callback(world.clocks, f"whd_forged_{world.next()}", self._run(nth).run_id, status)
        body, header = forged(how, fake.body, world.secrets[0], world.clocks)
        assert world.do(world.post(body, header)) in (401, None)
        world.figures["forged"] += 1

    # The tracker

    @rule(target=keys)
    def start(self) -> str:
        """A run is started under a new key."""
        world, key = self.world, f"key-{self.world.next()}"
        no_fault = not world.flora.armed and world.process.doom is None and not world.flora_waits
        no_fault = no_fault and world.process.key == world.flora.key
        status = world.do(world.start(key, "a cat"))
        assert not no_fault or status == 201, "a start failed without a fault"
        return key

    @rule(key=keys, prompt=st.sampled_from(["a cat", "a dog"]))
    def start_again(self, key: str, prompt: str) -> None:
        """A client sends a key again, perhaps with another body."""
        before = self.world.memory.starts.get(key)
        status = self.world.do(self.world.start(key, prompt))
        if before is not None and before.inputs != inputs_for(prompt):
            assert status not in (200, 201), "two runs for one key"

    @rule(nth=_NTH, how=st.sampled_from(["known", "with a poll_url", "unknown"]))
    def is_tracked(self, nth: int, how: str) -> None:
        """A client tracks a run, which FLORA may not know, perhaps with a foreign `poll_url`."""
        run_id = f"run_tracked_{nth}"
        if how != "unknown" and self.world.flora.runs:
            run_id = self._run(nth).run_id
        poll_url = f"https://elsewhere.test/{run_id}" if how == "with a poll_url" else None
        self.world.do(self.world.track(run_id, poll_url))

    @rule(after=st.sampled_from([0, 6, 40, 400]))
    def polls(self, after: int) -> None:
        """After some seconds, due runs are polled."""
        self.world.clocks.elapsed += after
        self.world.do(self.world.process.services.poller.poll_due())

    @rule(after=st.sampled_from([0, 70, 400]))
    def reads_bills_again(self, after: int) -> None:
        """After some seconds, due bills are read again."""
        self.world.clocks.elapsed += after
        self.world.do(self.world.process.services.poller.recheck_due())

    @rule(minutes=st.none() | st.sampled_from([1, 60]))
    def sweeps(self, minutes: int | None) -> None:
        """A whole sweep, or one with a limit."""
        self.world.do(self.world.sweep(minutes=minutes))

    @rule(job=st.sampled_from(["recover", "poll", "replay", "apply"]), nth=_NTH)
    def does(self, job: str, nth: int) -> None:
        """Lost starts are searched, a run is polled, or callbacks are replayed or applied."""
        world, services = self.world, self.world.process.services
        known = list(world.memory.records.values())
        if job == "recover":
            world.do(services.recovery.recover())
        elif job == "apply":
            world.do(services.applier.drain())
        elif job == "replay":
            world.do(world.replay())
        elif known:
            world.do(services.poller.read_now(known[nth % len(known)]))

    @rule(point=st.sampled_from(POINTS), after=_SOON)
    def crash(self, point: str, after: int) -> None:
        """The process dies at a later point."""
        self.world.process.doom = (point, after)

    @rule(rotating=st.booleans())
    def restarts(self, rotating: bool) -> None:
        """A restart, perhaps with the next step of a rotation: the tracker gets a new secret, FLORA
        signs with both, FLORA drops the old one, the tracker drops it too."""
        world = self.world
        if rotating and len(world.secrets) == 1:
            world.secrets = [f"whsec_{world.next()}", *world.secrets]
        elif rotating and world.signing == world.secrets[1:]:
            world.signing = world.secrets
        elif rotating and world.signing == world.secrets:
            world.signing = world.secrets[:1]
        elif rotating:
            world.secrets = world.secrets[:1]
        world.restart()

    # Time

    @rule(seconds=st.sampled_from([35, 375, 1000, 4000, 8000, 3 * 86400]))
    def time_passes(self, seconds: int) -> None:
        self.world.clocks.elapsed += seconds

    @rule(ahead=st.sampled_from([0, 1200, 3 * 3600, -300]))
    def clock_jumps(self, ahead: int) -> None:
        """Our clock is set ahead of FLORA's by some seconds."""
        self.world.clocks.ahead = ahead

    # What must hold

    @invariant()
    def all_promises_hold(self) -> None:
        """After every step."""
        self.world.figures["steps"] += 1
        self.world.check()

    def teardown(self) -> None:
        """At the end everything settles, unless a step has failed."""
        try:
            if sys.exception() is None:
                if self.world.process.key != self.world.flora.key:
                    self.world.restart()
                self.world.run(settle(self.world))
                self.world.check()
        finally:
            self.world.close()

    def _run(self, nth: int) -> ModelRun:
        runs = list(self.world.flora.runs.values())
        return runs[nth % len(runs)]
