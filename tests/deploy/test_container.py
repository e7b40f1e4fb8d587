"""The container: linters and schemas where they are installed (``make deployment``), and the image's commands for real.

There is no Docker here. What it would run is read from the files, and run on a read-only system by a user of no rights.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.processes import DISTGRAD, Process, clean_environment
from support.sandbox import ROOM, sandboxed

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def tool(name: str) -> str:
    """Find a linter beside the interpreter or on PATH, or skip."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: make deployment, or pip install '.[deploy]'")
    return found


def instruction(name: str) -> list[str]:
    """Return what the last such instruction of the Dockerfile runs, in its JSON form."""
    return list(json.loads(re.findall(rf"^ *{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1]))


def health_check() -> list[str]:
    [line] = re.findall(r"^HEALTHCHECK .*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return list(json.loads(line))


def test_the_dockerfile_passes_hadolint() -> None:
    ended = subprocess.run(
        [tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_image_is_built_in_two_stages_and_runs_as_nobody() -> None:
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.MULTILINE)) == 2
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    }
    kept = set(re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE))

    assert copied == kept
    assert all((DEPLOY.parent / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_image_copies_is_enough_to_install_it(tmp_path: Path) -> None:
    """The first stage, in a folder: the same files, the same commands."""
    source, target = tmp_path / "source", tmp_path / "distgrad"
    source.mkdir()
    for name in re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE):
        path = DEPLOY.parent / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    text = DOCKERFILE.replace("\\\n", " ")
    runs = re.findall(r"^RUN (.*/opt/distgrad.*)$", text.partition("\nFROM python:${PYTHON}\n")[0], re.MULTILINE)
    assert len(runs) == 2
    for command in runs:
        local = command.replace("/opt/distgrad", str(target)).replace("${EXTRAS}", "fast")
        local = re.sub(r"^python ", f"{sys.executable} ", local)
        environment = clean_environment(PIP_CONSTRAINT=str(source / "constraints.txt"))
        done = subprocess.run(
            ["sh", "-c", local], capture_output=True, text=True, timeout=500, cwd=source, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    told = subprocess.run([str(target / "bin" / "distgrad"), "doctor"], capture_output=True, text=True, check=False)

    assert "ok       kernels: numba" in told.stdout, told.stdout + told.stderr
    # Compiled beforehand: the system is read-only when it runs.
    assert list((target / "lib").rglob("distgrad/__pycache__/keys.*.pyc"))


@pytest.fixture
def image() -> Iterator[tuple[str, Process]]:
    """Run the image's command on a read-only system, but for ports; give the address and the process."""
    assert instruction("ENTRYPOINT") == ["distgrad"]
    paths = {"/data": str(ROOM / "data"), "/keys/broker": str(ROOM / "keys" / "broker")}
    words = [paths.get(word, re.sub(r"^0\.0\.0\.0:\d+$", "127.0.0.1:0", word)) for word in instruction("CMD")]
    # What compose.yaml's service `keys` does, for the user of the image.
    make = " && ".join(
        f"{DISTGRAD[0]} -m distgrad keys new {name} --role {role} --dir /mnt/keys/broker --out /mnt/{name}.key"
        for name, role in (("health", "read"), ("worker", "worker"))
    )
    owner = "$(stat -c %u:%g /mnt/data)"
    prefix = sandboxed(f"{make} && chown -R {owner} /mnt/keys /mnt/*.key")
    environment = {"TMPDIR": "/mnt/tmp", "NUMBA_CACHE_DIR": "/mnt/tmp/numba", "HOME": "/nowhere"}
    with Process(*words, program=(*prefix, *DISTGRAD), env=environment) as process:
        yield process.wait_for_line(r"control=(\S+)")[1], process
        process.terminate()
        assert process.wait() == 0, process.output()


def test_the_images_command_and_its_health_check_run_on_a_read_only_system(image: tuple[str, Process]) -> None:
    address, process = image
    entry, *check = health_check()
    assert entry == "distgrad"
    # Inside the broker's namespaces and as its user, as `docker exec` does it.
    enter = ("nsenter", "--target", str(process.pid), "--mount", "--")
    command = [*enter, "env", "DISTGRAD_ADMIN_KEYS=/mnt/health.key", *DISTGRAD]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, cwd="/", check=False)

    told = run(*(word.replace("127.0.0.1", address) for word in check))
    assert (told.returncode, told.stdout) == (0, "healthy: version 0, 0 workers\n"), told.stderr
    # A key of another role is refused what it may not do.
    assert run("admin", address, "stop").returncode == 1


def test_the_compose_file_fits_the_schema_of_compose() -> None:
    ended = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stdout


def test_compose_accepts_the_file() -> None:
    """Compose's own check: Compose 2 where there is one, else the old one, which knows no name of a project yet."""
    described = (DEPLOY / "compose.yaml").read_text()
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True, check=False).returncode:
        if not shutil.which("docker-compose"):
            pytest.skip("there is no Compose on this machine: apt install docker-compose")
        command = ["docker-compose"]
        described = re.sub(r"^name:.*$", "", described, flags=re.MULTILINE)
    options = ["--project-directory", str(DEPLOY), "--file", "-", "config", "--quiet"]

    ended = subprocess.run(
        [*command, *options], input=described, capture_output=True, text=True, timeout=60, check=False
    )

    assert ended.returncode == 0, ended.stderr


def compose() -> Any:
    yaml = pytest.importorskip("yaml", reason="needs the extra deploy")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_runs_a_broker_four_workers_prometheus_and_grafana() -> None:
    services = compose()["services"]

    assert {"broker", "worker", "prometheus", "grafana"} <= services.keys()
    assert services["worker"]["deploy"]["replicas"] == 4
    assert all(service.get("cap_drop") == ["ALL"] for service in services.values())
    # What a browser opens is this machine's own.
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))


