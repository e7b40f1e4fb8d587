"""``distgrad broker`` as an operator meets it: started wrongly, started well, changed while it runs, ended."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distgrad import SGD, Admin
from distgrad.errors import ConfigError, ControlError, InvalidMode
from distgrad.parameter_files import as_nest, read, write
from distgrad_broker import Broker
from distgrad_worker import Worker
from support.key_folders import make_key_folder
from support.processes import Process, run

ZEROS = {"w": np.zeros(100, np.float32)}
ONES = {"w": np.ones(100, np.float32)}
ANY_PORTS = ("--control", "tcp://127.0.0.1:0", "--gradients", "tcp://127.0.0.1:0")


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def address_of(process: Process) -> str:
    return process.wait_for_line(r"^distgrad broker control=(\S+) gradients=tcp://127\.0\.0\.1:[1-9]\d*$")[1]


def check_one_line(done_stderr: str, *words: str) -> None:
    """One line that says what is wrong, perhaps a hint what to do, and no traceback."""
    lines = done_stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2, done_stderr
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert all(word in done_stderr for word in words), done_stderr


def test_a_taken_port_ends_in_one_line_and_exit_code_2() -> None:
    with taken_port() as port:
        done = run("broker", "--control", f"tcp://127.0.0.1:{port}", "--gradients", "tcp://127.0.0.1:0")

    assert done.returncode == 2
    check_one_line(done.stderr, f"127.0.0.1:{port}", "the port is taken", "choose another port")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("control = ", ["is not a TOML file"]),
        ("colour = 'red'", ["unknown key 'colour'", "allowed are control, gradients"]),
        ("contorl = 'x'", ["did you mean control?"]),
        ("mode = 'sideways'", ["descent, ascent", "'sideways'"]),
        ("queue_bytes = 'much'", ["queue_bytes", "'much'"]),
        ("queue_bytes = 5", ["queue_bytes", "at least 1024"]),
        ("workers_silent_after = -1", ["workers_silent_after", "more than 0"]),
        ("lr = 0.1", ["--lr needs --optimizer", "sgd, adam, adamw"]),
        ("optimizer = 'sgd'", ["lr"]),
        ("control = 'udp://x'", ["only tcp:// is spoken"]),
        ("control = 'tcp://0.0.0.0:5556'", ["there are no keys", "--insecure"]),
    ],
)
def test_a_bad_configuration_ends_in_one_line_and_exit_code_2(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(text + "\n")

    done = run("broker", "--config", file)

    assert done.returncode == 2
    check_one_line(done.stderr, *words)


def test_missing_and_unreadable_files_end_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no tensors here")
    keys = make_key_folder(tmp_path)
    (keys.folder / "broker.key").chmod(0o644)
    for arguments, words in (
        (("--config", tmp_path / "none.toml"), ["cannot read", "none.toml", "No such file"]),
        (("--load", tmp_path / "none.safetensors"), ["none.safetensors", "no such file"]),
        (("--load", garbage), ["garbage.safetensors"]),
        (("--load", tmp_path / "weights.pickle"), ["weights.pickle", ".safetensors"]),
        (("--save", tmp_path / "weights.txt"), ["weights.txt", ".safetensors"]),
        (("--keys", tmp_path / "none"), ["none", "distgrad keys new"]),
        (("--keys", keys.folder), ["broker.key", "chmod"]),
    ):
        done = run("broker", *ANY_PORTS, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        check_one_line(done.stderr, *words)


def test_an_unknown_option_is_wrong_usage() -> None:
    done = run("broker", "--colour", "red")

    assert done.returncode == 2
    assert "--colour" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_config_prints_every_setting_with_its_origin_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('mode = "ascent"\nqueue_bytes = "1MiB"\noptimizer = "sgd"\n')

    done = run(
        "broker", "--config", file, "--check-config", "--lr", "0.5", "--queue-bytes", "2MiB",
        env={"DISTGRAD_MODE": "descent", "DISTGRAD_LR": "0.1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    shown = dict(re.findall(r"^(\w+) = (.*?) +# .*$", done.stdout, re.MULTILINE))
    origins = dict(re.findall(r"^(\w+) = .*# (.*)$", done.stdout, re.MULTILINE))
    assert (shown["mode"], origins["mode"]) == ('"descent"', "DISTGRAD_MODE")
    assert (shown["lr"], origins["lr"]) == ("0.5", "--lr")
    assert (shown["queue_bytes"], origins["queue_bytes"]) == ("2097152", "--queue-bytes")
    assert (shown["optimizer"], origins["optimizer"]) == ('"sgd"', str(file))
    assert origins["control"] == "default"


@pytest.mark.parametrize("end", [Process.terminate, Process.interrupt])
def test_a_signal_drains_the_queue_saves_the_parameters_and_ends_with_0(
    tmp_path: Path, end: Callable[[Process], None]
) -> None:
    start, saved = tmp_path / "start.npz", tmp_path / "end.safetensors"
    write(start, ZEROS)
    with Process("broker", *ANY_PORTS, "--load", start, "--save", saved, "--stopped") as process:
        address = address_of(process)
        with Admin(address) as admin, Worker(address) as worker:
            for _ in range(50):
                worker.push(ONES)
            while admin.status()["queued"] < 50:
                pass
            admin.start()

            end(process)

            worker.flush(timeout=30)
        assert process.wait() == 0
        for phrase in ("broker ready", "worker joined", "updater started", "shutting down", "parameters saved"):
            assert sum(phrase in line for line in process.lines) == 1, phrase
    assert as_nest(read(saved))["w"].tolist() == [-50] * 100


def test_a_save_that_fails_is_told_and_the_broker_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    with Process("broker", *ANY_PORTS, "--save", folder / "w.safetensors") as process:
        with Admin(address_of(process)) as admin:
            admin.set_model_parameters(ZEROS)
            assert admin.save() == str(folder / "w.safetensors")
            (folder / "w.safetensors").unlink()
            folder.rmdir()
            with pytest.raises(ControlError) as caught:
                admin.save()
            assert caught.value.code == "failed"
            assert admin.status()["running"]
        process.terminate()
        assert process.wait() == 2
        assert any(line.startswith("error: cannot save the parameters") for line in process.lines)


def test_destroy_ends_the_process_with_0() -> None:
    with Process("broker", *ANY_PORTS) as process:
        with Admin(address_of(process)) as admin:
            admin.destroy()
        assert process.wait() == 0


def test_the_log_is_json_where_asked_for_and_the_printed_line_stays_as_it_is() -> None:
    with Process("broker", *ANY_PORTS, "--log-json") as process:
        address_of(process)
        process.terminate()
        assert process.wait() == 0
        records = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert [record for record in records if "broker ended" in json.dumps(record)]


def test_mode_and_learning_rate_change_while_gradients_are_applied() -> None:
    with (
        Broker(optimizer=SGD(lr=1.0), parameters=ZEROS) as broker,
        Admin(broker.address) as admin,
        Worker(broker.address) as worker,
    ):
        expected = 0.0
        for mode, lr in (("descent", 1.0), ("ASCENT", 1.0), (None, 0.5), ("descent", 0.25)):
            in_force = admin.set_parameters(mode, lr=lr)
            assert in_force["lr"] == lr
            for _ in range(20):
                worker.push(ONES)
            worker.flush()
            expected += 20 * lr * (-1 if in_force["mode"] == "descent" else 1)
            assert worker.pull().parameters["w"].tolist() == [expected] * 100

        with pytest.raises(InvalidMode):
            admin.set_parameters("sideways")
        with pytest.raises(ConfigError, match="lr"):
            admin.set_parameters("ascent", lr=-1)
        with pytest.raises(ConfigError, match="colour"):
            admin.set_parameters(colour=1)
        assert admin.status()["mode"] == "descent"
        assert admin.status()["optimizer"]["lr"] == 0.25


def test_clear_drops_what_is_queued_and_its_worker_is_done_with_it() -> None:
    with (
        Broker(parameters=ZEROS, stopped=True) as broker,
        Admin(broker.address) as admin,
        Worker(broker.address) as worker,
    ):
        for _ in range(10):
            worker.push(ONES)
        while admin.status()["queued"] < 10:
            pass
        assert admin.clear_gradients() == 10
        worker.flush(timeout=30)
        admin.start()
        worker.push(ONES)
        worker.flush(timeout=30)
        assert worker.pull().version == 1
        assert admin.status()["cleared"] == 10


def test_parameters_replaced_while_workers_push_refuse_what_no_longer_fits() -> None:
    with (
        Broker(parameters=ZEROS, stopped=True) as broker,
        Admin(broker.address) as admin,
        Worker(broker.address) as worker,
    ):
        for _ in range(3):
            worker.push(ONES)
        while admin.status()["queued"] < 3:
            pass
        admin.set_model_parameters({"v": np.zeros(5)})
        admin.start()
        for _ in range(3):
            with pytest.raises(Exception, match="layout"):
                worker.flush(timeout=30)
        worker.flush(timeout=30)
        worker.push({"v": np.ones(5)})
        worker.flush(timeout=30)
        assert worker.pull().parameters["v"].tolist() == [-1] * 5
        assert admin.status()["refused"] == {"layout": 3}


def test_a_draining_stop_waits_for_the_queue_and_returns() -> None:
    with (
        Broker(parameters={"w": np.zeros(200_000)}) as broker,
        Admin(broker.address) as admin,
        Worker(broker.address) as worker,
    ):
        sender = threading.Thread(target=lambda: [worker.push({"w": np.ones(200_000)}) for _ in range(100)])
        sender.start()
        while admin.status()["version"] < 5:
            pass
        assert admin.stop(drain=True)
        assert not admin.stop()
        version = admin.status()["version"]
        assert worker.pull().version == version
        assert admin.start()
        sender.join()
        worker.flush()
        assert worker.pull().version == 100
