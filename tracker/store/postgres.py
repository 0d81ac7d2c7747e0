"""A connection to PostgreSQL: its time-outs, its encryption, and where the password may go.

A password that a server asks for in clear goes to this machine or through TLS, and nowhere else.
asyncpg would send it to any server. So where TLS is not demanded (`sslmode=prefer`, the default,
and `allow`) it is tried first, and on a connection without TLS the server's messages are inspected
before asyncpg gets them, until the server is ready. Other ways to prove a password (SCRAM) do not
show it.

If the URL names several hosts, each gets a connection attempt of its own: one that is silent, as a
machine that is gone, holds up no other.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, Final

from tracker.core.net import is_loopback
from tracker.store.url import DatabaseUrl

CLOSE_SECONDS: Final = 0.5
"""How long a server may take to close a connection; then it is cut off."""
NEXT_HOST_SECONDS: Final = 1.0
"""How long a host may stay silent before the next one is tried as well."""
_SET_ISOLATION: Final = "SET default_transaction_isolation = 'read committed'"
"""What is read under a lock has to be what others committed before: a budget's reservations. The
role or the database may have another default."""
_HEADER: Final = 5
"""Bytes of a message's type (a letter) and its length, which counts all but the letter."""
_MAX_MESSAGE: Final = 64 * 1024
"""The most bytes of a message before the server is ready."""
_CLEARTEXT: Final = 3
"""The request code of AuthenticationCleartextPassword, in PostgreSQL's protocol 3."""


class PasswordNotSent(ConnectionError):
    """The server asks for the password in clear, over a connection without TLS."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} offers no TLS and asks for the password in clear, so it was not sent: turn on "
            "TLS at the server and set sslmode=verify-full, or let it ask by scram-sha-256"
        )


async def connect_postgres(
    url: DatabaseUrl,
    application_name: str,
    *,
    is_limited: bool = True,
    avoiding: Sequence[str] = (),
) -> Any:
    """A connection of asyncpg, with the tracker's time-outs; on this side, only if `is_limited`.

    Plans avoid the methods `avoiding`, as PostgreSQL's settings name them.

    asyncpg parses the URL itself, so that `sslmode` and the rest mean the same as everywhere.
    Raises what asyncpg raises, and `PasswordNotSent`.
    """
    attempt = partial(_connect_to, application_name=application_name, is_limited=is_limited)
    hosts = url.each_host
    connection = await (_connect_to_any(url, hosts, attempt) if len(hosts) > 1 else attempt(url))
    # Not start-up settings, which a pooler might not accept.
    try:
        off = (f"SET enable_{one} = off" for one in avoiding)
        await connection.execute("; ".join((_SET_ISOLATION, *off)))
    except BaseException:
        connection.terminate()
        raise
    return connection


def is_standby_connection(connection: Any) -> bool:
    """Whether a connection of asyncpg leads to a standby now. Servers report it by themselves, from
    PostgreSQL 14 on."""
    return getattr(connection.get_settings(), "in_hot_standby", "off") == "on"


_reached: Final[dict[str, DatabaseUrl]] = {}
"""The host of each URL that was reached last, which is tried first."""


async def _connect_to_any(
    url: DatabaseUrl,
    hosts: Sequence[DatabaseUrl],
    attempt: Callable[[DatabaseUrl], Awaitable[Any]],
) -> Any:
    """A connection to the first of these hosts that accepts one.

    A standby counts only if no other host does, unless `target_session_attrs` is given. The next
    host is tried as soon as one fails, or after `NEXT_HOST_SECONDS`.
    """
    waiting = sorted(hosts, key=lambda host: host != _reached.get(url.dsn))
    attempts: dict[asyncio.Future[Any], DatabaseUrl] = {}
    under_way: set[asyncio.Future[Any]] = set()
    second_choice: asyncio.Future[Any] | None = None
    chosen: asyncio.Future[Any] | None = None
    errors: list[BaseException] = []
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(url.times.connect):
                while chosen is None and (waiting or under_way):
                    if waiting:
                        host = waiting.pop(0)
                        begun = asyncio.ensure_future(attempt(host))
                        attempts[begun] = host
                        under_way.add(begun)
                    done, under_way = await asyncio.wait(
                        under_way,
                        timeout=NEXT_HOST_SECONDS if waiting else None,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    for each in done:
                        if (error := each.exception()) is not None:
                            errors.append(error)
                        elif _is_second_choice(url, each.result()):
                            second_choice = second_choice or each
                        else:
                            chosen = chosen or each
        chosen = chosen or second_choice
        if chosen is not None:
            _reached[url.dsn] = attempts[chosen]
            return chosen.result()
    finally:
        for each in attempts:
            if each is not chosen:
                each.cancel()
                each.add_done_callback(_drop)
    # The error of a server that answered explains more than that of one out of reach.
    raise min(errors, key=_is_unreached, default=TimeoutError())


def _is_second_choice(url: DatabaseUrl, connection: Any) -> bool:
    """Whether a connection is used only if there is no other."""
    if url.wanted_server == "prefer-standby":
        return not is_standby_connection(connection)
    return not url.wanted_server and is_standby_connection(connection)


def _is_unreached(error: BaseException) -> bool:
    """Whether a host did not answer, rather than refuse."""
    return isinstance(error, OSError) and not isinstance(error, PasswordNotSent | ssl.SSLError)


def _drop(attempt: asyncio.Future[Any]) -> None:
    """Close the connection of an attempt that came too late, if it made one."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


