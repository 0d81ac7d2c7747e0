"""The Kubernetes manifests: each is one that a cluster would take, and runs what there is."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.commands import assert_taken
from tests.deploy.conftest import ROOT
from tracker.settings import load_settings
from tracker.settings.tokens import Scope

DIRECTORY = ROOT / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text(encoding="utf-8"))
FILES = [*KUSTOMIZATION["resources"], "secret.example.yaml"]
OLDEST = "1.30"
"""`lifecycle.preStop.sleep` is on by default from there."""


def manifests(name: str) -> list[dict[str, Any]]:
    """The documents of one file."""
    return list(yaml.safe_load_all((DIRECTORY / name).read_text(encoding="utf-8")))


ALL = [manifest for name in FILES for manifest in manifests(name)]
WORKLOADS = [each for each in ALL if each["kind"] in ("Deployment", "Job", "CronJob")]


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    """The specification of the pods that a workload makes."""
    spec = workload["spec"]
    if workload["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


def named(workload: dict[str, Any]) -> str:
    """A workload's name, for the report."""
    return f"{workload['kind']}-{workload['metadata']['name']}"


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_a_cluster_would_take_them(version: str) -> None:
    """Every manifest is valid by the schema of an old and of the newest Kubernetes."""
    for manifest in ALL:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_is_applied() -> None:
    """The kustomization names each manifest but the example."""
    there = {path.name for path in DIRECTORY.iterdir()}
    assert there == {*FILES, "kustomization.yaml"}


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_pods_run_real_commands(workload: dict[str, Any]) -> None:
    """The command line takes what each container is started with."""
    (container,) = pod_of(workload)["containers"]
    assert_taken(container["args"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_pods_may_do_little(workload: dict[str, Any]) -> None:
    """Pods keep to the restricted security standard, with a read-only file system."""
    pod = pod_of(workload)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_selectors_find_their_pods() -> None:
    """Services, disruption budgets and deployments select by labels that their pods have."""
    labels = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in WORKLOADS
        if each["kind"] == "Deployment"
    ]
    for manifest in ALL:
        if manifest["kind"] not in ("Service", "PodDisruptionBudget", "Deployment"):
            continue
        selector = manifest["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= pod.items() for pod in labels), named(manifest)


def one(kind: str, name: str) -> dict[str, Any]:
    """The manifest of that kind and name."""
    (found,) = [each for each in ALL if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_the_settings_load(workload: dict[str, Any], tmp_path: Path) -> None:
    """What a pod is given of the config map and the example secret are valid settings."""
    pod = pod_of(workload)
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    texts = {}
    for volume, (kind, key, field) in {
        "config": ("ConfigMap", "name", "data"),
        "secrets": ("Secret", "secretName", "stringData"),
    }.items():
        source = volumes[volume]["configMap" if kind == "ConfigMap" else "secret"]
        items = {item["key"] for item in source.get("items", ())}
        for name, text in one(kind, source[key])[field].items():
            if items and name not in items:
                continue
            texts[f"{mounts[volume]}/{name}"] = text
    environment = {each["name"]: each["value"] for each in container["env"]}
    for path, text in texts.items():
        here = Path(f"{tmp_path}{path}")
        here.parent.mkdir(parents=True, exist_ok=True)
        # The example's tokens are too short on purpose: nobody starts with them.
        text = f"{path}-as-it-was-made-up" if text.startswith("change-me") else text
        here.write_text(text.replace("file:/", f"file:{tmp_path}/"), encoding="utf-8")
    assert f"{environment['TRACKER_CONFIG']}" in texts
    environment["TRACKER_CONFIG"] = f"{tmp_path}{environment['TRACKER_CONFIG']}"
    # As the image has it: what a pod's environment sets to nothing counts as not set.
    settings = load_settings({"TRACKER_DATABASE_URL": "sqlite:////data/tracker.db"} | environment)
    assert settings.tracker_database_url.startswith("postgresql://")
    name = workload["metadata"]["name"]
    if name not in ("migrate", "prune"):
        assert settings.callback_url == "https://tracker.example.com/callbacks/flora"
    tokens = {token.name: token for token in settings.access_tokens}
    has = {"receiver": {"TRACKER_API_TOKEN", "prometheus"}, "worker": {"prometheus"}}
    assert set(tokens) == has.get(name, set())
    if "prometheus" in tokens:
        assert [scope for scope in Scope if tokens["prometheus"].allows(scope)] == [Scope.METRICS]


NEEDED = {
    "migrate": {"TRACKER_DATABASE_URL"},
    "prune": {"TRACKER_DATABASE_URL"},
    "reconcile": {"TRACKER_DATABASE_URL", "FLORA_API_KEY"},
    "worker": {"TRACKER_DATABASE_URL", "FLORA_API_KEY", "METRICS_TOKEN"},
}


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_pods_have_the_secrets_that_they_need(workload: dict[str, Any]) -> None:
    """What works on the database has its address alone; only receivers have the signing secret and
    the token of people."""
    (volume,) = [one for one in pod_of(workload)["volumes"] if one["name"] == "secrets"]
    every = set(one("Secret", "tracker")["stringData"])
    items = volume["secret"].get("items")
    given = every if items is None else {item["key"] for item in items}
    assert given == NEEDED.get(workload["metadata"]["name"], every)


def test_only_callbacks_are_reached_through_the_ingress() -> None:
    """The ingress has one path, by prefix, which leads to the receivers' port for callbacks."""
    (rule,) = one("Ingress", "tracker")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/callbacks/flora", "Prefix")
    backend = path["backend"]["service"]
    (service_port,) = one("Service", backend["name"])["spec"]["ports"]
    assert service_port["name"] == backend["port"]["name"]
    (container,) = pod_of(one("Deployment", "receiver"))["containers"]
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    arguments = container["args"]
    callbacks = ports[service_port["targetPort"]]
    assert callbacks == arguments[arguments.index("--callbacks-port") + 1]
    (private,) = one("Service", "receiver")["spec"]["ports"]
    assert ports[private["targetPort"]] == arguments[arguments.index("--port") + 1] != callbacks


def test_the_network_lets_in_what_has_business_there() -> None:
    """Each port is open to one namespace: the callbacks' to the ingress controller's, the private
    one to Prometheus'."""
    let_in = {
        rule_port["port"]: [
            peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            for peer in rule["from"]
        ]
        for manifest in ALL
        if manifest["kind"] == "NetworkPolicy"
        for rule in manifest["spec"]["ingress"]
        for rule_port in rule["ports"]
    }
    assert let_in == {8080: ["monitoring"], 8081: ["ingress-nginx"]}


def test_a_rotated_secret_reaches_the_pods() -> None:
    """Secrets are files of whole volumes: variables and single mounted files are never renewed."""
    for workload in WORKLOADS:
        (container,) = pod_of(workload)["containers"]
        assert "envFrom" not in container
        assert all("valueFrom" not in each for each in container["env"])
        assert all("subPath" not in mount for mount in container["volumeMounts"])
