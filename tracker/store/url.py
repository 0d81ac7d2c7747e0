"""What `TRACKER_DATABASE_URL` may say, and how to say it without the password."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

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
_UNKNOWN_TO_ASYNCPG: Final = ("channel_binding",)


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """A database's address. `str()` of it holds no password."""

    dialect: Literal["sqlite", "postgresql"]
    dsn: str
    shown: str
    path: str = ""

    @classmethod
    def parse(cls, url: str, name: str = "TRACKER_DATABASE_URL") -> Self:
        """Read a URL. Raises `SettingsError` for any other kind, which does not repeat it but says
        what it was given as, its `name`."""
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
            query = [
                item
                for item in parse_qsl(parts.query, keep_blank_values=True)
                if item[0] not in _UNKNOWN_TO_ASYNCPG
            ]
            shown = make_url(dsn).set(query={}).render_as_string(hide_password=True)
        except (ValueError, ArgumentError):
            # Not `from` the cause: its words may hold the password.
            raise SettingsError(advice) from None
        return cls("postgresql", parts._replace(query=urlencode(query)).geturl(), shown)

    @property
    def missing(self) -> bool:
        """Whether it is a SQLite file that is not there."""
        return self.dialect == "sqlite" and not Path(self.path).exists()

    @property
    def is_remote(self) -> bool:
        """Whether another machine is connected to over a network."""
        if self.dialect == "sqlite":
            return False
        hosts = self._option("host", "PGHOST")
        named = urlsplit(self.dsn).netloc.rpartition("@")[2]
        if named:
            # Of each of several `host:port`; an address of IPv6 has brackets.
            hosts = ",".join(re.sub(r":\d*$", "", one) for one in named.split(","))
        return any(
            one and not unquote(one).startswith("/") and not is_loopback(one)
            for one in hosts.split(",")
        )

    @property
    def sslmode(self) -> str:
        """libpq's word for how far the connection is encrypted and its server verified."""
        return self._option("sslmode", "PGSSLMODE") or "prefer"

    @property
    def is_verified(self) -> bool:
        """Whether TLS makes sure that it is the right server, by whom its certificate is from."""
        if self.sslmode == "require":  # with a root certificate it is as verify-ca
            default = Path("~/.postgresql/root.crt").expanduser()
            return bool(self._option("sslrootcert", "PGSSLROOTCERT")) or default.exists()
        return self.sslmode in ("verify-ca", "verify-full")

    @property
    def tls_trouble(self) -> str | None:
        """What is wrong with the encryption of the connection; `None` where nothing is."""
        if not self.is_remote or self.is_verified:
            return None
        if self.sslmode == "disable":
            return (
                "sslmode=disable: whoever is between here and the database reads and changes all "
                "that is sent"
            )
        return (
            f"sslmode={self.sslmode} does not verify the server: whoever answers in its place gets "
            "the password, and reads and changes all that is sent; the next release refuses this"
        )

    def _option(self, name: str, variable: str) -> str:
        """What the URL says, else what libpq's environment variable says, else nothing."""
        given = dict(parse_qsl(urlsplit(self.dsn).query)).get(name)
        return given or os.environ.get(variable, "")

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.shown!r})"
