"""The fuzzed targets: each takes any bytes and fails where a promise is broken.

The same targets replay the committed corpus in the suite and run for hours under `bench.fuzz`.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    contextmanager,
    nullcontext,
)
from functools import partial

from tests.hostile import fetched, parsers, served
from tracker.services import Services, open_services
from tracker.settings import Settings

Asks = Callable[[bytes], Awaitable[None]]
Check = Callable[[bytes], None]
"""Raises where the bytes break a promise."""

READING: dict[str, Callable[[], AbstractContextManager[Check]]] = {
    "signature": partial(nullcontext, parsers.signature),
    "answers": partial(nullcontext, parsers.answers),
    "sheet": partial(nullcontext, parsers.sheets),
    "settings": parsers.settings,
}
SERVED: dict[str, Callable[[Services], Asks]] = {
    "callback": served.callback,
    "api": served.api,
}
FETCHED: dict[str, Callable[[], AbstractAsyncContextManager[Asks]]] = {"file": fetched.files}


@contextmanager
def opened(name: str, database_url: str | None = None) -> Iterator[Check]:
    """An open target, with the database at `database_url`, or a SQLite file of its own."""
    if name in READING:
        with READING[name]() as check:
            yield check
        return
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as folder:
        stack = AsyncExitStack()
        url = database_url or f"sqlite:///{folder}/tracker.db"
        try:
            asks = runner.run(_open(stack, name, url))
            yield lambda data: runner.run(_ask(asks, data))
        finally:
            runner.run(stack.aclose())


async def _ask(asks: Asks, data: bytes) -> None:
    await asks(data)


async def _open(stack: AsyncExitStack, name: str, database_url: str) -> Asks:
    if name in FETCHED:
        return await stack.enter_async_context(FETCHED[name]())
    settings = Settings(
        tracker_database_url=database_url,
        tracker_api_token=served.TOKEN,
        flora_webhook_secret=parsers.SECRETS,
        flora_workspace_id=served.WORKSPACE,
        tracker_signature_tolerance=parsers.TOLERANCE,
    )
    services = open_services(settings, wall=lambda: parsers.NOW, seconds=lambda: 0.0)
    return SERVED[name](await stack.enter_async_context(services))
