"""The connections that a `Database` keeps, while PostgreSQL accepts no new ones."""

from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import func, select, text

from tests.support.postgres import PostgresServer
from tracker.core.errors import StoreUnavailable
from tracker.store.engine import Database

BACKEND = select(func.pg_backend_pid())


async def test_open_connections_are_used_while_no_other_can_be_made(
    own_postgres: PostgresServer,
) -> None:
    """As where a role's password was changed, or all connections of the server are in use: one
    that is lost costs one answer, and the others go on."""
    url = urlsplit(own_postgres.url("tracker"))
    url = url._replace(netloc=url.netloc.replace("postgres@", "app@"))
    async with AsyncExitStack() as opened:
        superuser = await asyncpg.connect(own_postgres.url("tracker"))
        opened.push_async_callback(superuser.close)
        await superuser.execute("CREATE ROLE app LOGIN")
        database = await opened.enter_async_context(await Database.open(url.geturl()))
        async with AsyncExitStack() as stack:
            reading = [await stack.enter_async_context(database.read()) for _ in range(3)]
            backends = [await one.scalar(BACKEND) for one in reading]
        await superuser.execute("ALTER ROLE app NOLOGIN")
        newest = await database.fetchval(BACKEND)
        assert newest in backends
        await superuser.fetchval("SELECT pg_terminate_backend($1, 5000)", newest)
        # By the kernel's timing, its end is seen before it is used again, or then.
        with pytest.raises(StoreUnavailable, match=r"not permitted|connection .* is lost"):
            await database.fetchval(BACKEND)
        for _ in range(3):
            assert await database.fetchval(BACKEND) in backends
        await superuser.execute("ALTER ROLE app LOGIN")
        async with AsyncExitStack() as stack:
            for _ in range(8):
                await (await stack.enter_async_context(database.read())).scalar(BACKEND)


@pytest.mark.parametrize("default", ["repeatable read", "serializable"])
async def test_writes_see_what_others_committed_whatever_the_default_is(
    own_postgres: PostgresServer, default: str
) -> None:
    """A transaction that waited for a budget's lock would else not see what was reserved
    meanwhile, and spend it again."""
    isolation = text("SHOW transaction_isolation")
    async with await Database.open(own_postgres.url("tracker")) as database:
        quoted = f"ALTER ROLE postgres SET default_transaction_isolation = '{default}'"
        await database.execute(text(quoted))
    async with await Database.open(own_postgres.url("tracker")) as database:
        assert await database.write(lambda one: one.scalar(isolation)) == "read committed"
        assert await database.send(isolation.text, ()) == [("read committed",)]
        assert await database.fetchval(isolation) == "repeatable read"


async def test_what_sqlalchemy_logs_of_its_pools_is_not_among_our_logs(postgres_url: str) -> None:
    """What is logged under `tracker` is shown."""
    async with await Database.open(postgres_url) as database:
        for engine in database.engines:
            assert engine.pool.logger.name.startswith("sqlalchemy.pool.")
