"""``distgrad doctor`` finds what is wrong: each test plants one fault for real, and reads what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distgrad.admin import Admin
from distgrad.doctor.machine import clock, kernels
from support.broker_process import broker_process
from support.key_folders import make_key_folder
from support.processes import DISTGRAD, clean_environment

FREE = ("--control", "127.0.0.1:0", "--gradients", "127.0.0.1:0")


def doctor(*arguments: object, env: Mapping[str, str] | None = None, before: str = "true") -> list[dict[str, Any]]:
    """Run it behind a line of shell that plants a fault; the exit code must agree with what it says."""
    command = ["sh", "-c", f'{before} && exec "$@"', "sh", *DISTGRAD, "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=clean_environment(**(env or {})), check=False
    )
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == any(finding["grade"] == "fault" for finding in findings), done.stdout + done.stderr
    assert all((finding["mend"] is None) == (finding["grade"] == "ok") for finding in findings)
    return findings


def troubles(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["grade"] != "ok"]


def the_fault(findings: list[dict[str, Any]], about: str) -> str:
    """Return the one fault's text and how to mend it."""
    [found] = [finding for finding in findings if finding["grade"] == "fault"]
    assert found["about"] == about, findings
    return f"{found['text']} | {found['mend']}"


def in_a_namespace(line: str) -> str:
    """Plant something in a namespace of mounts, which ends with the command; or skip the test."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of mounts can be made here")
    return f'exec {unshare} -rm sh -c \'{line} && exec "$@"\' sh "$@"'


def test_a_machine_in_order_has_no_fault(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)

    findings = doctor(*FREE, "--data", tmp_path / "run", "--keys", keys.folder)

    assert [finding for finding in findings if finding["grade"] == "fault"] == []
    assert {finding["about"] for finding in findings} >= {
        *("versions", "kernels", "shared memory", "open files", "clock", "room", "writing", "keys", "ports")
    }


def test_a_broker_in_order_has_no_fault(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with broker_process("--keys", str(keys.folder), "--data", str(tmp_path / "run")) as (address, _):
        findings = doctor(address, "--keys", keys.admin, "--data", tmp_path / "run")

    texts = [finding["text"] for finding in findings]
    assert [finding for finding in findings if finding["grade"] == "fault"] == []
    assert any("answers and accepts the key" in text for text in texts)
    assert any("is in use by a process" in text for text in texts)


def test_it_finds_a_library_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "msgpack-0.6.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: msgpack\nVersion: 0.6.0\n")

    said = the_fault(doctor(*FREE, env={"PYTHONPATH": str(tmp_path)}), "versions")

    assert "msgpack is 0.6.0, but 1.2.1 or newer is needed" in said
    assert "pip install 'msgpack>=1.2.1'" in said


def test_a_port_that_a_broker_has_leads_to_asking_it() -> None:
    with broker_process() as (endpoint, _):
        address = endpoint.removeprefix("tcp://")
        said = the_fault(doctor("--control", address, "--gradients", "127.0.0.1:0"), "ports")

    assert f"a broker runs there, look at it with: distgrad doctor {address}" in said


def test_it_finds_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        said = the_fault(doctor("--control", f"127.0.0.1:{port}", "--gradients", "127.0.0.1:0"), "ports")

    assert f"tcp://127.0.0.1:{port}: the port is taken" in said


def test_it_finds_a_secret_key_that_others_can_read(tmp_path: Path) -> None:
    key = make_key_folder(tmp_path).worker
    key.chmod(0o644)

    assert f"chmod 600 {key}" in the_fault(doctor(*FREE, "--keys", key), "keys")


def test_it_finds_a_file_that_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "w.key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (tmp_path / "w.key").chmod(0o600)

    assert "is not a key file" in the_fault(doctor(*FREE, "--keys", tmp_path / "w.key"), "keys")


def test_it_finds_that_too_few_files_may_be_open() -> None:
    said = the_fault(doctor(*FREE, "--workers", 200, before="ulimit -n 256"), "open files")

    assert "may have 256; a broker with 200 workers needs 664" in said
    assert "ulimit -n 664" in said


def test_a_low_limit_that_the_broker_raises_by_itself_is_no_fault() -> None:
    findings = doctor(*FREE, "--workers", 200, before="ulimit -Sn 256 && ulimit -Hn 4096")

    (text,) = (finding["text"] for finding in findings if finding["about"] == "open files")
    assert text == "a process may have 4096, enough for 200 workers"


def test_it_finds_a_data_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    plant = in_a_namespace(f"mount -t tmpfs -o ro,size=1g nothing {tmp_path}")

    assert "cannot be written to" in the_fault(doctor(*FREE, "--data", tmp_path / "run", before=plant), "writing")


def test_it_finds_a_disk_without_room(tmp_path: Path) -> None:
    plant = in_a_namespace(f"mount -t tmpfs -o size=16m nothing {tmp_path}")

    findings = doctor(*FREE, "--data", tmp_path, before=plant)

    assert "0.0 GiB of room" in the_fault(findings, "room")
    assert any("is in memory (tmpfs)" in finding["text"] for finding in troubles(findings))


def test_it_finds_a_file_where_the_data_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    assert "is a file" in the_fault(doctor(*FREE, "--data", tmp_path / "run" / "data"), "data folder")


def test_it_finds_a_data_folder_of_a_newer_distgrad(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("distgrad data 7\n")

    assert "7" in the_fault(doctor(*FREE, "--data", tmp_path), "data folder")


def test_it_finds_a_clock_that_was_set_back(tmp_path: Path) -> None:
    with broker_process("--data", str(tmp_path / "run")):
        pass
    later = time.time() + 3600
    os.utime(tmp_path / "run" / "FORMAT", (later, later))

    said = the_fault(doctor(*FREE, "--data", tmp_path / "run"), "clock")

    assert "from the future: the clock was set back" in said


def test_it_finds_a_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 86400.0)

    [finding] = clock()

    assert (finding.grade, finding.text) == ("fault", "the clock says 1970-01-02 00:00:00 UTC")


def test_it_finds_that_nobody_listens() -> None:
    assert "nobody listens there" in the_fault(doctor("127.0.0.1:1"), "broker")


def test_it_finds_a_key_that_the_broker_does_not_accept(tmp_path: Path) -> None:
    keys, other = make_key_folder(tmp_path), make_key_folder(tmp_path, "other")
    with broker_process("--keys", str(keys.folder)) as (address, _):
        said = the_fault(doctor(address, "--keys", other.admin), "broker")

    assert f"no answer from {address}" in said


def test_it_finds_that_the_broker_wants_a_key(tmp_path: Path) -> None:
    keys = make_key_folder(tmp_path)
    with broker_process("--keys", str(keys.folder)) as (address, _):
        said = the_fault(doctor(address), "broker")

    assert "one side has keys and the other has none" in said


def test_it_finds_a_broker_that_was_stopped() -> None:
    with broker_process() as (address, _), Admin(address, timeout=20) as admin:
        admin.stop()

        assert "it was stopped" in the_fault(doctor(address), "broker")


def test_it_warns_of_little_shared_memory() -> None:
    plant = in_a_namespace("mount -t tmpfs -o size=64m nothing /dev/shm")

    [finding] = [finding for finding in doctor(*FREE, before=plant) if finding["about"] == "shared memory"]

    assert finding["grade"] == "warning"
    assert "/dev/shm has 64 MiB" in finding["text"]
    assert "--shm-size" in finding["mend"]


def test_it_warns_of_kernels_that_cannot_be_kept(tmp_path: Path) -> None:
    """Where the sources lie read-only, and neither the home folder nor NUMBA_CACHE_DIR can be written to."""
    pytest.importorskip("numba", reason="needs the extra fast")
    package = Path(sys.modules["distgrad"].__file__ or "").parent
    plant = in_a_namespace(f"mount --bind {package} {package} && mount -o remount,ro,bind {package}")

    findings = doctor(*FREE, before=plant, env={"HOME": "/proc/none", "NUMBA_CACHE_DIR": "/proc/none"})

    [finding] = [finding for finding in findings if finding["about"] == "kernels"]
    assert finding["grade"] == "warning"
    assert "its cache cannot be written" in finding["text"]


def test_it_warns_that_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    [finding] = kernels()

    assert (finding.grade, finding.mend) == ("warning", "in the clone of distgrad: pip install '.[fast]'")


def test_people_read_one_line_for_a_finding_and_one_to_mend_it() -> None:
    done = subprocess.run(
        [*DISTGRAD, "doctor", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=100, env=clean_environment(), check=False,
    )  # fmt: skip

    *_, found, mend = done.stdout.splitlines()
    assert found.startswith("fault    broker: no answer from tcp://127.0.0.1:1 ")
    assert mend.startswith("         mend: ")
    assert done.returncode == 1
