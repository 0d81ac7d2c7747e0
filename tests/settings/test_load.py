"""Where settings come from: environment over file, references, and errors that say where."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from tracker.core.errors import SettingsError
from tracker.settings import Settings, load_settings
from tracker.settings.tokens import Scope


def clear(secrets: tuple[SecretStr, ...]) -> list[str]:
    """Secrets as text."""
    return [secret.get_secret_value() for secret in secrets]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The path of a configuration file that a test writes."""
    return tmp_path / "tracker.toml"


def refusal(environ: dict[str, str]) -> str:
    """What `load_settings` says about an environment that is wrong."""
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    return str(caught.value)


def test_without_anything_set_the_documented_defaults_hold() -> None:
    """The defaults are those that the interface documents."""
    settings = load_settings({})
    assert settings.flora_api_key is None
    assert settings.flora_base_url == "https://app.flora.ai/api/v1"
    assert settings.tracker_database_url == "sqlite:///tracker.db"
    assert settings.tracker_signature_tolerance == 900
    assert settings.tracker_api_concurrency == 2
    assert settings.tracker_reconcile_cron == "*/5 * * * *"
    assert settings.tracker_history_since == timedelta(days=7)
    assert settings.tracker_log_format is None
    assert settings.tracker_log_level == "info"
    assert settings.callback_url is None
    assert settings.policy.grace == timedelta(seconds=30)
    assert settings.policy.interval == timedelta(seconds=5)
    assert settings.policy.interval_max == timedelta(seconds=300)


def test_the_environment_is_read() -> None:
    """Each variable lands in the field of its name."""
    settings = load_settings(
        {
            "FLORA_API_KEY": "sk_live_1",
            "FLORA_WORKSPACE_ID": "ws_1",
            "FLORA_BASE_URL": "http://127.0.0.1:8090/api/v1/",
            "FLORA_WEBHOOK_SECRET": "whsec_a, whsec_b  whsec_c,whsec_a",
            "TRACKER_PUBLIC_URL": "https://example.org/flora/",
            "TRACKER_POLL_INTERVAL": "30s",
            "TRACKER_POLL_INTERVAL_MAX": "10m",
            "TRACKER_HISTORY_SINCE": "24h",
            "TRACKER_RECONCILE_CRON": "0  3 * * SUN",
            "TRACKER_LOG_FORMAT": "JSON",
        }
    )
    (workspace,) = settings.all_workspaces
    assert workspace.id == "ws_1"
    assert workspace.api_key == SecretStr("sk_live_1")
    assert clear(workspace.webhook_secrets) == ["whsec_a", "whsec_b", "whsec_c"]
    assert settings.flora_base_url == "http://127.0.0.1:8090/api/v1"
    assert settings.callback_url == "https://example.org/flora/callbacks/flora"
    assert settings.tracker_poll_interval == 30
    assert settings.policy.interval_max == timedelta(minutes=10)
    assert settings.tracker_history_since == timedelta(hours=24)
    assert settings.tracker_reconcile_cron == "0 3 * * sun"
    assert settings.tracker_log_format == "json"


def test_a_variable_set_to_nothing_is_not_set() -> None:
    """Empty and blank variables, as deployment templates leave them, count as missing."""
    empty = {name.upper(): "" for name in Settings.model_fields}
    assert load_settings(empty) == load_settings({})
    assert load_settings({"TRACKER_CONFIG": " ", "FLORA_API_KEY": "\n"}) == load_settings({})


def test_the_environment_wins_over_the_file(config: Path) -> None:
    """Where both set a name the environment counts; the rest of the file still does."""
    config.write_text(
        'flora_workspace_id = "ws_file"\ntracker_poll_interval = 7\n'
        'tracker_history_since = "2d"\nflora_api_key = "env:NOT_SET"\n'
    )
    settings = load_settings(
        {
            "TRACKER_CONFIG": str(config),
            "FLORA_WORKSPACE_ID": "ws_env",
            "FLORA_API_KEY": "sk_env",  # so the file's reference is not even looked up
        }
    )
    assert settings.flora_workspace_id == "ws_env"
    assert settings.tracker_poll_interval == 7
    assert settings.tracker_history_since == timedelta(days=2)


