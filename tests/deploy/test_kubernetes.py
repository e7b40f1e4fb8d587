"""The Kubernetes files: built by kustomize where there is ``kubectl``, checked against Kubernetes' own schemas."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import DISTGRAD, run
from support.sandbox import ROOM, sandboxed

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
README = (DEPLOY / "kubernetes" / "README.md").read_text()

yaml = pytest.importorskip("yaml", reason="needs the extra deploy")


def kind(objects: list[Any], wanted: str) -> Any:
    [found] = [each for each in objects if each["kind"] == wanted]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy deploy/, and make the keys by the commands of the page."""
    copy = tmp_path_factory.mktemp("kubernetes") / "deploy"
    shutil.copytree(DEPLOY, copy)
    commands = re.findall(r"^distgrad (keys new .*)$", README, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        made = run(*command.split(), cwd=copy / "kubernetes")
        assert made.returncode == 0, made.stderr
    return copy / "kubernetes"


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    """Let kustomize build it."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, whose kustomize builds this")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    out = folder.parent / "built.yaml"
    out.write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    """Read the files as they lie there."""
    names = ("namespace", "broker", "workers", "metrics", "network")
    return [each for name in names for each in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())]


def test_what_kustomize_builds_fits_kubernetes_schemas(built: Path) -> None:
    validator = Path(sys.executable).parent / "kubernetes-validate"
    if not validator.exists():
        pytest.skip("kubernetes-validate is not installed: make deployment")

    checked = subprocess.run(
        [str(validator), "--strict", str(built)], capture_output=True, text=True, timeout=100, check=False
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stderr.count("passed for resource") + checked.stdout.count("passed for resource") == 13


def test_what_kustomize_builds_has_the_keys_and_the_training(built: Path, folder: Path) -> None:
    made = list(yaml.safe_load_all(built.read_text()))
    secrets = {each["metadata"]["name"]: sorted(each["data"]) for each in made if each["kind"] == "Secret"}

    assert secrets == {
        "broker-keys": ["admin.pub", "broker.key", "health.pub", "worker.pub"],
        "health-key": ["health.key"],
        "worker-key": ["worker.key"],
    }
    assert kind(made, "ConfigMap")["data"]["train.py"] == (folder.parent / "training" / "train.py").read_text()
    assert {each["metadata"].get("namespace") for each in made if each["kind"] != "Namespace"} == {"distgrad"}


def test_git_ignores_the_keys() -> None:
    assert "/keys/\n" in (DEPLOY / "kubernetes" / ".gitignore").read_text()


def test_every_pod_is_restricted(objects: list[Any]) -> None:
    """As the level `restricted` of the Pod Security Standards has it, and a read-only system besides."""
    assert kind(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name in ("StatefulSet", "Job", "Deployment"):
        pod = kind(objects, name)["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in pod["volumes"]} | ({"data"} if name == "StatefulSet" else set())
        assert mounted == volumes
        assert "memory" in container["resources"]["limits"]


def test_selectors_ports_and_names_fit_together(objects: list[Any]) -> None:
    broker = kind(objects, "StatefulSet")
    [container] = broker["spec"]["template"]["spec"]["containers"]
    labels = broker["spec"]["template"]["metadata"]["labels"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = kind(objects, "Service")
    job = kind(objects, "Job")

    assert service["metadata"]["name"] == broker["spec"]["serviceName"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert broker["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == named
    [words] = [each["args"] for each in job["spec"]["template"]["spec"]["containers"]]
    assert words[:2] == ["worker", service["metadata"]["name"]]
    assert f"--world={job['spec']['completions']}" in words
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_the_network_policy_lets_in_workers_and_clients_only(objects: list[Any]) -> None:
    nobody, broker, _ = (each["spec"] for each in objects if each["kind"] == "NetworkPolicy")
    job = kind(objects, "Job")["spec"]["template"]["metadata"]["labels"]

    assert (nobody["podSelector"], nobody["policyTypes"]) == ({}, ["Ingress"])
    workers, clients = broker["ingress"]
    assert workers["from"] == [{"podSelector": {"matchLabels": job}}]
    assert [port["port"] for port in workers["ports"]] == ["control", "gradients"]
    assert [port["port"] for port in clients["ports"]] == ["control"]
    metrics = kind(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert clients["from"][0]["podSelector"]["matchLabels"].items() <= metrics.items()


def test_the_commands_in_the_pods_are_distgrads(objects: list[Any]) -> None:
    [container] = kind(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    checked = run(*container["args"], "--check-config")

    assert checked.returncode == 0, checked.stderr
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        program, *words = container[name]["exec"]["command"]
        assert program == "distgrad"
        told = run(*(word.replace("127.0.0.1", "127.0.0.1:1").replace("5", "0.2") for word in words))
        assert (told.returncode, told.stdout.split(":")[0]) == (1, "not ready" if "--ready" in words else "not healthy")


def test_a_secret_as_kubernetes_mounts_it_is_taken_and_one_as_loose_elsewhere_is_not() -> None:
    """Root's files that the pod's group may read (mode 0440), on a read-only file system."""
    program = f"{DISTGRAD[0]} -m distgrad"
    prepare = f"""
        {program} keys new w --role worker --dir /mnt/s/broker --out /mnt/s/w.key
        chmod 0755 /mnt/s /mnt/s/broker; chmod 0440 /mnt/s/broker/broker.key /mnt/s/w.key
        group=$(stat -c %g /mnt/data); chown -R 0:$group /mnt/s; cp -rp /mnt/s /mnt/loose
        mkdir /mnt/ro; mount --bind /mnt/s /mnt/ro; mount -o remount,bind,ro /mnt/ro
    """
    prefix = sandboxed(prepare)

    def keys(path: str) -> subprocess.CompletedProcess[str]:
        doctor = [*DISTGRAD, "doctor", "127.0.0.1:1", "--keys", f"{ROOM}/{path}"]
        return subprocess.run([*prefix, *doctor], capture_output=True, text=True, timeout=100, cwd="/", check=False)

    assert "ok       keys: /mnt/ro/broker is a broker's folder and lets in: w (worker)" in keys("ro/broker").stdout
    assert "ok       keys: /mnt/ro/w.key is the worker key of w" in keys("ro/w.key").stdout
    assert "is open to others (mode 0440)" in keys("loose/w.key").stdout
