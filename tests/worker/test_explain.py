"""The explanation of a run from what the database holds, on both engines."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.support.deliveries import Delivered, keep
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.core.schedule import PollReason
from tracker.explainer import Explanation, SentenceKind
from tracker.flora.callback import sign
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.start import StartRequest
from tracker.store import coordination
from tracker.store.queries.workspaces import keep_wait
from tracker.views import explanation_json

PUBLIC_URL = "http://127.0.0.1:9"
PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


async def explained(services: Services, run_id: str) -> Explanation:
    explanation = await services.explainer.explain(run_id)
    assert explanation is not None
    return explanation


def text_of(explanation: Explanation, kind: SentenceKind | None = None) -> str:
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
    await services.receiver.receive(body, signature=header, webhook_id=None)[1]
    await services.applier.drain()


def why(explanation: Explanation) -> PollReason | None:
    assert explanation.record.next_poll is not None
    return explanation.record.next_poll.why


async def see(services: Services, status: RunStatus, source: Source, **shown: Any) -> None:
    """The API shows run_1."""
    await services.writer.submit(
        Observed(
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


async def test_only_what_is_missing_is_still_to_be_fetched(reached: Services) -> None:
    """A page of the history may show outputs and times before the bill, and again without news."""
    outputs = (Output("a", "imageUrl", "https://cdn.example/1.png"),)
    ended = {"outputs": outputs, "completed_at": reached.clock()}
    await see(reached, RunStatus.COMPLETED, Source.HISTORY, **ended)
    found = text_of(await explained(reached, "run_1"), SentenceKind.OBSERVATION)
    assert "New: 1 output and its end" in found
    assert "Cost is still to be fetched." in found
    assert "times are still" not in found


async def test_a_start_and_its_callback(reached: Services, clock: HandClock) -> None:
    """Key, start, callback, poll: each with its time and source, and what it brought."""
    run_id = await start(reached)
    waiting = await explained(reached, run_id)
    assert why(waiting) is PollReason.GRACE
    assert "Waiting for the callback" in text_of(waiting, SentenceKind.CALLBACK)
    assert "30 s after the run was first seen" in text_of(waiting, SentenceKind.NEXT)

    clock.move(40)
    assert "No callback after 40 s" in text_of(
        await explained(reached, run_id), SentenceKind.CALLBACK
    )

    await call_back(reached, run_id)
    ended = await explained(reached, run_id)
    assert why(ended) is PollReason.ENDED
    assert "Callback whd_1 reported completed" in text_of(ended, SentenceKind.OBSERVATION)
    assert "still to be fetched" in text_of(ended, SentenceKind.OBSERVATION)
    assert "Outputs, cost and times are being fetched" in text_of(ended, SentenceKind.STATE)
    assert "has finished, and its details are fetched at once" in text_of(ended, SentenceKind.NEXT)

    clock.move(1)
    await reached.poller.poll_due()
    explanation = await explained(reached, run_id)
    assert explanation.record.next_poll is None
    observations = [one for one in explanation.sentences if one.kind is SentenceKind.OBSERVATION]
    assert [one.source for one in observations] == [Source.START, Source.CALLBACK, Source.POLL]
    assert [one.at for one in observations] == sorted(one.at for one in observations if one.at)
    assert "a cost of $0.25" in observations[-1].text
    assert "is settled" in observations[-1].text
    stored = text_of(explanation, SentenceKind.START)
    assert "idempotency key key-1" in stored
    assert f"the callback address {PUBLIC_URL}/callbacks/flora/*." in stored
    assert "first known from a callback" in text_of(explanation, SentenceKind.STATE)
    assert "1 API request for this run alone" in text_of(explanation, SentenceKind.CHECKS)
    shown = explanation_json(explanation)
    assert [line["text"] for line in shown["story"]] == [one.text for one in explanation.sentences]
    assert shown["next_poll"]["why"] == "settled"
    json.dumps(shown)


async def test_a_start_without_a_callback_is_polled(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Without a callback the first poll comes after an interval; then the waits double."""
    run_id = await start(services)
    first = await explained(services, run_id)
    assert why(first) is PollReason.INTERVAL
    assert "No callback was requested" in text_of(first, SentenceKind.CALLBACK)
    assert "no callback is expected" in text_of(first, SentenceKind.NEXT)
    for _ in range(2):
        clock.move(((await the_run(services, run_id)).next_check_at - clock()).total_seconds())  # type: ignore[operator]
        await services.poller.poll_due()
    explanation = await explained(services, run_id)
    assert (why(explanation), explanation.record.polls) == (PollReason.WAIT, 2)
    assert "2 polls in a row have not found its end" in text_of(explanation, SentenceKind.NEXT)
    assert "2 API requests" in text_of(explanation, SentenceKind.CHECKS)
    assert "A poll showed running at" in text_of(explanation, SentenceKind.OBSERVATION)


