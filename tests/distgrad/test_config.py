from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distgrad.config import Loaded, fields, load, options, setting
from distgrad.errors import ConfigError
from distgrad.quantities import parse_bytes, parse_seconds


@dataclass(frozen=True)
class Example:
    control: str = setting("tcp://127.0.0.1:5556", help="Where to listen.")
    mode: str = setting("descent", help="Which way.", choices=("descent", "ascent"))
    lr: float | None = setting(None, help="Step size.", above=0)
    momentum: float = setting(0.0, help="Momentum.", minimum=0, maximum=1)
    queue_bytes: int | None = setting(None, help="Memory for gradients.", unit="bytes", minimum=1)
    silent_after: float = setting(30.0, help="Lease.", unit="seconds", above=0)
    threads: int = setting(1, help="Threads.", minimum=1, env="DISTGRAD_NUM_THREADS")
    keys: Path | None = setting(None, help="Key folder.")
    insecure: bool = setting(False, help="Bind anyway.")
    token: str | None = setting(None, help="Password.", secret=True)

    def __post_init__(self) -> None:
        if self.momentum and self.lr is None:
            raise ConfigError("momentum needs lr")


@dataclass(frozen=True)
class Needy:
    name: str = setting(help="A name.")


def loaded(
    flags: dict[str, Any] | None = None, file: Path | None = None, environ: dict[str, str] | None = None
) -> Loaded[Example]:
    return load(Example, flags or {}, file, environ or {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def test_without_anything_all_is_default() -> None:
    result = loaded()

    assert result.config == Example()
    assert set(result.origins.values()) == {"default"}


def test_flag_beats_variable_beats_file_beats_default(file: Path) -> None:
    file.write_text('mode = "ascent"\nlr = 1\nthreads = 2\n')
    environ = {"DISTGRAD_LR": "2", "DISTGRAD_NUM_THREADS": "3", "DISTGRAD_THREADS": "9"}

    result = loaded({"threads": "4", "lr": None}, file, environ)

    assert (result.config.mode, result.config.lr, result.config.threads) == ("ascent", 2.0, 4)
    assert result.config.momentum == 0.0
    assert result.origins["mode"] == str(file)
    assert result.origins["lr"] == "DISTGRAD_LR"
    assert result.origins["threads"] == "--threads"
    assert result.origins["momentum"] == "default"


def test_an_empty_variable_counts_as_not_set() -> None:
    assert loaded(environ={"DISTGRAD_LR": ""}).config.lr is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("queue_bytes", "256MiB", 256 * 2**20),
        ("silent_after", "1m", 60.0),
        ("lr", "1e-3", 1e-3),
        ("threads", "8", 8),
        ("keys", "some/folder", Path("some/folder")),
        ("insecure", "yes", True),
        ("insecure", "FALSE", False),
        ("mode", "ASCENT", "ascent"),
    ],
)
def test_text_becomes_the_fields_type(name: str, text: str, value: object) -> None:
    got = getattr(
        loaded(environ={field.variable: text for field in fields(Example) if field.name == name}).config, name
    )

    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("queue_bytes = 1024", 1024),
        ('queue_bytes = "1 KiB"', 1024),
        ("silent_after = 5", 5.0),
        ('silent_after = "5s"', 5.0),
        ("lr = 1", 1.0),
        ("insecure = true", True),
    ],
)
def test_the_file_may_say_it_in_toml_or_as_text(file: Path, line: str, value: object) -> None:
    file.write_text(line)

    got = getattr(loaded(file=file).config, line.split()[0])

    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("threads = 0", "threads: expected at least 1, got 0"),
        ("threads = 1.5", "threads: expected a whole number, got 1.5"),
        ('threads = "two"', "threads: expected a whole number, got 'two'"),
        ("threads = true", "threads: expected a whole number, got True"),
        ("lr = 0", "lr: expected more than 0, got 0"),
        ("lr = nan", "lr: expected a finite number, got nan"),
        ("lr = inf", "lr: expected a finite number, got inf"),
        ("lr = [1]", "lr: expected a number"),
        ('lr = "fast"', "lr: expected a number, got 'fast'"),
        ("momentum = 2", "momentum: expected at least 0 and at most 1, got 2"),
        ('queue_bytes = "many"', "queue_bytes: expected a number of bytes such as"),
        ("queue_bytes = 1.5", "queue_bytes: expected a whole number"),
        ('silent_after = "0s"', "silent_after: expected more than 0 seconds, got 0"),
        ('mode = "sideways"', "mode: expected one of descent, ascent, got 'sideways'"),
        ("mode = 1", "mode: expected text, got 1"),
        ("insecure = 1", "insecure: expected true or false, got 1"),
        ("keys = 1", "keys: expected text, got 1"),
    ],
)
def test_impossible_values_are_refused_naming_file_key_and_what_is_allowed(file: Path, line: str, message: str) -> None:
    file.write_text(line)

    with pytest.raises(ConfigError) as caught:
        loaded(file=file)

    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_bad_flag_or_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--threads: expected at least 1"):
        loaded({"threads": "0"})
    with pytest.raises(ConfigError, match=r"^DISTGRAD_NUM_THREADS: expected at least 1"):
        loaded(environ={"DISTGRAD_NUM_THREADS": "0"})