async def _connect_to(url: DatabaseUrl, *, application_name: str, is_limited: bool) -> Any:
    """A connection to one host."""
    if not url.is_remote:
        return await _connect(url, application_name, is_limited)
    loop = _GuardedLoop(asyncio.get_running_loop())
    # asyncpg implements `prefer` without the given loop.
    mode = "require" if url.sslmode in ("prefer", "allow") else url.sslmode
    try:
        return await _connect(url, application_name, is_limited, ssl=mode, loop=loop)
    except ConnectionError as error:
        if mode == url.sslmode or "rejected SSL upgrade" not in str(error):
            raise
        return await _connect(url, application_name, is_limited, ssl="disable", loop=loop)


async def _connect(url: DatabaseUrl, application_name: str, is_limited: bool, **how: Any) -> Any:
    import asyncpg  # noqa: PLC0415 - not loaded for SQLite

    times = url.times
    milliseconds = str(int(times.statement * 1000))
    settings = {
        "application_name": application_name,
        "timezone": "UTC",
        "statement_timeout": milliseconds,
        "lock_timeout": str(int(times.lock * 1000)),
        "idle_in_transaction_session_timeout": milliseconds,
        # Compiling takes longer than any statement of the tracker.
        "jit": "off",
    }
    try:
        return await asyncpg.connect(
            url.dsn,
            timeout=times.connect,
            command_timeout=times.statement + 1 if is_limited else None,
            connection_class=_connection_class(),
            max_cacheable_statement_size=0,  # no limit: the writer's are long
            server_settings=settings,
            **how,
        )
    except asyncpg.InternalServerError as error:
        # No statement is to blame: poolers of managed servers use its code if none is free.
        raise ConnectionError(str(error)) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        refused = getattr(how.get("loop"), "refused", None)
        if refused is None:
            raise
        raise PasswordNotSent(refused) from error


@cache
def _connection_class() -> Any:
    import asyncpg  # noqa: PLC0415

    class PostgresConnection(asyncpg.Connection):  # type: ignore[misc]
        def __init__(self, protocol: Any, transport: Any, loop: Any, *more: Any) -> None:
            super().__init__(protocol, transport, getattr(loop, "real", loop), *more)

        async def close(self, **_: object) -> None:
            # SQLAlchemy gives two seconds, which add up where several connections are closed.
            with suppress(TimeoutError):  # then it is cut off
                await super().close(timeout=CLOSE_SECONDS)

        async def set_type_codec(self, *args: Any, **options: Any) -> None:
            # SQLAlchemy calls this for a new connection, and does not wrap its errors.
            try:
                await super().set_type_codec(*args, **options)
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as exc:
                raise ConnectionError(str(exc)) from exc

    return PostgresConnection


class _GuardedLoop:
    """The running loop, whose connections without TLS send no password to another machine.

    `refused` is a host that asked for one.
    """

    def __init__(self, real: asyncio.AbstractEventLoop) -> None:
        self.real = real
        self.refused: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def create_connection(
        self, factory: Callable[[], Any], host: str, port: int, **options: Any
    ) -> tuple[Any, Any]:
        from asyncpg.protocol import Protocol  # noqa: PLC0415

        inner = factory()
        # A request for TLS is another protocol, which is followed by this one only inside TLS.
        guarded = isinstance(inner, Protocol) and "ssl" not in options and not is_loopback(host)
        outer = _CleartextGuard(inner, lambda: setattr(self, "refused", host)) if guarded else inner
        transport, _ = await self.real.create_connection(lambda: outer, host, port, **options)
        return transport, inner


class _CleartextGuard(asyncio.Protocol):
    """Forwards the server's messages until it is ready; aborts the connection if it asks for the
    password in clear."""

    def __init__(self, inner: Any, refuse: Callable[[], None]) -> None:
        self._inner = inner
        self._refuse = refuse
        self._transport: Any = None
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            size = 1 + int.from_bytes(self._buffer[1:_HEADER])
            if size > _MAX_MESSAGE:
                self._transport.abort()
                return
            if len(self._buffer) < size:
                return
            message, self._buffer = self._buffer[:size], self._buffer[size:]
            if message[:1] == b"R" and int.from_bytes(message[_HEADER:9]) == _CLEARTEXT:
                self._refuse()
                self._transport.abort()
                return
            self._inner.data_received(message)
            if message[:1] == b"Z":  # ready: it asks for no password any more
                self._transport.set_protocol(self._inner)
                if self._buffer:
                    self._inner.data_received(self._buffer)
                return

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
