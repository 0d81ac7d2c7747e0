"""What `TRACKER_DATABASE_URL` may say, and how to say it without the password."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from tracker.core.errors import SettingsError

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

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"DatabaseUrl({self.shown!r})"
