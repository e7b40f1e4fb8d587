"""``distgrad admin``: what a person types, what the broker is asked, what the person reads."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from click.testing import CliRunner, Result

from distgrad import admin_command, codec, parameter_files
from distgrad.admin_command import admin
from distgrad.layout import Layout
from support.scripted_broker import Request, ScriptedBroker

STATUS = {
    "version": 12,
    "running": True,
    "queued": 0,
    "refused": {"not_finite": 3},
    "incarnation": "one",
    "workers": 2,
    "rate": 1.23456789,
    "optimizer": None,
}


class FakeBroker:
    """Answers each operation as a broker would that holds one set of parameters."""

    def __init__(self) -> None:
        self.nest: Any = {"layer": {"w": np.arange(3.0, dtype=np.float32)}, "b": np.ones(1)}
        self.workers: list[dict[str, Any]] = [{"id": "w1", "settled": 4, "cursor": b"\x01"}, {"id": "w2"}]
        self.refusal: tuple[str, str] | None = None
        self.n_answers = 10**9
        self.set_nest: Any = None

    def __call__(self, request: Request) -> None:
        self.n_answers -= 1
        if self.refusal is not None or self.n_answers < 0:
            request.fail(*(self.refusal or ("failed", "that was the last answer")))
        else:
            request.answer(*self._frames(request), **self._keys(request))

    def _keys(self, request: Request) -> Any:
        if request.op == "get":
            layout = Layout.of(self.nest)
            parts = len(layout.parts())
            named = {"fingerprint": layout.fingerprint, "state": ("one", 1, 12)}
            return {"unchanged": False, "layout": True, "parts": parts, "first": 0, "token": None, **named}
        if request.op == "set":
            layout = Layout.from_frame(request.frames[0])
            arenas = [np.empty(arena.size, arena.dtype) for arena in layout.arenas]
            codec.fill(layout, request.frames[1:], arenas)
            self.set_nest = layout.nest(layout.views(arenas))
        return {
            "status": {"status": STATUS},
            "workers": {"workers": self.workers},
            "start": {"changed": True},
            "stop": {"changed": True, "drained": True},
            "clear": {"cleared": 5},
            "configure": {"settings": {"mode": "ascent", "lr": 0.5, **request.header.get("settings", {})}},
            "save": {"path": "/var/lib/p.safetensors"},
            "set": {"changed": True},
            "destroy": {},
        }[request.op]

    def _frames(self, request: Request) -> list[Any]:
        if request.op != "get":
            return []
        layout = Layout.of(self.nest)
        return [layout.to_frame(), *codec.encode(layout, layout.pack(self.nest), trained_only=False)]


class Shell:
    """Run commands against the fake broker."""

    def __init__(self, fake: FakeBroker, broker: ScriptedBroker) -> None:
        self.fake, self.broker = fake, broker

    def __call__(self, *args: str, text: str | None = None) -> Result:
        return CliRunner().invoke(admin, [self.broker.address, *args], input=text)

    def asked(self, op: str) -> dict[str, Any]:
        (header,) = [header for header in self.broker.headers if header["op"] == op]
        return header


@pytest.fixture
def shell() -> Iterator[Shell]:
    fake = FakeBroker()
    with ScriptedBroker(fake) as broker:
        yield Shell(fake, broker)


def test_start_stop_and_clear_say_what_happened(shell: Shell) -> None:
    assert shell("start").output == "started\n"
    assert shell("clear").output == "dropped 5 gradients\n"
    assert shell("stop").output == "stopped\n"
    assert shell.asked("stop")["drain"] is True


def test_stop_without_draining(shell: Shell) -> None:
    assert shell("stop", "--no-drain").exit_code == 0

    assert shell.asked("stop")["drain"] is False


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_get_writes_a_file_and_says_which_version(shell: Shell, tmp_path: Path, suffix: str) -> None:
    result = shell("get", "--out", str(tmp_path / f"p{suffix}"))

    assert result.exit_code == 0, result.output
    assert "version 12, 2 arrays" in result.output
    found = parameter_files.read(tmp_path / f"p{suffix}")
    np.testing.assert_array_equal(found["layer.w"], [0, 1, 2])
    assert sorted(found) == ["b", "layer.w"]


def test_get_can_follow_and_writes_every_new_version(shell: Shell, tmp_path: Path) -> None:
    shell.fake.n_answers = 3

    result = shell("get", "--out", str(tmp_path / "p.npz"), "--follow", "--every", "0")

    assert result.output.count("version 12, 2 arrays") == 3
    assert result.exit_code == 1
    assert "that was the last answer" in result.output
    assert [header["newer_than"] for header in shell.broker.headers] == [None, *[["one", 1, 12]] * 3]
    np.testing.assert_array_equal(parameter_files.read(tmp_path / "p.npz")["layer.w"], [0, 1, 2])


def test_get_into_an_unknown_kind_of_file_asks_the_broker_nothing(shell: Shell, tmp_path: Path) -> None:
    result = shell("get", "--out", str(tmp_path / "p.pt"))

    assert result.exit_code == 2
    assert ".safetensors or .npz" in result.output
    assert shell.broker.headers == []


def test_get_without_parameters_is_refused_in_a_sentence(shell: Shell, tmp_path: Path) -> None:
    shell.fake.refusal = ("no_parameters", "nothing was set")

    result = shell("get", "--out", str(tmp_path / "p.npz"))

    assert result.exit_code == 1
    assert "no parameters" in result.output
    assert list(tmp_path.iterdir()) == []


def test_set_keeps_the_structure_that_the_broker_has(shell: Shell, tmp_path: Path) -> None:
    parameter_files.write(tmp_path / "p.npz", {"layer": {"w": np.full(7, 2.0)}, "b": np.zeros(2)})

    result = shell("set", str(tmp_path / "p.npz"))

    assert result.exit_code == 0, result.output
    assert "set 2 arrays" in result.output
    np.testing.assert_array_equal(shell.fake.set_nest["layer"]["w"], np.full(7, 2.0))


def test_set_of_other_names_becomes_a_flat_dict(shell: Shell, tmp_path: Path) -> None:
    parameter_files.write(tmp_path / "p.safetensors", {"other": {"w": np.zeros(2)}})

    assert shell("set", str(tmp_path / "p.safetensors")).exit_code == 0

    assert list(shell.fake.set_nest) == ["other.w"]


@pytest.mark.parametrize("name", ["missing.npz", "bad.safetensors", "bad.npz", "folder.npz"])
def test_a_bad_file_is_one_line_and_changes_nothing(shell: Shell, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    for bad in ("bad.safetensors", "bad.npz"):
        (tmp_path / bad).write_bytes(b"garbage")

    result = shell("set", str(tmp_path / name))

    assert result.exit_code == 2
    assert result.output.startswith("error: cannot read")
    assert result.output.count("\n") == 1
    assert shell.broker.headers == []


def test_configure_sends_mode_and_numbers_and_prints_what_is_in_force(shell: Shell) -> None:
    result = shell("configure", "mode=Descent", "lr=1e-2", "nesterov=true")

    assert result.exit_code == 0, result.output
    assert shell.asked("configure")["settings"] == {"mode": "descent", "lr": 0.01, "nesterov": True}
    assert result.output.splitlines() == ["mode=descent", "lr=0.01", "nesterov=True"]


def test_configure_without_settings_only_prints(shell: Shell) -> None:
    assert shell("configure").output.splitlines() == ["mode=ascent", "lr=0.5"]


@pytest.mark.parametrize("setting", ["grace=soon", "policy_settings={limit"])
def test_a_setting_that_cannot_be_read_asks_nothing(shell: Shell, setting: str) -> None:
    assert shell("configure", setting).exit_code == 2
    assert shell.broker.headers == []


@pytest.mark.parametrize("setting", ["lr", "lr=", "=1", "mode=sideways"])
def test_a_bad_setting_is_wrong_usage_and_asks_nothing(shell: Shell, setting: str) -> None:
    result = shell("configure", setting)

    assert result.exit_code == 2
    assert "must" in result.output
    assert shell.broker.headers == []


def test_status_as_json_is_one_line_that_a_program_can_read(shell: Shell) -> None:
    result = shell("status", "--json")

    assert json.loads(result.output) == STATUS
    assert result.output.count("\n") == 1


def test_status_for_people_names_every_value(shell: Shell) -> None:
    output = shell("status").output

    assert shell.broker.address in output
    for part in ("version", "12", "refused.not_finite", "3", "1.23457"):
        assert part in output


@pytest.mark.parametrize("form", [["--json"], []])
def test_watch_goes_on_until_the_broker_stops_answering(shell: Shell, form: list[str]) -> None:
    shell.fake.n_answers = 3

    result = shell("status", "--watch", "--every", "0.05", *form)

    assert shell.broker.ops == ["status"] * 4
    assert result.exit_code == 1
    assert "that was the last answer" in result.output
    if form:
        assert [json.loads(line) for line in result.output.splitlines()[:3]] == [STATUS] * 3


def test_workers_are_listed_with_everything_known_of_them(shell: Shell) -> None:
    lines = [line.split() for line in shell("workers", "--all").output.splitlines()]

    assert lines == [["id", "settled", "cursor"], ["w1", "4", '"01"'], ["w2", "-", "-"]]
    assert json.loads(shell("workers", "--json").output) == [
        {"id": "w1", "settled": 4, "cursor": "01"},
        {"id": "w2"},
    ]


def test_workers_without_an_option_shows_what_is_asked_first(shell: Shell) -> None:
    head, *rows = [line.split() for line in shell("workers").output.splitlines()]

    assert head == ["id", "state", "applied", "superseded", "refused", "queued", "staleness", "loss", "seen"]
    assert [row[0] for row in rows] == ["w1", "w2"]


@pytest.mark.parametrize("command", ["workers", "status"])
def test_a_loss_that_is_no_number_is_null_in_json(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(STATUS, "loss", float("nan"))
    shell.fake.workers = [{"id": "w1", "loss": float("nan")}]

    found = json.loads(shell(command, "--json").output, parse_constant=pytest.fail)

    assert (found[0] if command == "workers" else found)["loss"] is None


def test_no_workers_is_said(shell: Shell) -> None:
    shell.fake.workers = []

    assert shell("workers").output == "no workers yet\n"


def test_what_a_peer_calls_itself_cannot_move_the_cursor_or_colour_the_terminal(shell: Shell) -> None:
    shell.fake.workers = [{"id": "\x1b[2J[red]x\r\n"}]

    output = shell("workers").output

    assert "\x1b" not in output
    assert "\\x1b[2J[red]x\\r\\n" in output


def test_save_tells_the_path(shell: Shell) -> None:
    assert shell("save").output == "saved to /var/lib/p.safetensors\n"


def test_destroy_asks_first(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_command, "GONE_WITHIN_S", 0.0)  # the scripted broker stays
    assert shell("destroy", text="n\n").exit_code == 1
    assert shell.broker.ops == []

    assert shell("destroy", text="y\n").exit_code == 0
    assert shell.broker.ops == ["status", "destroy"]


def test_destroy_with_yes_asks_nobody_and_says_that_something_still_listens(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_command, "GONE_WITHIN_S", 0.0)

    assert shell("destroy", "--yes").output.startswith("destroyed; something still listens at ")


@pytest.mark.parametrize(
    ("code", "exit_code"), [("forbidden", 1), ("restarted", 1), ("destroyed", 1), ("failed", 1), ("invalid", 2)]
)
def test_an_error_of_the_broker_is_one_line_and_an_exit_code(shell: Shell, code: str, exit_code: int) -> None:
    shell.fake.refusal = (code, "because of this")

    result = shell("start")

    assert result.exit_code == exit_code
    assert result.output == "error: because of this\n"


def test_an_absent_broker_is_exit_code_3_and_names_the_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

        result = CliRunner().invoke(admin, ["--timeout", "0.3", address, "status"])

    assert result.exit_code == 3
    assert address in result.output
    assert "Traceback" not in result.output


def test_a_missing_key_file_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(admin, ["--keys", str(tmp_path / "no.key"), "127.0.0.1:1", "status"])

    assert result.exit_code == 2
    assert "no.key" in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["http://x:1", "status"],
        ["127.0.0.1:99999", "status"],
        ["h", "--nope", "status"],
        ["--timeout", "0", "h", "status"],
    ],
)
def test_a_bad_address_or_option_is_wrong_usage(args: list[str]) -> None:
    result = CliRunner().invoke(admin, args)

    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_options_may_stand_behind_the_address(shell: Shell) -> None:
    assert shell("--timeout", "5", "status", "--json").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--timeout", "5", "--json"],
        ["status", "--json", "--timeout=5"],
        ["--timeout", "5", "status", "--json"],
    ],
)
def test_options_may_stand_behind_the_command_too(shell: Shell, words: list[str]) -> None:
    assert json.loads(shell(*words).output) == STATUS


def test_an_option_behind_the_command_counts(shell: Shell, tmp_path: Path) -> None:
    result = shell("status", "--keys", str(tmp_path / "no.key"))

    assert result.exit_code == 2
    assert "no.key" in result.output


def test_the_address_comes_before_the_command_and_help_needs_no_broker() -> None:
    result = CliRunner().invoke(admin, ["--help"])

    assert result.exit_code == 0
    assert "ADDRESS" in result.output
    for command in ("start", "stop", "clear", "get", "set", "configure", "status", "workers", "save", "destroy"):
        assert f"\n  {command} " in result.output
        assert CliRunner().invoke(admin, ["127.0.0.1:1", command, "--help"]).exit_code == 0


def test_msgpack_and_json_agree_on_the_status(shell: Shell) -> None:
    assert msgpack.unpackb(msgpack.packb(STATUS)) == json.loads(shell("status", "--json").output)
