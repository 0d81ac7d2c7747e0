"""The settings: a field for each variable, with its default and its constraints."""

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from tracker.core.errors import SettingsError
from tracker.core.events import HANDLER_SECONDS, MOST_OPEN, EventType, RunFilter, check_secret
from tracker.core.net import CALLBACK_PATH, is_loopback_url
from tracker.core.schedule import Policy
from tracker.core.starts import Budget, Budgets, Period, parse_tag
from tracker.settings.tokens import SHORTEST, Scope, Token, Tokens
from tracker.settings.values import (
    check_cron,
    check_database_url,
    check_endpoint_url,
    check_root_url,
    parse_duration,
    passwords_in,
    split_secrets,
)


def _seconds(value: object) -> float:
    return parse_duration(value).total_seconds()


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _header_safe(secret: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", secret.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, because it travels in a header")
    return secret


def _public_root(url: str) -> str:
    root = check_root_url(url)
    if root.endswith(CALLBACK_PATH):
        raise ValueError(f"must be the root of this service, without {CALLBACK_PATH}")
    return root


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < SHORTEST:
        raise ValueError(
            f"is shorter than {SHORTEST} characters, so that it could be guessed: set it to what "
            "`openssl rand -hex 32` prints"
        )
    return secret


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError("must be 1 to 64 of A-Z a-z 0-9 . _ -")
    return name


def _one_token(token: SecretStr) -> SecretStr:
    if "," in token.get_secret_value():
        raise ValueError("must be one token: give each a table of [[tokens]] of its own")
    return token