def test_a_byte_order_mark_is_no_part_of_a_value(config: Path) -> None:
    """Programs of Windows begin files with one. A signing secret with it matches nothing."""
    config.write_text('flora_webhook_secret = "file:hook"', encoding="utf-8-sig")
    config.with_name("hook").write_text("whsec_one\r\n", encoding="utf-8-sig")
    settings = load_settings({"TRACKER_CONFIG": str(config)})
    assert settings.top_workspace.clear_secrets == ("whsec_one",)


def test_values_of_the_file_may_stand_elsewhere(config: Path) -> None:
    """`env:NAME` and `file:PATH` are read from there; a path counts from the file's folder."""
    (config.parent / "secrets").mkdir()
    (config.parent / "secrets" / "hooks").write_text("whsec_1\nwhsec_2\n")
    absolute = config.parent / "token"
    absolute.write_text("hunter2-hunter2-hunter2\n")
    config.write_text(
        f'flora_api_key = "env:KEY_A"\ntracker_api_token = "file:{absolute}"\n'
        'flora_workspace_id = "ws_a"\n'
        "[[workspaces]]\n"
        'id = "ws_b"\napi_key = "env:KEY_B"\n'
        'webhook_secrets = ["file:secrets/hooks", "env:HOOK"]\n'
    )
    settings = load_settings(
        {"TRACKER_CONFIG": str(config), "KEY_A": "sk_a", "KEY_B": "sk_b", "HOOK": "whsec_3"}
    )
    first, second = settings.all_workspaces
    assert (first.id, first.api_key) == ("ws_a", SecretStr("sk_a"))
    assert (second.id, second.api_key) == ("ws_b", SecretStr("sk_b"))
    assert clear(second.webhook_secrets) == ["whsec_1", "whsec_2", "whsec_3"]
    assert settings.tracker_api_token == (SecretStr("hunter2-hunter2-hunter2"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('flora_api_key = "env:NOWHERE"', "flora_api_key in {path}: the environment variable NOW"),
        (
            'flora_api_key = "file:gone"',
            "flora_api_key in {path}: {folder}/gone cannot be read: No",
        ),
        ('flora_api_key = "file:."', "cannot be read: Is a directory"),
        (
            'flora_webhok_secret = "x"',
            "flora_webhok_secret in {path}: unknown key; did you mean fl",
        ),
        ("tracker_config = 'x'", "tracker_config in {path}: unknown key"),
        ("flora_api_key = 5", "flora_api_key in {path} must be a valid string"),
        ("tracker_poll_interval = nan", "tracker_poll_interval in {path} must be a duration"),
        (
            '[[workspaces]]\nid = "a"\n[[workspaces]]\nid = "b"\napi_keys = "x"',
            "workspaces[1].api_keys in {path}: unknown key; did you mean api_key?",
        ),
        (
            '[workspaces]\nid = "ws_1"',
            "workspaces in {path} must be tables: begin each with [[workspaces]]",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = "read"',
            "tokens[0].scopes in {path} must be a list",
        ),
        ('[[workspaces]]\nid = "a"\n[[workspaces]]\nid = "a"', "workspace a is set more than once"),
        ('[[workspaces]]\nid = "a"\n[[workspaces]]\n', "each needs an id"),
        ('flora_api_key = "sk"\n[[workspaces]]\nid = "a"', "FLORA_WORKSPACE_ID for the one"),
        ("flora_api_key = ", "TRACKER_CONFIG names {path}, which is not valid TOML"),
        ("tracker_api_token = 'a'", "tracker_api_token[0] in {path} is shorter than 16 characters"),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscope = ["read"]',
            "tokens[0].scope in {path}: unknown key; did you mean scopes?",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["write"]',
            "must be 'read', 'metrics', 'start' or 'admin'",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = []',
            "tokens[0].scopes in {path}",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789,abcdef"\nscopes = ["read"]',
            "tokens[0].token in {path} must be one token",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["read"]\n'
            "expires = 20300101",
            "tokens[0].expires in {path} must be a date such as 2027-01-31",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["read"]\n'
            "expires = 9999-12-31T23:00:00-12:00",
            "must be a date such as 2027-01-31",
        ),
        ("tracker_budget_day = 0", "tracker_budget_day in {path} must be greater than 0"),
        ('tracker_budget_day = "5 EUR"', "tracker_budget_day in {path} must be a valid decimal"),
        (
            '[[budgets]]\nusd = 5\nperiod = "week"',
            "budgets[0].period in {path} must be 'day',",
        ),
        ("[[budgets]]\nusd = nan\nperiod = 'day'", "budgets[0].usd in {path} must be a finite"),
        (
            '[[budgets]]\nusd = 5\nperiod = "day"\ntag = "team"',
            "budgets[0].tag in {path} 'team' is not KEY=VALUE",
        ),
        (
            '[[budgets]]\nusd = 5\nperiod = "day"\ntechnique_id = "icon-pack"',
            "budgets[0].technique_id in {path} must be a technique's id, tech_",
        ),
        (
            '[[budgets]]\nusd = 5\nperiod = "day"\nteam = "a"',
            "budgets[0].team in {path}: unknown key",
        ),
        (
            2 * '[[budgets]]\nusd = 5\nperiod = "day"\ntag = "team=a"\n',
            "there are two budgets day:tag=team=a",
        ),
        ("tracker_api_token = ' , '", "tracker_api_token in {path} holds nothing but commas"),
        ("flora_api_key = 'file:~nosuchuser/key'", "~nosuchuser/key cannot be read: No such file"),
        (
            '[[tokens]]\nname = "a b"\ntoken = "0123456789abcdef"\nscopes = ["read"]',
            "tokens[0].name in {path} must be 1 to 64 of",
        ),
        (
            'tracker_api_token = "0123456789abcdef"\n'
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["read"]',
            "one token is set twice",
        ),
        (
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["read"]\n'
            '[[tokens]]\nname = "a"\ntoken = "0123456789abcdeg"\nscopes = ["read"]',
            "two [[tokens]] have the name a",
        ),
    ],
)
def test_a_fault_in_the_file_is_named_with_its_key_and_the_file(
    config: Path, text: str, said: str
) -> None:
    """Whoever reads the message knows which line of which file to fix."""
    config.write_text(text)
    message = refusal({"TRACKER_CONFIG": str(config)})
    assert said.format(path=config, folder=config.parent) in message


