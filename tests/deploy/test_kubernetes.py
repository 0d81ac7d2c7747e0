"""The Kubernetes manifests: each is one that a cluster would take, and runs what there is."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.commands import assert_taken
from tests.deploy.conftest import ROOT
from tracker.settings import load_settings

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


def test_the_settings_load(tmp_path: Path) -> None:
    """The config map and the example secret are valid settings together."""
    environment: dict[str, str] = {}
    for manifest in ALL:
        if manifest["kind"] in ("ConfigMap", "Secret"):
            environment |= manifest.get("data") or manifest["stringData"]
    settings = load_settings(environment)
    assert settings.tracker_database_url.startswith("postgresql://")
    assert settings.callback_url == "https://tracker.example.com/callbacks/flora"