def test_a_table_is_refused_and_where_settings_stand_is_said(file: Path) -> None:
    file.write_text("[broker]\nlr = 1.0\n")

    with pytest.raises(ConfigError, match=r"unknown table \[broker\]; settings stand at the top level") as caught:
        loaded(file=file)

    assert caught.value.hint == "take the line [broker] out"


def test_an_unknown_key_is_refused_with_the_known_ones_and_the_nearest(file: Path) -> None:
    file.write_text("queue-bytes = 1")

    with pytest.raises(ConfigError, match=r"unknown key 'queue-bytes'; allowed are control, mode, lr") as caught:
        loaded(file=file)

    assert caught.value.hint == "did you mean queue_bytes?"


@pytest.mark.parametrize("text", ["no toml", "a = ", "[x]\n", "\xff = 1"])
def test_what_is_no_settings_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text, encoding="latin-1")

    with pytest.raises(ConfigError, match=r"broker\.toml"):
        loaded(file=file)


def test_a_missing_file_is_said(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        loaded(file=file)
    with pytest.raises(ConfigError, match="cannot read"):
        loaded(file=file.parent)


def test_paths_in_a_file_are_relative_to_it(file: Path) -> None:
    file.write_text('keys = "keys"')

    assert loaded(file=file).config.keys == file.parent / "keys"
    assert loaded({"keys": "/else"}, file).config.keys == Path("/else")
    assert loaded({"keys": "here"}, file).config.keys == Path("here")


def test_what_must_be_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="name is needed: A name") as caught:
        load(Needy, {}, None, {})

    assert caught.value.hint == "give --name"
    assert load(Needy, {"name": "x"}, None, {}).config.name == "x"


def test_the_class_may_refuse_combinations() -> None:
    with pytest.raises(ConfigError, match="momentum needs lr"):
        loaded({"momentum": "0.9"})


def test_the_description_has_every_value_and_origin_and_no_secret(file: Path) -> None:
    file.write_text('token = "hush"\nkeys = "k"\n')

    lines = loaded({"insecure": True}, file).describe().splitlines()

    told = {line.split(" = ")[0]: line for line in lines}
    assert list(told) == [field.name for field in fields(Example)]
    assert told["insecure"].split() == ["insecure", "=", "true", "#", "--insecure"]
    assert told["silent_after"].split() == ["silent_after", "=", "30.0", "#", "default"]
    assert told["control"].startswith('control = "tcp://127.0.0.1:5556"')
    assert told["lr"].startswith("lr = (none)")
    assert told["token"].split() == ["token", "=", "***", "#", str(file)]
    assert not any("hush" in line for line in lines)


def invoke(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @options(Example)
    def example(**flags: Any) -> None:
        seen.update(flags)

    result = CliRunner().invoke(example, arguments)
    assert result.exit_code == 0, result.output
    return seen | {"output": result.output}


def test_every_field_has_a_flag_and_what_is_not_given_is_none() -> None:
    flags = invoke()

    assert {name: value for name, value in flags.items() if name != "output"} == dict.fromkeys(
        [field.name for field in fields(Example)]
    )


def test_flags_reach_the_settings() -> None:
    flags = invoke("--queue-bytes", "1G", "--insecure", "--keys", "k", "--mode", "ascent")
    flags.pop("output")

    config = loaded(flags).config

    assert (config.queue_bytes, config.insecure, config.keys, config.mode) == (2**30, True, Path("k"), "ascent")
    assert invoke("--no-insecure")["insecure"] is False


def test_help_shows_units_choices_and_defaults_but_no_secret_default() -> None:
    shown = invoke("--help")["output"]

    assert "--queue-bytes SIZE" in shown
    assert "--silent-after TIME" in shown
    assert "--mode [descent|ascent]" in shown
    assert "--insecure / --no-insecure" in shown
    assert "[default: 30.0]" in shown


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("1.5G", 3 * 2**29),
        ("2 TiB", 2**41),
        ("7b", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "-1", "1e3", "0.3", "1.0001k", "1 2", "inf", "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("0.5s", 0.5), ("250ms", 0.25), ("2h", 7200), ("1D", 86400)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert math.isclose(parse_seconds(text), seconds)


@pytest.mark.parametrize("text", ["", "s", "1y", "-1s", "nan", "1:30"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_seconds(text)


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_config_error(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        try:
            value = parse(text)
        except ConfigError:
            continue
        assert value >= 0