def test_a_file_that_cannot_be_read_is_named(config: Path) -> None:
    """A missing, a wrong and an unreadable file are each told by the variable that names them."""
    assert "TRACKER_CONFIG" in refusal({"TRACKER_CONFIG": str(config)})
    assert "No such file" in refusal({"TRACKER_CONFIG": str(config)})
    config.write_bytes(b'flora_api_key = "\xff"')
    assert "not UTF-8" in refusal({"TRACKER_CONFIG": str(config)})


def test_all_faults_are_told_at_once() -> None:
    """One start is enough to learn everything that is wrong."""
    message = refusal({"TRACKER_API_CONCURRENCY": "two", "TRACKER_LOG_LEVEL": "loud"})
    assert "TRACKER_API_CONCURRENCY must be a valid integer" in message
    assert "TRACKER_LOG_LEVEL must be 'debug', 'info'" in message


def test_errors_never_hold_a_secret(config: Path) -> None:
    """Neither the message nor anything that hangs on the exception shows a value that was wrong."""
    secret = "hunter2 hunter2"
    config.write_text('flora_api_key = "env:KEY"\n[[workspaces]]\napi_key = "env:KEY"\nx = "y"')
    environments = [
        {"FLORA_API_KEY": secret},
        {"TRACKER_API_TOKEN": secret},
        {"TRACKER_DATABASE_URL": f"mysql://u:{secret}@h/d"},
        {"TRACKER_PUBLIC_URL": "https://u:hunter2@h"},
        {"TRACKER_CONFIG": str(config), "KEY": secret},
    ]
    for environ in environments:
        with pytest.raises(SettingsError) as caught:
            load_settings(environ)
        assert "hunter2" not in str(caught.value)
        chain: BaseException | None = caught.value
        while chain is not None:
            assert "hunter2" not in repr(chain)
            assert not hasattr(chain, "errors")  # a validation error would hand out its input
            chain = chain.__cause__ or chain.__context__


