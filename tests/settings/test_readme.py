"""The README says what there is: settings, and a configuration file that works."""

import re
from pathlib import Path

from tracker.settings import Settings, load_settings
from tracker.simulator import Options
from tracker.simulator.runs import RandomDraws

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """One section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_setting_is_listed() -> None:
    """The table names each variable that is read, and no other."""
    rows = [row.split("|")[1] for row in section("Settings").splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    tables = ("workspaces", "tokens", "budgets", "endpoints")
    known = {name.upper() for name in Settings.model_fields if name not in tables}
    assert listed == known | {"TRACKER_CONFIG"}


def test_the_listed_defaults_hold() -> None:
    """A default that the table gives is what an empty environment means."""
    defaults = load_settings({})
    for row in section("Settings").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        names = re.findall(r"`([A-Z_]+)`", cells[0])
        values = re.findall(r"^`([^`]+)`$|`([^`]+)`(?=,|$)", cells[-1])
        for name, value in zip(names, values, strict=False):
            given = load_settings({name: value[0] or value[1]})
            assert getattr(given, name.lower()) == getattr(defaults, name.lower()), name


def test_the_configuration_file_shown_works(tmp_path: Path) -> None:
    """The example in the README is read as it stands, once its secrets are there."""
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    for path in re.findall(r'"file:(/run/secrets/\w+)"', example):
        (tmp_path / Path(path).name).write_text(f"{Path(path).name}-of-some-length\n")
    config = tmp_path / "tracker.toml"
    config.write_text(example.replace("/run/secrets/", f"{tmp_path}/"))
    settings = load_settings(
        {
            "TRACKER_CONFIG": str(config),
            "DATABASE_URL": "postgresql://db/tracker",
            "OLD_WEBHOOK_SECRET": "whsec_old",
        }
    )
    (workspace,) = settings.all_workspaces
    assert workspace.id == "ws_abc123"
    secrets = [one.get_secret_value() for one in workspace.webhook_secrets]
    assert secrets == ["flora_webhook-of-some-length", "whsec_old"]
    assert [one.name for one in settings.access_tokens] == ["TRACKER_API_TOKEN", "prometheus"]


def test_the_first_steps_show_what_their_page_says() -> None:
    """With the seed that docs/start.md gives, the first callback comes and the second gets lost."""
    page = (Path(__file__).parents[2] / "docs/start.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"tracker simulate --drop (\d+)% --run-seconds \d --seed (\d+)", page)
    drop, seed = int(options[0]) / 100, int(options[1])
    first, second = RandomDraws(seed, 1).numbers, RandomDraws(seed, 2).numbers
    assert first["drop"] >= drop > second["drop"]
    assert min(first["failures"], second["failures"]) >= Options().failures
    for variable, value in re.findall(r"export (FLORA_\w+)=(\S+)", page):
        assert load_settings({variable: value}) != load_settings({})
