"""Secrets that change in their files are in force without a restart, and nothing else is."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from tracker.operations.telemetry import configure_logs
from tracker.settings import Rotation, Settings, read_settings

CONFIG = """
flora_workspace_id = "ws_1"
flora_api_key = "file:key"
flora_webhook_secret = "file:secret"
tracker_api_token = "file:token"
{more}
"""


class _Files:
    """A configuration and its secrets, which a test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(key="sk_1", secret="whsec_1", token="the-first-token-of-all")
        self.configure()
        self.environ = {"TRACKER_CONFIG": str(folder / "tracker.toml")}
        loaded = read_settings(self.environ)
        self.rotation = Rotation(loaded.settings, loaded, lambda: read_settings(self.environ))
        self.seen: list[Settings] = []
        self.rotation.follow(self.seen.append)

    def configure(self, more: str = "") -> None:
        """Write the configuration."""
        self.write(**{"tracker.toml": CONFIG.format(more=more)})

    def write(self, **texts: str) -> None:
        """Put each text in place as secret stores do, at once."""
        for name, text in texts.items():
            new = self.folder / f"{name}.new"
            new.write_text(text)
            new.rename(self.folder / name)

    @property
    def secrets(self) -> set[str]:
        """What is in force now."""
        return set(self.rotation.settings.secret_values)


@pytest.fixture
def files(tmp_path: Path) -> _Files:
    """The files of a deployment."""
    return _Files(tmp_path)


def test_a_secret_that_changes_is_in_force(files: _Files) -> None:
    """A key, signing secrets and a token, each from its own file; who follows is told once."""
    assert not files.rotation.check()
    files.write(secret="whsec_2 whsec_1")
    assert files.rotation.check()
    assert files.secrets == {"sk_1", "whsec_1", "whsec_2", "the-first-token-of-all"}
    files.write(key="sk_2", token="the-second-token-of-all")
    assert files.rotation.check()
    assert files.secrets == {"sk_2", "whsec_1", "whsec_2", "the-second-token-of-all"}
    assert not files.rotation.check()
    assert len(files.seen) == 3  # once at first


def test_tokens_and_secrets_in_the_file_itself_count_too(files: _Files) -> None:
    """A token that is added there, or a secret that stands in it, needs no restart."""
    files.configure('[[tokens]]\nname = "new"\ntoken = "the-new-readers-token"\nscopes = ["read"]')
    assert files.rotation.check()
    assert [token.name for token in files.rotation.settings.access_tokens] == [
        "TRACKER_API_TOKEN",
        "new",
    ]
    files.configure()
    assert files.rotation.check()
    assert len(files.rotation.settings.access_tokens) == 1


def test_what_is_no_secret_needs_a_restart_and_is_named(
    files: _Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another setting, and another workspace, do not count yet; the log says so."""
    configure_logs(format="json", level="info", secrets=())
    files.configure('tracker_poll_interval = 7\n[[workspaces]]\nid = "ws_2"\napi_key = "sk_9"')
    assert not files.rotation.check()
    assert files.rotation.settings.tracker_poll_interval == 5
    assert len(files.rotation.settings.all_workspaces) == 1
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["event"] == "settings.restart_needed"
    assert line["settings"] == ["tracker_poll_interval", "workspaces"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"token": "short"}, "shorter than 16"),
        ({"token": ""}, "is empty"),
        ({"key": "sk with spaces"}, "printable ASCII"),
        ({"tracker.toml": "flora_api_key ="}, "not valid TOML"),
        ({"tracker.toml": ""}, "no token is set any more"),
    ],
)
def test_what_is_wrong_changes_nothing(
    files: _Files, broken: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The secrets before stay in force, the log says why, once, and never a value."""
    configure_logs(format="json", level="info", secrets=())
    before = files.secrets
    files.write(**broken)
    assert not files.rotation.check()
    assert not files.rotation.check()
    assert files.secrets == before
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["event"] == "settings.not_reloaded"
    assert said in line["reason"]
    assert said in (files.rotation.stale or "")
    files.configure()
    files.write(token="the-third-token-of-all", key="sk_3")
    assert files.rotation.check()
    assert {"sk_3", "the-third-token-of-all"} <= files.secrets
    assert files.rotation.stale is None
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["settings"] == ["flora_api_key", "tracker_api_token"]
    assert (line["tokens"], line["signing_secrets"]) == (1, 1)


def test_a_file_that_is_away_for_a_moment_changes_nothing(files: _Files) -> None:
    """While a secret store replaces it the old secret stays; the new one counts when it is back."""
    (files.folder / "secret").unlink()
    assert not files.rotation.check()
    assert "whsec_1" in files.secrets
    files.write(secret="whsec_3")
    assert files.rotation.check()
    assert "whsec_3" in files.secrets


@pytest.mark.parametrize("left", ["", " , "])
def test_the_last_signing_secret_is_not_taken_away(files: _Files, left: str) -> None:
    """A file that is read while it is being written must not refuse callbacks."""
    files.write(secret=left)
    assert not files.rotation.check()
    files.write(**{"tracker.toml": 'tracker_api_token = "file:token"\n'})
    files.rotation.check()
    assert "whsec_1" in files.secrets


def test_what_can_be_read_only_once_is_not_read_again(tmp_path: Path) -> None:
    """A pipe, as a shell makes it of a command's output, would be empty, or never end."""
    text = 'flora_webhook_secret = "whsec_1"\n'
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    environ = {"TRACKER_CONFIG": f"/dev/fd/{reading}"}
    loaded = read_settings(environ)
    rotation = Rotation(loaded.settings, loaded, lambda: read_settings(environ))
    assert not rotation.reload()
    os.close(reading)
    assert "whsec_1" in rotation.settings.secret_values


def test_who_follows_late_misses_nothing(files: _Files) -> None:
    """What changed while a service was being opened is in force when it is open."""
    files.write(secret="whsec_2")
    assert files.rotation.check()
    late: list[Settings] = []
    files.rotation.follow(late.append)
    assert "whsec_2" in late[0].secret_values


async def test_what_was_wrong_is_tried_again(files: _Files) -> None:
    """A file that is named before it is there counts once it is, and one fault ends nothing."""
    async with files.rotation.watched():
        files.configure('[[tokens]]\nname = "new"\ntoken = "file:later"\nscopes = ["read"]')
        await eventually(lambda: files.rotation._failure)
        files.write(later="the-later-readers-token")
        await eventually(lambda: "the-later-readers-token" in files.secrets)


async def test_a_service_looks_by_itself_and_at_a_signal(files: _Files) -> None:
    """Once a second whether a file has changed, and on SIGHUP at everything."""
    with files.rotation.reloaded_on_hangup():
        async with files.rotation.watched():
            files.write(secret="whsec_4")
            await eventually(lambda: "whsec_4" in files.secrets)
        files.environ["FLORA_WEBHOOK_SECRET"] = "whsec_5"  # no file names it
        assert not files.rotation.check()
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: "whsec_5" in files.secrets)


def test_settings_that_came_from_no_file_stay() -> None:
    """What was given by hand, or by the environment alone, has nothing to be read again."""
    rotation = Rotation(Settings(flora_webhook_secret="whsec_1"))
    assert not rotation.check()
    assert not rotation.reload()
