"""The image and compose.yaml: what can be known of them without a container engine."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.commands import assert_taken
from tests.deploy.conftest import ROOT, Promtool
from tracker.settings import Settings, load_settings
from tracker.settings.tokens import Scope

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "receiver", "worker")
DIRECTORY = ROOT / "deploy/compose"


def test_the_dockerfile_is_sound() -> None:
    """hadolint finds nothing to say about the Dockerfile."""
    linter = Path(sys.executable).with_name("hadolint")
    command = [linter, ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_given_what_it_copies() -> None:
    """Everything that the Dockerfile copies is there, and .dockerignore lets it through."""
    let_through = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = set()
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied.update(line.split()[1:-1])
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_compose_is_well_formed() -> None:
    """compose.yaml is what the Compose Specification's schema describes."""
    schema = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SERVICES)
def test_services_refer_to_what_there_is(name: str) -> None:
    """Secrets and configs of a service are defined, its files exist, it waits for services."""
    service = SERVICES[name]
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
    assert {each["source"] for each in service.get("configs", ())} <= set(COMPOSE["configs"])
    assert set(service.get("depends_on", ())) <= set(SERVICES)
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]
    for config in COMPOSE["configs"].values():
        assert (ROOT / config["file"]).exists()


def test_who_is_waited_for_can_be_healthy() -> None:
    """Where a service waits for another's health, that one has a check; ours have the image's."""
    for service in SERVICES.values():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                has_check = "healthcheck" in SERVICES[other] or other in OURS
                assert has_check, other
                assert not SERVICES[other].get("healthcheck", {}).get("disable")


@pytest.mark.parametrize("name", OURS)
def test_containers_run_real_commands(name: str) -> None:
    """The command line takes what each tracker container is started with."""
    assert_taken(SERVICES[name]["command"])


@pytest.mark.parametrize("name", SERVICES)
def test_containers_may_do_little(name: str) -> None:
    """No container writes but to its volumes and what is gone with it, none has privileges to lose,
    and none runs as root but the proxy, whose one capability is to take the ports below 1024."""
    service = SERVICES[name]
    assert service["read_only"]
    assert "/tmp" in service["tmpfs"]  # noqa: S108
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    uid, _ = map(int, service["user"].split(":"))
    assert service.get("cap_add", []) == ([] if uid else ["NET_BIND_SERVICE"])
    assert (uid == 0) is (name == "proxy")


def test_the_proxy_reaches_no_database() -> None:
    """Who is reached from the internet shares a network with the receivers alone; the database is
    in networks without a way out, with those who need it; workers have a way to FLORA."""
    networks = {name: set(one["networks"]) for name, one in SERVICES.items()}
    reached = {name for name, theirs in networks.items() if theirs & networks["proxy"]}
    assert reached == {"proxy", "receiver"}
    inside = {name for name, one in COMPOSE["networks"].items() if one and one.get("internal")}
    assert networks["postgres"] <= inside
    near = {name for name, theirs in networks.items() if theirs & networks["postgres"]}
    assert near == {"postgres", "migrate", "receiver", "worker", "grafana"}
    for name in ("receiver", "worker"):
        assert networks[name] - inside


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The directory that `make-secrets` fills."""
    shutil.copy(DIRECTORY / "make-secrets", tmp_path)
    run_make_secrets(tmp_path)
    return tmp_path / "secrets"


def run_make_secrets(directory: Path, **environment: str) -> str:
    """Run the copied script, without a terminal; what it says."""
    given = {"FLORA_API_KEY": "sk_live_1", "FLORA_WEBHOOK_SECRET": "whsec_1", **environment}
    done = subprocess.run(
        [directory / "make-secrets"],
        env={"PATH": os.environ["PATH"], **given},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if all(given.values()) else 2), done.stderr
    return done.stdout + done.stderr


def test_secrets_are_made_once(secrets: Path) -> None:
    """`make-secrets` writes each secret that compose.yaml names, and leaves what is there alone."""
    names = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    first = {path.name: path.read_text() for path in secrets.iterdir()}
    assert set(first) == names
    assert len(set(first.values())) == len(first)
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    run_make_secrets(secrets.parent, FLORA_API_KEY="sk_live_other")
    assert {path.name: path.read_text() for path in secrets.iterdir()} == first


def test_a_missing_secret_is_asked_for(tmp_path: Path) -> None:
    """Without a terminal to ask at, `make-secrets` says which variable is missing."""
    shutil.copy(DIRECTORY / "make-secrets", tmp_path)
    assert "FLORA_API_KEY is needed" in run_make_secrets(tmp_path, FLORA_API_KEY="")


def settings_with(secrets: Path) -> Settings:
    """What a receiver reads: the containers' environment, and tracker.toml with these secrets."""
    environment = {
        name: value.replace("${TRACKER_HOST:?the name under which FLORA reaches this machine}", "h")
        for name, value in SERVICES["receiver"]["environment"].items()
    }
    text = (DIRECTORY / "tracker.toml").read_text(encoding="utf-8")
    config = secrets.parent / "tracker.toml"
    config.write_text(text.replace("/run/secrets", str(secrets)), encoding="utf-8")
    return load_settings(environment | {"TRACKER_CONFIG": str(config)})


