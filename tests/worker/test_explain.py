"""A run's story: told from what the database holds, on both engines."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.deliveries import Delivered, keep
from tests.worker.conftest import HandClock, MakeFlora, OpenServices, the_run
from tracker.core.next_poll import Why
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Seen
from tracker.core.run import Output, RunError, RunStatus
from tracker.flora.signature import sign
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.start import StartRequest
from tracker.store import claims
from tracker.tracking.explain import Explanation
from tracker.tracking.telling.words import Kind
from tracker.views import explanation_json

PUBLIC_URL = "http://127.0.0.1:9"
PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


async def story(services: Services, run_id: str) -> Explanation:
    explanation = await services.explainer.explain(run_id)
    assert explanation is not None
    return explanation


def text_of(explanation: Explanation, kind: Kind | None = None) -> str:
    return "\n".join(
        sentence.text for sentence in explanation.sentences if kind in (None, sentence.kind)
    )


async def start(services: Services, key: str = "key-1") -> str:
    request = StartRequest(technique="icon-pack", inputs=PROMPT, idempotency_key=key)
    return (await services.starter.start(request)).record.run.run_id


async def call_back(
    services: Services,
    run_id: str,
    delivery_id: str = "whd_1",
    status: str = "completed",
    **data: Any,
) -> None:
    """A signed callback comes, as FLORA sends it."""
    body = json.dumps(
        {
            "id": delivery_id,
            "type": f"run.{status}",
            "api_version": "2026-06-11",
            "created_at": 1750000000000,
            "data": {"run_id": run_id, "run_type": "technique", "status": status, **data},
        }
    ).encode()
    header = sign(body, "whsec_simulator", at=services.clock())
    await services.receiver.receive(body, signature=header, webhook_id=None)
    await services.applier.drain()


async def see(services: Services, status: RunStatus, source: Source, **shown: Any) -> None:
    """The API shows run_1."""
    await services.door.put(
        Seen(
            observation=Observation(
                run_id="run_1", source=source, at=services.clock(), status=status, **shown
            ),
            reads=source is Source.POLL,
        )
    )


@pytest.fixture
async def reached(open_on: OpenServices, make_flora: MakeFlora) -> AsyncIterator[Services]:
    """The services of a tracker that FLORA can call, and a FLORA that leaves that to the test."""
    async with make_flora(drop=1.0) as silent:
        yield await open_on(silent, tracker_public_url=PUBLIC_URL)


async def test_a_start_and_its_callback(reached: Services, clock: HandClock) -> None:
    """Key, start, callback, read: each with its time and its source, and what it found."""
    run_id = await start(reached)
    waiting = await story(reached, run_id)
    assert waiting.next.why is Why.GRACE
    assert "is waited for" in text_of(waiting, Kind.CALLBACK)
    assert "30 s after it was first heard of" in text_of(waiting, Kind.NEXT)

    clock.move(40)
    assert "has not come for 40 s" in text_of(await story(reached, run_id), Kind.CALLBACK)

    await call_back(reached, run_id)
    ended = await story(reached, run_id)
    assert ended.next.why is Why.ENDED
    assert "The callback whd_1 said that the run completed" in text_of(ended, Kind.SIGHT)
    assert "still to be read" in text_of(ended, Kind.SIGHT)
    assert "details (outputs, cost, times) have not been read yet" in text_of(ended, Kind.STATE)
    assert "has ended, and its details have not been read" in text_of(ended, Kind.NEXT)

    clock.move(1)
    await reached.poller.poll_due()
    told = await story(reached, run_id)
    assert told.next.why is Why.SETTLED
    sights = [one for one in told.sentences if one.kind is Kind.SIGHT]
    assert [one.source for one in sights] == [Source.START, Source.CALLBACK, Source.POLL]
    assert [one.at for one in sights] == sorted(one.at for one in sights if one.at)
    assert "a cost of 0.25 USD" in sights[-1].text
    assert "it is settled" in sights[-1].text
    stored = text_of(told, Kind.START)
    assert "idempotency key key-1" in stored
    assert f"a callback to {PUBLIC_URL}/callbacks/flora/*." in stored
    assert "first told by a callback" in text_of(told, Kind.STATE)
    assert "1 request was made for this run alone" in text_of(told, Kind.CHECKS)
    shown = explanation_json(told)
    assert [line["text"] for line in shown["story"]] == [one.text for one in told.sentences]
    assert shown["next_look"]["why"] == "settled"
    json.dumps(shown)


async def test_a_start_without_a_callback_is_polled(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """No callback was asked for: the first look comes after an interval, the next ones double."""
    run_id = await start(services)
    first = await story(services, run_id)
    assert first.next.why is Why.INTERVAL
    assert "No callback was asked for" in text_of(first, Kind.CALLBACK)
    assert "no callback is on its way" in text_of(first, Kind.NEXT)
    for _ in range(2):
        clock.move(((await the_run(services, run_id)).next_check_at - clock()).total_seconds())  # type: ignore[operator]
        await services.poller.poll_due()
    told = await story(services, run_id)
    assert (told.next.why, told.next.number) == (Why.WAIT, 2)
    assert "2 looks in a row have brought no end" in text_of(told, Kind.NEXT)
    assert "2 requests were made" in text_of(told, Kind.CHECKS)
    assert "showed it running at" in text_of(told, Kind.SIGHT)


async def test_a_run_that_somebody_told_of(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """What is said of a tracked run is not believed, and it is due at once."""
    run = flora.start()
    await services.tracker.track(run.run_id)
    told = await story(services, run.run_id)
    assert told.next.why is Why.ASKED
    assert "somebody asked for it to be tracked" in text_of(told, Kind.STATE)
    assert "somebody asked for it" in text_of(told, Kind.NEXT)


async def test_a_run_found_in_the_history(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A sweep finds a run of somebody else, whole, and settles it."""
    run = flora.start()
    clock.move(60)
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    told = await story(services, run.run_id)
    assert "found in FLORA's history" in text_of(told, Kind.STATE)
    assert "A page of FLORA's history showed it completed" in text_of(told, Kind.SIGHT)
    assert "first told by a page of FLORA's history" in text_of(told, Kind.STATE)