def test_a_settings_value_shows_no_secret() -> None:
    """`repr` masks keys, secrets and token, and leaves the database's address out."""
    settings = load_settings(
        {
            "FLORA_API_KEY": "sk_live_hunter2",
            "FLORA_WEBHOOK_SECRET": "whsec_hunter2",
            "TRACKER_API_TOKEN": "hunter2-hunter2-hunter2",
            "TRACKER_DATABASE_URL": "postgresql://u:hun%74er2@h/d?password=third",
        }
    )
    assert "hunter2" not in repr(settings)
    assert "er2@h" not in repr(settings)
    assert settings.secret_values == {
        "sk_live_hunter2",
        "whsec_hunter2",
        "hunter2-hunter2-hunter2",
        "hunter2",
        "hun%74er2",
        "third",
    }


def test_settings_take_nothing_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Settings` made by hand is what it was given; only `load_settings` looks around."""
    monkeypatch.setenv("FLORA_API_KEY", "sk_live_1")
    assert Settings().flora_api_key is None
    assert load_settings().flora_api_key == SecretStr("sk_live_1")


def test_there_is_always_a_workspace() -> None:
    """Without a key the receiver has a workspace all the same; asking FLORA is what cannot be."""
    settings = load_settings({})
    (workspace,) = settings.all_workspaces
    assert (workspace.id, workspace.api_key, workspace.webhook_secrets) == (None, None, ())
    with pytest.raises(SettingsError, match="FLORA_API_KEY is not set"):
        settings.require_api_key()
    load_settings({"FLORA_API_KEY": "sk_1"}).require_api_key()


def test_tokens_are_read(config: Path) -> None:
    """Those of `TRACKER_API_TOKEN` may do everything; a day is its first moment, UTC."""
    config.write_text(
        '[[tokens]]\nname = "prometheus"\ntoken = "env:SCRAPER"\nscopes = ["metrics"]\n'
        '[[tokens]]\nname = "producer"\ntoken = "the-producers-token"\n'
        'scopes = ["read"]\nexpires = 2027-01-31\n'
        '[[tokens]]\nname = "robot"\ntoken = "the-robots-token-1"\n'
        'scopes = ["start", "metrics"]\nexpires = "2027-01-31T12:00:00+02:00"\n'
    )
    first, second, prometheus, producer, robot = load_settings(
        {
            "TRACKER_CONFIG": str(config),
            "SCRAPER": "the-scrapers-token",
            "TRACKER_API_TOKEN": "the-first-one-of-all, the-second-one-of-all",
        }
    ).access_tokens
    assert (first.name, second.name) == ("TRACKER_API_TOKEN", "TRACKER_API_TOKEN-2")
    assert all(first.allows(scope) and second.allows(scope) for scope in Scope)
    assert [scope for scope in Scope if prometheus.allows(scope)] == [Scope.METRICS]
    assert [scope for scope in Scope if producer.allows(scope)] == [Scope.READ]
    assert [scope for scope in Scope if robot.allows(scope)] == [
        Scope.READ,
        Scope.METRICS,
        Scope.START,
    ]
    assert prometheus.value == "the-scrapers-token"
    assert (prometheus.expires, producer.expires) == (None, datetime(2027, 1, 31, tzinfo=UTC))
    assert robot.expires == datetime(2027, 1, 31, 10, tzinfo=UTC)
    assert "token" not in repr(robot).replace("Token(", "")


@pytest.mark.parametrize("token", ["a", "0123456789abcde", "0123456789abcdef,a"])
def test_a_short_token_is_refused(token: str) -> None:
    """One that can be guessed is no token; the message says what to set it to."""
    message = refusal({"TRACKER_API_TOKEN": token})
    assert message.startswith("TRACKER_API_TOKEN is shorter than 16 characters")
    assert "openssl rand -hex 32" in message