async def test_a_run_that_someone_asked_to_track(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The state given with the request is not trusted, and the run is due at once."""
    run = flora.start()
    await services.tracker.track(run.run_id)
    explanation = await explained(services, run.run_id)
    assert why(explanation) is PollReason.ASKED
    assert "someone asked to track it" in text_of(explanation, SentenceKind.STATE)
    assert "asks for a poll at once" in text_of(explanation, SentenceKind.NEXT)


async def test_a_run_found_in_the_history(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A sweep finds a run that was started elsewhere, with its details, and settles it."""
    run = flora.start()
    clock.move(60)
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    explanation = await explained(services, run.run_id)
    assert "First seen in FLORA's run history" in text_of(explanation, SentenceKind.STATE)
    assert "FLORA's run history showed completed" in text_of(explanation, SentenceKind.OBSERVATION)
    assert "first known from FLORA's run history" in text_of(explanation, SentenceKind.STATE)


async def test_a_run_first_seen_in_a_callback(reached: Services, clock: HandClock) -> None:
    """The explanation says that the callback came before the run was known here."""
    await call_back(reached, "run_1", status="failed", error_code="model_timeout")
    explanation = await explained(reached, "run_1")
    assert "First seen in a callback" in text_of(explanation, SentenceKind.STATE)
    assert "reported failed (model_timeout)" in text_of(explanation, SentenceKind.OBSERVATION)
    clock.move(1)
    await see(reached, RunStatus.PENDING, Source.START, created_at=clock())
    explanation = await explained(reached, "run_1")
    assert "had shown the run before" in text_of(explanation, SentenceKind.OBSERVATION)
    assert "This is older: the run stays failed" in text_of(explanation, SentenceKind.OBSERVATION)


async def test_repeated_late_and_quarantined_callbacks(reached: Services, clock: HandClock) -> None:
    """A late callback is shown with its delay, a repeated one with its count, a quarantined one
    with the reason."""
    run_id = await start(reached)
    clock.move(120)
    await reached.poller.poll_due()
    clock.move(30)
    for _ in range(3):
        await call_back(reached, run_id)
        clock.move(1)
    await call_back(reached, run_id, "whd_other")
    await call_back(reached, run_id, "whd_odd", status="paused")
    explanation = await explained(reached, run_id)
    deliveries = text_of(explanation, SentenceKind.DELIVERY)
    observations = text_of(explanation, SentenceKind.OBSERVATION)
    assert "Callback whd_1 reported completed. The end was already known" in observations
    assert "whd_1 received 3 times" in deliveries
    assert "whd_other (run.completed) brought nothing new" in deliveries
    assert "whd_odd quarantined: signed by FLORA, but the type is" in deliveries
    assert "after the end (late)" in text_of(explanation, SentenceKind.CALLBACK)
    assert "The end had been known for 30 s" in text_of(explanation, SentenceKind.CALLBACK)


async def test_a_callback_that_never_came(reached: Services, clock: HandClock) -> None:
    """The explanation says that nothing is lost."""
    run_id = await start(reached)
    clock.move(120)
    await reached.poller.poll_due()
    explanation = text_of(await explained(reached, run_id), SentenceKind.CALLBACK)
    assert explanation == "The callback was missed. No results lost: another source showed the end."


async def test_both_sides_of_a_contradiction_are_shown(reached: Services, clock: HandClock) -> None:
    """A callback says failed, the API completed: both with their times, and which one counts."""
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
    conflict = text_of(await explained(reached, "run_1"), SentenceKind.CONFLICT)
    assert "a callback at 2026-07-01 12:00:00 UTC reported failed (safety_blocked)" in conflict
    assert "a poll reported completed" in conflict
    assert "The run counts as completed: the API overrides a callback" in conflict


async def test_differing_details_are_a_contradiction_too(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Two polls of one end with different errors are shown with both codes; two costs are no
    contradiction, because FLORA corrects its bills."""
    for number, code in enumerate(("internal_error", "model_timeout")):
        cost = Decimal(number)
        error = RunError(code, "")
        await see(services, RunStatus.FAILED, Source.POLL, charged_cost=cost, error=error)
        clock.move(5)
    conflict = text_of(await explained(services, "run_1"), SentenceKind.CONFLICT)
    assert "not about the error (internal_error and model_timeout)" in conflict
    assert "the cost" not in conflict


async def test_an_open_bill_is_explained(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The explanation says when cost and missing outputs of a settled run are checked again."""
    await see(services, RunStatus.COMPLETED, Source.POLL)
    state = text_of(await explained(services, "run_1"), SentenceKind.STATE)
    assert "Its cost and outputs is checked again at" not in state
    assert "Its cost and outputs are checked again at" in state
    outputs = (Output("o", "text", "words"),)
    clock.move(60)
    await see(services, RunStatus.COMPLETED, Source.POLL, outputs=outputs)
    assert "Its cost is checked again at" in text_of(
        await explained(services, "run_1"), SentenceKind.STATE
    )


async def test_a_run_that_flora_does_not_find(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """How often FLORA did not find it since when, and finally that it is lost."""
    await services.tracker.track("run_unknown")
    await services.poller.poll_due()
    explanation = await explained(services, "run_unknown")
    assert "FLORA has answered 1 time since" in text_of(explanation, SentenceKind.STATE)
    assert "The last poll failed: FLORA answered 404" in text_of(explanation, SentenceKind.TROUBLE)
    while why(explanation) is not PollReason.LOST:
        due = await services.poller.next_due_at()
        assert due is not None
        clock.move(max((due - clock()).total_seconds(), 0))
        await services.poller.poll_due()
        explanation = await explained(services, "run_unknown")
    assert explanation.record.next_check_at == clock() + timedelta(days=1)
    assert "counts as lost until something shows it" in text_of(explanation, SentenceKind.STATE)


async def test_the_polling_worker_or_that_there_is_none(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A lease is shown with its end. Only when FLORA has not been asked for two minutes, no worker
    seems to run."""
    run_id = await start(services)
    asked = "FLORA was asked at 2026-07-01 12:00:00 UTC"
    clock.move(60)
    assert text_of(await explained(services, run_id), SentenceKind.TROUBLE) == ""
    clock.move(10)
    trouble = text_of(await explained(services, run_id), SentenceKind.TROUBLE)
    assert trouble.startswith(f"Overdue for 1 min 5 s, although {asked}: polling is behind")
    assert "no worker seems" not in trouble
    clock.move(60)
    trouble = text_of(await explained(services, run_id), SentenceKind.TROUBLE)
    assert "last asked at 2026-07-01 12:00:00 UTC: no worker seems to be running" in trouble
    await coordination.claim_due(
        services.database,
        holder="worker-7",
        now=clock(),
        lease=timedelta(seconds=30),
        limit=1,
        workspaces=None,
    )
    explanation = await explained(services, run_id)
    assert "Worker worker-7 is polling it now" in text_of(explanation, SentenceKind.CLAIM)
    assert text_of(explanation, SentenceKind.TROUBLE) == ""


async def test_a_pause_is_no_missing_worker(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """While FLORA has asked for a pause, a due run waits for its end, whoever was told."""
    run_id = await start(services)
    [workspace] = services.workspaces
    clock.move(60)
    now = clock()
    until = now + timedelta(seconds=50)
    await keep_wait(services.database, workspace.place, until, process="other", latest=until)
    clock.move(45)
    trouble = text_of(await explained(services, run_id), SentenceKind.TROUBLE)
    assert trouble == (
        "FLORA has asked for a pause until 2026-07-01 12:01:50 UTC; polls wait for it."
    )
    clock.move(10)
    trouble = text_of(await explained(services, run_id), SentenceKind.TROUBLE)
    assert trouble.startswith("Overdue for 1 min 50 s")


async def test_a_refused_key_is_explained(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The refused process knows it; another one finds it in the list of sweeps."""
    async with make_flora() as flora:
        services = await open_on(flora, flora_api_key="sk_test_wrong")
        await services.tracker.track("run_1")
        await services.poller.poll_due()
        explanation = text_of(await explained(services, "run_1"), SentenceKind.TROUBLE)
        assert "FLORA has refused the workspace's API key since 20" in explanation
        [workspace] = services.workspaces
        await services.sweeper.sweep(workspace)
        other = await open_on(flora)
        explanation = text_of(await explained(other, "run_1"), SentenceKind.TROUBLE)
        assert "The workspace's last history sweep" in explanation
        assert "401" in explanation
        keyless = await open_on(flora, flora_api_key=None)
        assert "No API key is set here" in text_of(
            await explained(keyless, "run_1"), SentenceKind.TROUBLE
        )


async def test_learned_durations_are_explained(reached: Services, clock: HandClock) -> None:
    """Once twenty runs of a technique have ended, the reason of the next poll names them."""
    for number in range(20):
        await start(reached, f"key-{number}")
    clock.move(60)
    await reached.poller.poll_due()
    clock.move(600)
    run_id = await start(reached, "key-last")
    explanation = await explained(reached, run_id)
    assert why(explanation) is PollReason.LEARNED_GRACE
    assert "(learned from 20 runs)" in text_of(explanation, SentenceKind.NEXT)


async def test_a_callback_is_awaited_for_as_long_as_was_learned(
    reached: Services, clock: HandClock
) -> None:
    """Whether the run is polled by now goes by its next poll, and not by the configured grace."""
    technique_id = (await the_run(reached, await start(reached))).run.technique_id
    ended = {"technique_id": technique_id, "created_at": clock()}
    clock.move(200)
    for number in range(20):
        entry = Observed(
            observation=Observation(
                run_id=f"run_{number}",
                source=Source.HISTORY,
                at=clock(),
                status=RunStatus.COMPLETED,
                completed_at=clock(),
                **ended,  # type: ignore[arg-type]
            )
        )
        await reached.writer.submit(entry)
    clock.move(10)
    run_id = await start(reached, "key-last")
    clock.move(60)
    waiting = await explained(reached, run_id)
    assert why(waiting) is PollReason.LEARNED_GRACE
    assert text_of(waiting, SentenceKind.CALLBACK) == "Waiting for the callback."
    clock.move(150)
    late = await explained(reached, run_id)
    assert "No callback after 3 min 30 s" in text_of(late, SentenceKind.CALLBACK)
    assert "Next poll due now" in text_of(late, SentenceKind.NEXT)


async def test_a_replayed_callback_is_shown_with_both_times(
    reached: Services, clock: HandClock
) -> None:
    """A callback that was applied long after its receipt is shown with both times."""
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
    explanation = await explained(reached, "run_1")
    (sentence,) = [one for one in explanation.sentences if one.kind is SentenceKind.OBSERVATION]
    assert sentence.at == clock() - timedelta(seconds=60)
    assert "applied only at 2026-07-01 12:01:00 UTC" in sentence.text


async def test_an_unknown_run_has_no_explanation(services: Services) -> None:
    """The explainer returns nothing."""
    assert await services.explainer.explain("run_unknown") is None
