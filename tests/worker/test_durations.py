"""How long a technique's runs take: known as soon as enough of them are."""

from sqlalchemy import event

from tests.support.clocks import HandClock
from tests.worker.conftest import OpenServices, the_run
from tests.worker.test_poll import PROMPT
from tracker.polling.poll import DurationBook
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.start import StartRequest
from tracker.store.engine import Database


async def test_they_are_read_with_one_statement(database_url: str, clock: HandClock) -> None:
    """A page of history may show many techniques; what was read lately is not read again."""
    statements: list[str] = []
    async with await Database.open(database_url) as db:

        @event.listens_for(db.engine.sync_engine, "before_cursor_execute")
        def about_to_execute(_one: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        book = DurationBook(db, seconds=clock.seconds)
        page = [f"tech_{number}" for number in range(100)]
        await book.learn([*page, None, "tech_1"])
        assert len(statements) == 1
        assert book.of("tech_99") is not None
        await book.learn(page)
        assert len(statements) == 1


async def first_wait(services: Services) -> float:
    """How long after its start a run is first looked at, in seconds."""
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    record = (await services.starter.start(request)).record
    record = await the_run(services, record.run.run_id)
    assert record.next_check_at is not None
    return (record.next_check_at - record.first_seen_at).total_seconds()


async def test_what_a_first_sweep_brings_is_learned_from_at_once(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """A tracker that has just been installed finds the durations in the history, and seconds later
    no run is looked at before half of its technique's runs would have ended."""
    for _ in range(40):
        flora.start()
        clock.move(10)
    clock.move(60)
    services = await open_on(flora)
    assert await first_wait(services) == 5
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    clock.move(6)
    assert 15 < await first_wait(services) < 25
