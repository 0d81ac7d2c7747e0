"""A connection to PostgreSQL: its time-outs, its encryption, and what becomes of the password.

A password that a server asks for in clear goes to this machine or through TLS, and else nowhere.
asyncpg sends it to whoever asks. So where TLS is not demanded (`sslmode=prefer`, the default, and
`allow`) it is tried first, and on a connection without it the server's messages are read before
asyncpg reads them, until it is ready. Other ways to prove a password (SCRAM) do not show it.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final

from tracker.core.net import is_loopback
from tracker.store.url import DatabaseUrl

CONNECT_SECONDS: Final = 4.0
STATEMENT_SECONDS: Final = 5.0
"""The server ends a statement after this long; the client gives up a second later."""
LOCK_SECONDS: Final = 2.0
"""How long one waits for a lock. The tracker's own transactions take milliseconds; a deadlock,
which the server looks for after one second, has to show as what it is."""
FAREWELL_SECONDS: Final = 0.5
"""How long a server may take to let a connection go; one that says nothing is just left."""
_HEADER: Final = 5
"""A message's type, a letter, and its length, which counts itself but not the letter."""
_LONGEST: Final = 64 * 1024
"""Bytes of a message before the server is ready."""


class PasswordNotSent(ConnectionError):
    """The server wants the password in clear, over a connection that anybody may read."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} offers no TLS and asks for the password in clear, so it was not sent: turn on "
            "TLS at the server and set sslmode=verify-full, or let it ask by scram-sha-256"
        )


async def connect_postgres(
    url: DatabaseUrl,
    application_name: str,
    *,
    command_timeout: float | None = STATEMENT_SECONDS + 1,
    by_key: bool = False,
) -> Any:
    """A connection of asyncpg's own, with the tracker's time-outs.

    `by_key` is for those who look rows up by their keys: a statement is planned once, and what was
    planned while a table was small would go on to read all of it when it is not.

    asyncpg reads the URL itself, so that several hosts and the rest mean what they mean everywhere
    else; `sslmode` too. Raises what asyncpg raises, and `PasswordNotSent`.
    """
    if not url.is_remote:
        connection = await _connect(url, application_name, command_timeout)
    else:
        loop = _GuardedLoop(asyncio.get_running_loop())
        # What `prefer` does by itself it would do past the loop that is given to it.
        ssl = "require" if url.sslmode in ("prefer", "allow") else url.sslmode
        try:
            connection = await _connect(url, application_name, command_timeout, ssl=ssl, loop=loop)
        except ConnectionError as error:
            if ssl == url.sslmode or "rejected SSL upgrade" not in str(error):
                raise
            connection = await _connect(
                url, application_name, command_timeout, ssl="disable", loop=loop
            )
    if by_key:
        # Not among the settings at the start: a pooler in between might not know it there.
        try:
            await connection.execute("SET enable_seqscan = off")
        except BaseException:
            connection.terminate()
            raise
    return connection


async def _connect(
    url: DatabaseUrl, application_name: str, command_timeout: float | None, **how: Any
) -> Any:
    import asyncpg  # noqa: PLC0415 - not needed, and not loaded, where SQLite is used

    milliseconds = str(int(STATEMENT_SECONDS * 1000))
    settings = {
        "application_name": application_name,
        "timezone": "UTC",
        "statement_timeout": milliseconds,
        "lock_timeout": str(int(LOCK_SECONDS * 1000)),
        "idle_in_transaction_session_timeout": milliseconds,
        # Compiling costs more than any of our statements takes.
        "jit": "off",
    }
    try:
        return await asyncpg.connect(
            url.dsn,
            timeout=CONNECT_SECONDS,
            command_timeout=command_timeout,
            connection_class=_connection_class(),
            max_cacheable_statement_size=0,  # the writer's are long, and come again and again
            server_settings=settings,
            **how,
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        refused = getattr(how.get("loop"), "refused", None)
        if refused is None:
            raise
        raise PasswordNotSent(refused) from error


@cache
def _connection_class() -> Any:
    import asyncpg  # noqa: PLC0415

    class Connection(asyncpg.Connection):  # type: ignore[misc]
        def __init__(self, protocol: Any, transport: Any, loop: Any, *more: Any) -> None:
            super().__init__(protocol, transport, getattr(loop, "real", loop), *more)

        async def close(self, *, timeout: float | None = FAREWELL_SECONDS) -> None:
            with suppress(TimeoutError):  # it is cut off then
                await super().close(timeout=timeout)

        async def set_type_codec(self, *args: Any, **options: Any) -> None:
            # SQLAlchemy does this with a new connection, and does not wrap what comes of it.
            try:
                await super().set_type_codec(*args, **options)
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as exc:
                raise ConnectionError(str(exc)) from exc

    return Connection


class _GuardedLoop:
    """The running loop, whose connections without TLS show no password to another machine.

    `refused` is the host that asked for one.
    """

    def __init__(self, real: asyncio.AbstractEventLoop) -> None:
        self.real = real
        self.refused: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def create_connection(
        self, factory: Callable[[], Any], host: str, port: int, **options: Any
    ) -> tuple[Any, Any]:
        """As the loop's own."""
        from asyncpg.protocol import Protocol  # noqa: PLC0415

        inner = factory()
        # What asks for TLS is another protocol, and is followed by this one only within it.
        guarded = isinstance(inner, Protocol) and "ssl" not in options and not is_loopback(host)
        outer = _Guard(inner, lambda: setattr(self, "refused", host)) if guarded else inner
        transport, _ = await self.real.create_connection(lambda: outer, host, port, **options)
        return transport, inner


class _Guard(asyncio.Protocol):
    """Passes on what a server says, message by message, until it is ready; ends the connection
    where it asks for the password in clear."""

    def __init__(self, inner: Any, refuse: Callable[[], None]) -> None:
        self._inner = inner
        self._refuse = refuse
        self._transport: Any = None
        self._kept = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._kept += data
        while len(self._kept) >= _HEADER:
            size = 1 + int.from_bytes(self._kept[1:_HEADER])
            if size > _LONGEST:
                self._transport.abort()
                return
            if len(self._kept) < size:
                return
            message, self._kept = self._kept[:size], self._kept[size:]
            if message[:1] == b"R" and int.from_bytes(message[_HEADER:9]) == _IN_CLEAR:
                self._refuse()
                self._transport.abort()
                return
            self._inner.data_received(message)
            if message[:1] == b"Z":  # ready: nothing is asked for any more
                self._transport.set_protocol(self._inner)
                if self._kept:
                    self._inner.data_received(self._kept)
                return

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)


_IN_CLEAR: Final = 3
"""What AuthenticationCleartextPassword says of itself, in PostgreSQL's protocol 3."""