async def test_a_run_that_a_callback_told_of_first(reached: Services, clock: HandClock) -> None:
    """Early callbacks are told as such: before anybody here knew of the run."""
    await call_back(reached, "run_1", status="failed", error_code="model_timeout")
    told = await story(reached, "run_1")
    assert "first heard of through a callback" in text_of(told, Kind.STATE)
    assert "said that the run failed (model_timeout)" in text_of(told, Kind.SIGHT)
    clock.move(1)
    await see(reached, RunStatus.PENDING, Source.START, created_at=clock())
    told = await story(reached, "run_1")
    assert "it had been heard of by then" in text_of(told, Kind.SIGHT)
    assert "known to be failed already, and stays so" in text_of(told, Kind.SIGHT)


async def test_repeated_late_and_quarantined_callbacks(reached: Services, clock: HandClock) -> None:
    """A callback after the end says how late it is; repeats count; what is not understood is told
    with its reason."""
    run_id = await start(reached)
    clock.move(120)
    await reached.poller.poll_due()
    clock.move(30)
    for _ in range(3):
        await call_back(reached, run_id)
        clock.move(1)
    await call_back(reached, run_id, "whd_other")
    await call_back(reached, run_id, "whd_odd", status="paused")
    told = await story(reached, run_id)
    deliveries = text_of(told, Kind.DELIVERY)
    sights = text_of(told, Kind.SIGHT)
    assert "The callback whd_1 said that the run completed. Its end was known already" in sights
    assert "whd_1 came again, 3 times in all" in deliveries
    assert "whd_other (run.completed) came and said nothing new" in deliveries
    assert "whd_odd came with a right signature but was not applied: the type is" in deliveries
    assert "after its end, late" in text_of(told, Kind.CALLBACK)
    assert "By then its end had been known for 30 s" in text_of(told, Kind.CALLBACK)


async def test_a_callback_that_never_came(reached: Services, clock: HandClock) -> None:
    """The end was found without it."""
    run_id = await start(reached)
    clock.move(120)
    await reached.poller.poll_due()
    told = text_of(await story(reached, run_id), Kind.CALLBACK)
    assert told == "A callback was asked for, but none has come; its end was found without it."


async def test_both_sights_of_a_contradiction_are_shown(
    reached: Services, clock: HandClock
) -> None:
    """A callback says failed, the API completed: who said what when, and whose word stands."""
    await call_back(reached, "run_1", status="failed", error_code="safety_blocked")
    clock.move(5)
    picture = Output("o1", "imageUrl", "https://media.example/1.png")
    await see(
        reached,
        RunStatus.COMPLETED,
        Source.POLL,
        outputs=(picture,),
        charged_cost=Decimal("0.2"),
    )
    conflict = text_of(await story(reached, "run_1"), Kind.CONFLICT)
    assert "a callback at 2026-07-01 12:00:00 UTC said failed (safety_blocked)" in conflict
    assert "a read of this run alone says completed" in conflict
    assert "What stands is completed: the API's word replaces a callback's" in conflict


