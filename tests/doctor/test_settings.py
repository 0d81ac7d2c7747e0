"""The settings: what they show by themselves."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.doctor.conftest import Report
from tests.e2e.processes import open_sandbox
from tracker.operations.doctor import Level
from tracker.operations.doctor.settings import check_settings
from tracker.settings import read_settings

SECRET = "whsec_0123456789"
NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
PUBLIC = "https://tracker.example.com"


def _checked(**environ: str) -> Report:
    loaded = read_settings(environ)
    found = check_settings(loaded.settings, loaded.sources, loaded.unknown, now=NOW)
    return Report({one.name: one for one in found})


def test_an_unknown_setting_is_a_problem_with_a_suggestion(tmp_path: Path) -> None:
    """What has a prefix of the settings and is none is named, without its value; what other tools
    set with these prefixes, and what the configuration file refers to, is not."""
    file = tmp_path / "tracker.toml"
    file.write_text('flora_api_key = "env:FLORA_KEY_OF_SPRING"\n')
    others = {
        "TRACKER_CONFIG": str(file),
        "FLORA_KEY_OF_SPRING": "sk_live_1",
        "TRACKER_POSTGRES_PASSWORD": "x",
        "TRACKER_TEST_DATABASE_URL": "x",
        "FLORA_TRACKER_SERVICE_HOST": "10.0.0.1",
        "TRACKER_PORT": "tcp://10.0.0.1:8080",
        "TRACKER_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert _checked(**others).level("settings") is Level.OK
    found = _checked(**others | {"TRACKER_POLL_INTERVALL": "5", "FLORA_COLOUR": "sk_live_2"})
    assert found.level("settings") is Level.FAILED
    seen = found["settings"].seen
    assert "nknown setting TRACKER_POLL_INTERVALL: did you mean TRACKER_POLL_INTERVAL?" in seen
    assert "nknown setting FLORA_COLOUR: README.md lists the settings." in seen
    assert "sk_live" not in seen


@pytest.mark.parametrize(
    ("mode", "text", "level"),
    [
        (0o644, 'flora_api_key = "sk_live_0123456789"', Level.WARNING),
        (
            0o644,
            '[[tokens]]\nname = "a"\nscopes = ["read"]\ntoken = "0123456789abcdef"',
            Level.WARNING,
        ),
        (0o640, 'flora_api_key = "sk_live_0123456789"', Level.OK),
        (0o644, 'flora_api_key = "env:KEY_OF_SPRING"', Level.OK),
    ],
)
def test_secrets_that_everyone_can_read_are_a_problem(
    tmp_path: Path, mode: int, text: str, level: Level
) -> None:
    """Other users of the machine; a file that only refers to secrets is nobody's secret."""
    file = tmp_path / "tracker.toml"
    file.write_text(text)
    file.chmod(mode)
    found = _checked(TRACKER_CONFIG=str(file), KEY_OF_SPRING="sk_live_0123456789")
    assert found.level("settings") is level
    assert (f"`chmod o= {file}`" in (found["settings"].advice or "")) == (level is Level.WARNING)
    assert "0123456789" not in found["settings"].seen


async def test_a_service_warns_of_an_unknown_setting_once(tmp_path: Path, sqlite_url: str) -> None:
    """At its start; it runs all the same."""
    async with open_sandbox(tmp_path, sqlite_url) as sandbox:
        server = await sandbox.serve(FLORA_API_KEY="", TRACKER_LOG_LEVL="debug")
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        (told,) = [one for one in lines if one["event"] == "settings.unknown"]
        assert told["level"] == "warning"
        assert told["error"].endswith("TRACKER_LOG_LEVL: did you mean TRACKER_LOG_LEVEL?")


def test_the_source_of_each_setting_is_reported(tmp_path: Path) -> None:
    """The environment, the file, or nowhere: the last as where sudo passed none on."""
    file = tmp_path / "tracker.toml"
    file.write_text('flora_webhook_secret = "whsec_1"\n')
    file.chmod(0o600)
    found = _checked(TRACKER_CONFIG=str(file), FLORA_API_KEY="sk_1")["settings"]
    assert found.level is Level.OK
    assert "From the environment: FLORA_API_KEY" in found.seen
    assert f"From {file}: FLORA_WEBHOOK_SECRET" in found.seen
    nothing = _checked()["settings"]
    assert nothing.level is Level.WARNING
    assert "sudo" in nothing.advice


@pytest.mark.parametrize(
    ("environ", "level", "seen"),
    [
        ({}, Level.WARNING, "would be refused"),
        ({"TRACKER_PUBLIC_URL": PUBLIC}, Level.FAILED, "every callback is refused"),
        ({"FLORA_WEBHOOK_SECRET": SECRET}, Level.OK, "One signing secret"),
        ({"FLORA_WEBHOOK_SECRET": f"{SECRET} {SECRET}1"}, Level.OK, "2 signing secrets"),
        (
            {"FLORA_WEBHOOK_SECRET": f"{SECRET} sk_live_1"},
            Level.WARNING,
            "Secret 2 begins with sk_",
        ),
        ({"FLORA_WEBHOOK_SECRET": "0123456789"}, Level.WARNING, "does not begin with whsec_"),
    ],
)
def test_secrets_are_judged_by_their_number_and_their_shape(
    environ: dict[str, str], level: Level, seen: str
) -> None:
    """None, one, several, and those that cannot be FLORA's; none is shown."""
    found = _checked(**environ)["secrets"]
    assert found.level is level
    assert seen in found.seen
    assert "0123456789" not in found.seen + found.advice


@pytest.mark.parametrize(
    ("seconds", "level"), [("900", "ok"), ("300", "warning"), ("0", "warning")]
)
def test_a_tolerance_that_refuses_the_last_attempt_is_a_warning(seconds: str, level: str) -> None:
    """FLORA's SDK has 300 s, which is too short; 0 checks no time at all."""
    assert _checked(TRACKER_SIGNATURE_TOLERANCE=seconds)["tolerance"].level == level


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, "ok"),
        ({"TRACKER_PUBLIC_URL": "http://localhost:8080"}, "ok"),
        ({"TRACKER_PUBLIC_URL": PUBLIC}, "failed"),
        ({"TRACKER_API_TOKEN": "a" * 32, "TRACKER_PUBLIC_URL": PUBLIC}, "ok"),
    ],
)
def test_a_service_that_is_public_needs_a_token(environ: dict[str, str], level: str) -> None:
    """Without one it refuses all requests; if only this machine is served none is needed."""
    assert _checked(**environ)["token"].level == level


@pytest.mark.parametrize(
    ("expires", "level", "seen"),
    [
        ("2027-06-01", "ok", "grafana (read)"),
        ("2027-03-10", "warning", "Expires within 14 days: grafana"),
        ("2027-03-01", "warning", "Expired and refused: grafana"),
    ],
)
def test_a_token_is_renewed_before_it_expires(
    tmp_path: Path, expires: str, level: str, seen: str
) -> None:
    """One that expires soon, or has, is named; its value is not shown."""
    file = tmp_path / "tracker.toml"
    file.write_text(
        f'[[tokens]]\nname = "grafana"\ntoken = "{"g" * 20}"\nscopes = ["read"]\n'
        f"expires = {expires}\n"
    )
    found = _checked(TRACKER_CONFIG=str(file))["token"]
    assert found.level == level
    assert seen in found.seen
    assert "g" * 20 not in found.seen + found.advice
