"""The value of `TRACKER_DATABASE_URL`, and how to show it without its password."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from tracker.core.errors import SettingsError
from tracker.core.net import is_loopback

_DIALECTS: Final = {
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql",
    "postgresql": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "postgresql+psycopg": "postgresql",
    "postgresql+psycopg2": "postgresql",
}
_ADVICE: Final = "must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
TLS_ADVICE: Final = (
    "Set sslmode=verify-full and sslrootcert=FILE in TRACKER_DATABASE_URL, FILE being the "
    "certificate of the authority that signed the server's (for public ones "
    "/etc/ssl/certs/ca-certificates.crt); sslmode=disable says that the network is trusted."
)
_HOST_PORT: Final = re.compile(r"(\[[0-9a-fA-F:.%\w]*\]|[^\[\]:]*)(:(?P<port>\d{0,5}))?", re.ASCII)
_ENCODE: Final = (
    "in user and password, @ : / ? # [ ] and % must be encoded, as %40 %3A %2F %3F %23 %5B %5D %25"
)
_UNKNOWN_TO_ASYNCPG: Final = (
    *("channel_binding", "connect_timeout", "fallback_application_name", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
)
"""Options of libpq that are left out, since asyncpg would send them to the server as settings:
`DatabaseTimes` has the time limits, and TLS is verified by certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseTimes:
    """How long what concerns a database may take, in seconds."""

    queue: float = 2.0
    """SQLite: how long a write waits for earlier writes of this process."""
    busy: float = 2.0
    """SQLite: how long a write then waits for another process to unlock the file."""
    long_busy: float = 5.0
    """SQLite: the same for reads, which hardly ever wait, and for migrations."""
    connect: float = 4.0
    statement: float = 5.0
    """The server ends a statement after this long; the client gives up a second later."""
    lock: float = 2.0
    """How long a statement waits for a lock. The tracker's own transactions take milliseconds. It
    is longer than the second after which the server checks for deadlocks, so that they are
    reported."""
    answer: float = 6.0
    """A read or a write on PostgreSQL, with its wait for a connection. Closing a connection to a
    server that does not answer takes half a second more."""
    ping: float = 3.0
    waits: float = 1.0
    """How long a request to FLORA waits to learn of other processes' waits, or stores its own."""
    release: float = 1.5
    """How long the caller of a start waits until its lease is released, which goes on without."""


TIMES: Final = DatabaseTimes()


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The address of a database, and the time limits there. `str()` of it holds no password."""

    dialect: Literal["sqlite", "postgresql"]
    dsn: str
    shown: str
    path: str = ""
    times: DatabaseTimes = field(default_factory=lambda: TIMES)

    @classmethod
    def parse(cls, url: str, name: str = "TRACKER_DATABASE_URL") -> Self:
        """Parse a URL. Raises `SettingsError`, which does not show the URL but the `name` of its
        setting, for any other kind of database."""
        advice = f"{name} {_ADVICE}"
        scheme, separator, rest = url.strip().partition("://")
        dialect = _DIALECTS.get(scheme.lower())
        if not separator or dialect is None:
            raise SettingsError(f"{advice}; other databases are not supported")
        if dialect == "sqlite":
            path = rest.removeprefix("/").partition("?")[0]
            if not path or path == ":memory:" or not rest.startswith("/"):
                raise SettingsError(
                    f"{advice}; a SQLite database is a file (three slashes, four for an absolute "
                    "path), because readers and the writer have connections of their own"
                )
            return cls("sqlite", f"sqlite:///{path}", f"sqlite:///{path}", path)
        try:
            dsn = f"postgresql://{rest}"
            parts = urlsplit(dsn)
            _check_hosts(parts)
            query = [
                item
                for item in parse_qsl(parts.query, keep_blank_values=True)
                if item[0] not in _UNKNOWN_TO_ASYNCPG
            ]
        except ValueError:
            # Not `from` the cause, whose message may hold the password.
            raise SettingsError(f"{advice}; {_ENCODE}") from None
        user, at, hosts = parts.netloc.rpartition("@")
        name, colon, _ = user.partition(":")
        shown = f"postgresql://{name}{colon and ':***'}{at}{hosts}{parts.path}"
        return cls("postgresql", parts._replace(query=urlencode(query)).geturl(), shown)

    @property
    def missing(self) -> bool:
        """Whether it is a SQLite file that does not exist."""
        return self.dialect == "sqlite" and not Path(self.path).exists()

    @property
    def is_remote(self) -> bool:
        """Whether the connection leads to another machine."""
        if self.dialect == "sqlite":
            return False
        hosts = self._option("host", "PGHOST")
        named = urlsplit(self.dsn).netloc.rpartition("@")[2]
        if named:
            # Each of several `host:port`; an IPv6 address has brackets.
            hosts = ",".join(re.sub(r":\d*$", "", one) for one in named.split(","))
        return any(
            one and not unquote(one).startswith("/") and not is_loopback(one)
            for one in hosts.split(",")
        )

    @property
    def each_host(self) -> list[Self]:
        """A URL for each host before the path, in their order; only this one if the hosts are an
        option or libpq's variable, or several ports are."""
        parts = urlsplit(self.dsn)
        user, at, hosts = parts.netloc.rpartition("@")
        if "," in self._option("port", "PGPORT"):
            return [self]
        return [
            replace(self, dsn=parts._replace(netloc=f"{user}{at}{host}").geturl())
            for host in hosts.split(",")
        ]

    @property
    def wanted_server(self) -> str:
        """What kind of server is wanted, of several, in libpq's words; nothing if it does not
        say."""
        return self._option("target_session_attrs", "PGTARGETSESSIONATTRS")

    @property
    def sslmode(self) -> str:
        """How the connection is encrypted and its server verified, in libpq's words."""
        return self._option("sslmode", "PGSSLMODE") or "prefer"

    @property
    def is_verified(self) -> bool:
        """Whether TLS verifies the server by the authority that signed its certificate."""
        if self.sslmode == "require":  # with a root certificate it is as verify-ca
            default = Path("~/.postgresql/root.crt").expanduser()
            return bool(self._option("sslrootcert", "PGSSLROOTCERT")) or default.exists()
        return self.sslmode in ("verify-ca", "verify-full")

    @property
    def tls_trouble(self) -> str | None:
        """The fault of the connection's encryption; `None` if it has none."""
        if not self.is_remote or self.is_verified:
            return None
        if self.sslmode == "disable":
            return (
                "sslmode=disable: anyone between this machine and the database can read and change "
                "all that is sent"
            )
        return (
            f"sslmode={self.sslmode} does not verify the server: anyone who answers in its place "
            "gets the password, and can read and change all that is sent; the next release refuses "
            "this"
        )

    def _option(self, name: str, variable: str) -> str:
        """The URL's option, else libpq's environment variable, else nothing."""
        given = dict(parse_qsl(urlsplit(self.dsn).query)).get(name)
        return given or os.environ.get(variable, "")

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.shown!r})"


def _check_hosts(parts: SplitResult) -> None:
    """Raise `ValueError` if a character of the password has ended the part with the hosts: what
    follows it would be taken for a port or a database, and shown in errors."""
    user, _, hosts = parts.netloc.rpartition("@")
    elsewhere = parts.path if "@" in parts.netloc else parts.path + parts.query
    if parts.fragment or "@" in user or "@" in elsewhere:
        raise ValueError("a part of the password")
    for host in hosts.split(","):
        if not (found := _HOST_PORT.fullmatch(host)) or int(found["port"] or 0) >= 2**16:
            raise ValueError("no host and port")