def _moment(value: object) -> datetime:
    """A date or a time, of TOML or as text; a date means its first moment in UTC."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a date such as 2027-01-31")


def _standard_secret(secret: SecretStr) -> SecretStr:
    check_secret(secret.get_secret_value())
    return secret


def _dollars(value: object) -> object:
    """An amount with or without `$`; a TOML float stands for the decimal that is written there."""
    if isinstance(value, float):
        return repr(value)
    return value.strip().removeprefix("$") if isinstance(value, str) else value


def _repeated(names: Iterable[str | None]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _technique_id(technique_id: str) -> str:
    if not technique_id.startswith("tech_"):
        raise ValueError("must be a technique's id, tech_…: `tracker techniques list` shows them")
    return technique_id


def _tag(value: object) -> object:
    return parse_tag(value) if isinstance(value, str) else value


Key = Annotated[SecretStr, AfterValidator(_header_safe)]
AccessToken = Annotated[Key, AfterValidator(_long_enough)]
AccessTokens = Annotated[tuple[AccessToken, ...], BeforeValidator(split_secrets)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(split_secrets)]
StandardSecrets = Annotated[
    tuple[Annotated[SecretStr, AfterValidator(_standard_secret)], ...],
    BeforeValidator(split_secrets),
    Field(min_length=1),
]
Seconds = Annotated[float, BeforeValidator(_seconds)]
Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Dollars = Annotated[
    Decimal, BeforeValidator(_dollars), Field(gt=0, le=1_000_000_000, allow_inf_nan=False)
]
Format = Annotated[Literal["console", "json"], BeforeValidator(_lower)]
Level = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class WorkspaceSettings(_Model):
    """A FLORA workspace: its id if it is set, its API key, and the secrets that sign callbacks."""

    id: str | None = None
    api_key: Key | None = None
    webhook_secrets: Secrets = ()

    @property
    def clear_secrets(self) -> tuple[str, ...]:
        """The secrets that sign callbacks, in clear text."""
        return tuple(secret.get_secret_value() for secret in self.webhook_secrets)


class TokenSettings(_Model):
    """A table of `[[tokens]]`: an access token with its name in logs, scopes and expiry."""

    name: Annotated[str, AfterValidator(_name)]
    token: Annotated[AccessToken, AfterValidator(_one_token)]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    expires: Annotated[datetime | None, BeforeValidator(_moment)] = None


class _FilterSettings(_Model):
    workspace_id: Annotated[str, Field(min_length=1)] | None = None
    technique_id: Annotated[str, AfterValidator(_technique_id)] | None = None
    tag: Annotated[tuple[str, str], BeforeValidator(_tag)] | None = None


class BudgetSettings(_FilterSettings):
    """A table of `[[budgets]]`: USD for each period (UTC), for the runs that match all of
    `workspace_id`, `technique_id` and `tag`, as far as these are set."""

    usd: Dollars
    period: Period


class EventSettings(_FilterSettings):
    """Which events an endpoint or a handler gets: `events`, of the runs that match all of
    `workspace_id`, `technique_id`, `status` and `tag`, as far as these are set."""

    id: Annotated[str, AfterValidator(_name)]
    events: Annotated[tuple[EventType, ...], Field(min_length=1)] = (EventType.SETTLED,)
    status: Annotated[str, Field(min_length=1)] | None = None

    @property
    def filter(self) -> RunFilter:
        """The runs of which events are sent."""
        return RunFilter(
            workspace_id=self.workspace_id,
            technique_id=self.technique_id,
            status=self.status,
            tag=self.tag,
        )


class HandlerSettings(EventSettings):
    """A Python handler: at most `concurrency` calls at a time, each of `timeout` seconds."""

    concurrency: Annotated[int, Field(ge=1, le=1000)] = MOST_OPEN
    timeout: Annotated[float, Field(gt=0, le=86400)] = HANDLER_SECONDS


class EndpointSettings(EventSettings):
    """A table of `[[endpoints]]`: where events are sent.

    Every secret signs, so that a receiver may know either while they are rotated. Addresses that
    are not public, and `http`, need `allow_private`.
    """

    url: Annotated[str, AfterValidator(check_endpoint_url)] = Field(repr=False)
    secrets: StandardSecrets
    allow_private: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.url.startswith("http:") and not self.allow_private:
            raise ValueError(
                f"endpoint {self.id}: url must begin with https:// (http:// only with "
                "allow_private = true)"
            )
        return self

    @property
    def shown_url(self) -> str:
        """The URL without its query, which may hold a secret."""
        path, query, _ = self.url.partition("?")
        return f"{path}?…" if query else path


class Settings(_Model):
    """All settings, checked: `Settings(flora_api_key="sk_…", tracker_start_doubt="3m")`.

    They are named as the variables, in lower case, and take the same texts; README.md describes
    them. Nothing is read from the environment. A plain number is in seconds. `workspaces`,
    `tokens`, `budgets` and `endpoints` are lists of mappings with the fields of the file's tables.
    `repr` masks secrets and omits the database's URL, which may hold a password.

    Raises `SettingsError`, which names each wrong setting.
    """

    flora_api_key: Key | None = None
    flora_workspace_id: str | None = None
    flora_base_url: Annotated[str, AfterValidator(check_root_url)] = "https://app.flora.ai/api/v1"
    flora_webhook_secret: Secrets = ()
    tracker_database_url: Annotated[str, AfterValidator(check_database_url)] = Field(
        default="sqlite:///tracker.db", repr=False
    )
    tracker_public_url: Annotated[str, AfterValidator(_public_root)] | None = None
    tracker_api_token: AccessTokens = ()
    tracker_signature_tolerance: Annotated[Seconds, Field(ge=0)] = 900.0
    tracker_callback_grace: Annotated[Seconds, Field(ge=0)] = 30.0
    tracker_poll_interval: Annotated[Seconds, Field(gt=0)] = 5.0
    tracker_poll_interval_max: Annotated[Seconds, Field(gt=0)] = 300.0
    tracker_api_concurrency: Annotated[int, Field(ge=1, le=100)] = 2
    tracker_reconcile_cron: Annotated[str, AfterValidator(check_cron)] = "*/5 * * * *"
    tracker_start_doubt: Annotated[
        Duration, Field(ge=timedelta(seconds=1), le=timedelta(minutes=110))
    ] = timedelta(seconds=180)
    tracker_history_since: Annotated[Duration, Field(gt=timedelta(0))] = timedelta(days=7)
    tracker_cost_recheck: Annotated[Seconds, Field(gt=0)] = 60.0
    tracker_cost_give_up: Annotated[Duration, Field(gt=timedelta(0))] = timedelta(hours=24)
    tracker_budget_day: Dollars | None = None
    tracker_budget_month: Dollars | None = None
    tracker_docs_url: Annotated[str, AfterValidator(check_root_url)] | None = None
    tracker_log_format: Format | None = None
    tracker_log_level: Level = "info"
    workspaces: tuple[WorkspaceSettings, ...] = ()
    tokens: tuple[TokenSettings, ...] = ()
    budgets: tuple[BudgetSettings, ...] = ()
    endpoints: tuple[EndpointSettings, ...] = ()

    def __init__(self, **values: Any) -> None:
        """Check the values."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            from tracker.settings.load import faults  # noqa: PLC0415 - it imports this module

            message = faults(error, {})
        else:
            return
        # Raised outside of `except`: a chained validation error would carry the values.
        raise SettingsError(message)

    vars(__init__)["__pydantic_base_init__"] = (
        True  # for texts alone: `model_validate` goes past it
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tracker_poll_interval_max < self.tracker_poll_interval:
            raise ValueError(
                "TRACKER_POLL_INTERVAL_MAX must not be shorter than TRACKER_POLL_INTERVAL "
                f"({self.tracker_poll_interval:g} s)"
            )
        if self.tracker_cost_give_up.total_seconds() < self.tracker_cost_recheck:
            raise ValueError(
                "TRACKER_COST_GIVE_UP must not be shorter than TRACKER_COST_RECHECK "
                f"({self.tracker_cost_recheck:g} s)"
            )
        ids = [workspace.id for workspace in self.all_workspaces]
        if len(ids) > 1 and None in ids:
            raise ValueError(
                "several workspaces are set, so each needs an id: FLORA_WORKSPACE_ID for the one "
                "of FLORA_API_KEY, id under each [[workspaces]]"
            )
        if twice := _repeated(ids):
            raise ValueError(
                f"workspace {twice} is set more than once: keep one of them "
                "(FLORA_WORKSPACE_ID and each [[workspaces]] count)"
            )
        if twice := _repeated(one.name for one in self.all_budgets.known(filter(None, ids))):
            raise ValueError(
                f"there are two budgets {twice}: remove one of them (TRACKER_BUDGET_DAY and "
                "TRACKER_BUDGET_MONTH apply to each workspace)"
            )
        if twice := _repeated(token.name for token in self.access_tokens):
            raise ValueError(f"two [[tokens]] have the name {twice}: names must differ")
        if _repeated(token.value for token in self.access_tokens):
            raise ValueError(
                "one token is set twice: those of TRACKER_API_TOKEN and [[tokens]] must all differ"
            )
        if twice := _repeated(endpoint.id for endpoint in self.endpoints):
            raise ValueError(f"two [[endpoints]] have the id {twice}: ids must differ")
        return self

    @property
    def top_workspace(self) -> WorkspaceSettings:
        """The workspace of the top-level names, even where nothing is set for it."""
        return WorkspaceSettings.model_construct(
            id=self.flora_workspace_id,
            api_key=self.flora_api_key,
            webhook_secrets=self.flora_webhook_secret,
        )

    @property
    def all_workspaces(self) -> tuple[WorkspaceSettings, ...]:
        """The top-level workspace if it is set or the only one, then those of `[[workspaces]]`."""
        top = self.top_workspace
        is_set = top.id or top.api_key or top.webhook_secrets
        return (top, *self.workspaces) if is_set or not self.workspaces else self.workspaces

    def place_of(self, workspace: WorkspaceSettings) -> str:
        """The name of a workspace's place in the settings. That of the top-level settings keeps it
        when its id is set later."""
        return "default" if workspace.id in (None, self.flora_workspace_id) else workspace.id

    @property
    def all_budgets(self) -> Budgets:
        """The budgets of each workspace, and those of `[[budgets]]`."""
        periods = {Period.DAY: self.tracker_budget_day, Period.MONTH: self.tracker_budget_month}
        return Budgets(
            of_each_workspace=tuple(
                Budget(usd=usd, period=period) for period, usd in periods.items() if usd is not None
            ),
            others=tuple(Budget(**dict(one)) for one in self.budgets),
        )

    @property
    def access_tokens(self) -> Tokens:
        """The tokens of `TRACKER_API_TOKEN`, with all scopes, then those of `[[tokens]]`."""
        everything = frozenset({Scope.ADMIN})
        unrestricted = [
            Token(
                name="TRACKER_API_TOKEN" if number == 1 else f"TRACKER_API_TOKEN-{number}",
                value=token.get_secret_value(),
                scopes=everything,
            )
            for number, token in enumerate(self.tracker_api_token, start=1)
        ]
        restricted = [
            Token(
                name=one.name,
                value=one.token.get_secret_value(),
                scopes=one.scopes,
                expires=one.expires,
            )
            for one in self.tokens
        ]
        return Tokens([*unrestricted, *restricted])

    @property
    def flora_is_local(self) -> bool:
        """Whether FLORA is on this machine, as only the simulator is: so are its files."""
        return is_loopback_url(self.flora_base_url)

    @property
    def is_public(self) -> bool:
        """Whether `TRACKER_PUBLIC_URL` is an address that other machines reach."""
        return self.tracker_public_url is not None and not is_loopback_url(self.tracker_public_url)

    @property
    def policy(self) -> Policy:
        """The intervals between polls of a run."""
        return Policy(
            grace=timedelta(seconds=self.tracker_callback_grace),
            interval=timedelta(seconds=self.tracker_poll_interval),
            interval_max=timedelta(seconds=self.tracker_poll_interval_max),
            cost_recheck=timedelta(seconds=self.tracker_cost_recheck),
            cost_give_up=self.tracker_cost_give_up,
        )

    @property
    def callback_url(self) -> str | None:
        """The URL for callbacks; `None` where FLORA cannot reach this service."""
        return self.tracker_public_url and self.tracker_public_url + CALLBACK_PATH

    @property
    def secret_values(self) -> frozenset[str]:
        """All secrets in clear, with the database's password and the queries of endpoints, for the
        log to redact."""
        secrets: list[SecretStr | None] = [
            *self.tracker_api_token,
            *(one.token for one in self.tokens),
        ]
        for workspace in self.all_workspaces:
            secrets += [workspace.api_key, *workspace.webhook_secrets]
        queries = {endpoint.url.partition("?")[2] for endpoint in self.endpoints} - {""}
        for endpoint in self.endpoints:
            secrets += endpoint.secrets
        clear = {secret.get_secret_value() for secret in secrets if secret is not None}
        return frozenset(clear | queries) | passwords_in(self.tracker_database_url)

    def require_api_key(self) -> None:
        """Raise `SettingsError` where no workspace has an API key."""
        if not any(workspace.api_key for workspace in self.all_workspaces):
            raise SettingsError(
                "FLORA_API_KEY is not set: set it to your workspace's API key (or api_key under "
                "[[workspaces]] in the file that TRACKER_CONFIG names)"
            )


_given = inspect.signature(Settings)
# `help(Settings)` shows names and defaults, not the addresses of validators.
Settings.__signature__ = _given.replace(
    parameters=[one.replace(annotation=one.empty) for one in _given.parameters.values()]
)