async def test_equal_sights_that_differ_are_a_contradiction_too(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Two reads of one end with different errors are told with both codes; two costs are no
    contradiction, because FLORA corrects its bills."""
    for number, code in enumerate(("internal_error", "model_timeout")):
        cost = Decimal(number)
        error = RunError(code, "")
        await see(services, RunStatus.FAILED, Source.POLL, charged_cost=cost, error=error)
        clock.move(5)
    conflict = text_of(await story(services, "run_1"), Kind.CONFLICT)
    assert "disagree on the error (internal_error and model_timeout)" in conflict
    assert "the cost" not in conflict


async def test_a_bill_that_is_to_come_is_told(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """When the cost and missing outputs of a settled run are read again; and that it was given
    up."""
    await see(services, RunStatus.COMPLETED, Source.POLL)
    state = text_of(await story(services, "run_1"), Kind.STATE)
    assert "Its cost and outputs is read again at" not in state
    assert "Its cost and outputs are read again at" in state
    outputs = (Output("o", "text", "words"),)
    clock.move(60)
    await see(services, RunStatus.COMPLETED, Source.POLL, outputs=outputs)
    assert "Its cost is read again at" in text_of(await story(services, "run_1"), Kind.STATE)


async def test_a_run_that_flora_denies(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """How often it was denied since when, and in the end that it is lost."""
    await services.tracker.track("run_nobody_knows")
    await services.poller.poll_due()
    told = await story(services, "run_nobody_knows")
    assert "FLORA has answered 1 time since" in text_of(told, Kind.STATE)
    assert "The last look failed: FLORA answered 404" in text_of(told, Kind.TROUBLE)
    while told.next.why is not Why.LOST:
        due = await services.poller.next_due_at()
        assert due is not None
        clock.move(max((due - clock()).total_seconds(), 0))
        await services.poller.poll_due()
        told = await story(services, "run_nobody_knows")
    assert told.next.at == clock() + timedelta(days=1)
    assert "counts as lost, until anything shows it" in text_of(told, Kind.STATE)


async def test_who_works_on_it_or_that_nobody_does(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A claim is told with its end; a run that stays due long says that nobody polls."""
    run_id = await start(services)
    clock.move(60)
    assert "due for 55 s: as it seems nobody polls" in text_of(
        await story(services, run_id), Kind.TROUBLE
    )
    await claims.claim_due(
        services.database,
        holder="worker-7",
        now=clock(),
        lease=timedelta(seconds=30),
        limit=1,
        workspaces=None,
    )
    told = await story(services, run_id)
    assert "A worker (worker-7) is reading it now" in text_of(told, Kind.CLAIM)
    assert text_of(told, Kind.TROUBLE) == ""


async def test_a_refused_key_is_told(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The process that FLORA refuses tells it; another one finds it in the ledger of sweeps."""
    async with make_flora() as flora:
        services = await open_on(flora, flora_api_key="sk_test_wrong")
        await services.tracker.track("run_1")
        await services.poller.poll_due()
        told = text_of(await story(services, "run_1"), Kind.TROUBLE)
        assert "FLORA refuses the key of its workspace: FLORA answered 401" in told
        [workspace] = services.workspaces
        await services.sweeper.sweep(workspace)
        other = await open_on(flora)
        told = text_of(await story(other, "run_1"), Kind.TROUBLE)
        assert "The last sweep of its workspace's history" in told
        assert "401" in told
        keyless = await open_on(flora, flora_api_key=None)
        assert "No API key is set here" in text_of(await story(keyless, "run_1"), Kind.TROUBLE)


async def test_learned_durations_are_told(reached: Services, clock: HandClock) -> None:
    """Once twenty runs of a technique have ended, the look says what was learned from them."""
    for number in range(20):
        await start(reached, f"key-{number}")
    clock.move(60)
    await reached.poller.poll_due()
    clock.move(600)
    run_id = await start(reached, "key-last")
    told = await story(reached, run_id)
    assert told.next.why is Why.LEARNED_GRACE
    assert "(learned from 20 runs)" in text_of(told, Kind.NEXT)


async def test_a_replayed_callback_says_when_it_was_applied(
    reached: Services, clock: HandClock
) -> None:
    """A callback that is understood only later is told with both of its times."""
    body = {"type": "run.completed", "data": {"run_id": "run_1", "status": "completed"}}
    await keep(
        reached.database,
        Delivered(
            delivery=Delivery(
                delivery_id="whd_9",
                received_at=clock(),
                body=json.dumps(body).encode(),
                run_id="run_1",
            ),
            outcome=DeliveryOutcome.QUARANTINED,
            reason="an older version did not understand it",
        ),
    )
    clock.move(60)
    await reached.replayer.replay("whd_9")
    explained = await story(reached, "run_1")
    (sentence,) = [one for one in explained.sentences if one.kind is Kind.SIGHT]
    assert sentence.at == clock() - timedelta(seconds=60)
    assert "was not applied until 2026-07-01 12:01:00 UTC" in sentence.text


async def test_an_unknown_run_has_no_story(services: Services) -> None:
    """Nobody heard of it."""
    assert await services.explainer.explain("run_nobody_knows") is None