def test_the_containers_settings_load(secrets: Path) -> None:
    """tracker.toml with the made secrets, and the containers' environment, are valid settings."""
    settings = settings_with(secrets)
    assert settings.tracker_database_url.startswith("postgresql://tracker:")
    assert settings.callback_url == "https://h/callbacks/flora"


def config_of(name: str) -> str:
    """The settings file that a container is given."""
    (config,) = SERVICES[name]["configs"]
    path: str = COMPOSE["configs"][config["source"]]["file"]
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("migrate", {"database_url"}),
        ("worker", {"database_url", "flora_api_key", "metrics_token"}),
        (
            "receiver",
            {"database_url", "flora_api_key", "flora_webhook_secret", "tracker_api_token"}
            | {"metrics_token"},
        ),
    ],
)
def test_containers_have_the_secrets_that_they_need(name: str, needed: set[str]) -> None:
    """The database for a migration, no signing secret and no password of people for a worker; and
    the settings ask for these, and no other."""
    assert set(SERVICES[name]["secrets"]) == needed
    assert set(re.findall(r"file:/run/secrets/(\w+)", config_of(name))) == needed


def test_browsers_keep_to_https() -> None:
    """Every site of the examples that ends TLS says so to browsers."""
    page = (ROOT / "docs/proxy.md").read_text(encoding="utf-8")
    caddy = re.findall(r"^```caddyfile.*?\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    caddy.append((DIRECTORY / "Caddyfile").read_text(encoding="utf-8"))
    nginx = re.findall(r"^server \{.*?^\}", page, re.DOTALL | re.MULTILINE)
    # A site of Caddy begins with its name at the margin; one of http alone ends no TLS.
    sites = [
        site
        for text in caddy
        for site in re.findall(r"^[\w{][^\n]* \{\n.*?^\}", text, re.DOTALL | re.MULTILINE)
    ]
    sites = [site for site in sites if not site.startswith("http://")] + nginx
    assert len(sites) == 6
    for site in sites:
        assert re.search(r'Strict-Transport-Security "max-age=31536000"', site), site


def option(service: str, name: str) -> str:
    """The value of an option of a service's command."""
    command = SERVICES[service]["command"]
    value: str = command[command.index(name) + 1]
    return value


def test_only_callbacks_are_reached_from_outside() -> None:
    """The proxy alone is published, its private site and Grafana on this machine only; its public
    site leads to the callbacks' port, the private one to the other."""
    published = {name: one["ports"] for name, one in SERVICES.items() if "ports" in one}
    assert set(published) == {"proxy", "grafana"}
    here = [one for ports in published.values() for one in ports if one.startswith("127.0.0.1:")]
    assert here == ["127.0.0.1:8080:8080", "127.0.0.1:3000:3000"]
    caddyfile = (DIRECTORY / "Caddyfile").read_text(encoding="utf-8")
    public, private = caddyfile.split("http://:8080 {")
    assert re.findall(r"^\t+port (\d+)$", public, re.MULTILINE) == [
        option("receiver", "--callbacks-port")
    ]
    assert re.findall(r"^\t+port (\d+)$", private, re.MULTILINE) == [option("receiver", "--port")]


def test_prometheus_has_a_token_for_metrics_alone(secrets: Path) -> None:
    """It is given no other secret, and that one opens nothing but the metrics."""
    config = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert SERVICES["prometheus"]["secrets"] == ["metrics_token"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_token"
    token = settings_with(secrets).access_tokens.find((secrets / "metrics_token").read_bytes())
    assert token is not None
    assert [scope for scope in Scope if token.allows(scope)] == [Scope.METRICS]


def test_prometheus_takes_its_configuration(promtool: Promtool) -> None:
    """promtool finds the compose network's configuration sound."""
    promtool("check", "config", "--syntax-only", DIRECTORY / "prometheus.yml")
    (job,) = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) <= set(SERVICES)
    for name in found["names"]:
        assert str(found["port"]) in SERVICES[name]["command"]


def test_grafana_has_the_sources_that_the_dashboards_ask() -> None:
    """The compose network's data sources are those of the plain provisioning, by id and kind."""
    plain = ROOT / "deploy/grafana/provisioning/datasources/tracker.yml"
    sources = [
        {(each["uid"], each["type"], each["name"]) for each in yaml.safe_load(text)["datasources"]}
        for text in (plain.read_text(), (DIRECTORY / "grafana-datasources.yml").read_text())
    ]
    assert sources[0] == sources[1]