def test_what_compose_mounts_exists() -> None:
    described = compose()
    for service in described["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            exists = (DEPLOY / source).exists() if source.startswith(".") else source in described["volumes"]
            assert exists, volume


def test_a_worker_of_compose_sees_no_key_but_its_own() -> None:
    mounted = [volume.split(":")[0] for volume in compose()["services"]["worker"]["volumes"]]

    assert [name for name in mounted if "key" in name] == ["worker-key"]


def test_composes_commands_are_distgrads(tmp_path: Path) -> None:
    services = compose()["services"]
    broker = subprocess.run(
        [*DISTGRAD, *services["broker"]["command"], "--check-config"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    script = services["keys"]["command"][0].replace("$$", "$").replace("/keys/", f"{tmp_path}/")
    for name in ("broker", "worker", "health", "admin"):
        (tmp_path / name).mkdir(mode=0o700)
    program = tmp_path / "bin" / "distgrad"
    program.parent.mkdir()
    program.symlink_to(Path(sys.executable).parent / "distgrad")
    # Twice: a second start leaves the keys alone.
    for _ in range(2):
        made = subprocess.run(
            [*services["keys"]["entrypoint"], script],
            capture_output=True, text=True, timeout=60, check=False, env={"PATH": f"{program.parent}:/usr/bin:/bin"},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr

    assert broker.returncode == 0, broker.stderr
    assert sorted(path.name for path in (tmp_path / "broker").iterdir()) == [
        "admin.pub", "broker.key", "health.pub", "worker.pub",
    ]  # fmt: skip
    assert (tmp_path / "worker" / "worker.key").stat().st_mode & 0o777 == 0o600


def test_prometheus_asks_where_metrics_are_served() -> None:
    yaml = pytest.importorskip("yaml", reason="needs the extra deploy")
    services = compose()["services"]
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")

    assert f"--listen=0.0.0.0:{port}" in services[name]["command"]
    assert set(services[name]["networks"]) & set(services["prometheus"]["networks"])
    # What Grafana shows is provided, and where it looks for it.
    provider = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "distgrad.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert any(f":{folder}/" in volume for volume in services["grafana"]["volumes"])


def test_the_images_metrics_answer_with_the_key_that_may_only_read(image: tuple[str, Process]) -> None:
    address, process = image
    enter = ("nsenter", "--target", str(process.pid), "--mount", "--")
    words = ["metrics", address, "--keys=/mnt/health.key", "--once"]

    told = subprocess.run([*enter, *DISTGRAD, *words], capture_output=True, text=True, timeout=60, cwd="/", check=False)

    assert told.returncode == 0, told.stderr
    assert "# TYPE distgrad_" in told.stdout
