"""``distgrad admin ADDRESS configure``: what a person types is what a real broker has in force."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from distgrad.admin_command import admin
from support.broker_process import broker_process

DOCS = Path(__file__).resolve().parents[2] / "docs"
# In a row of a table or in prose; N stands for a number.
DOCUMENTED = sorted(
    {
        words
        for page in DOCS.glob("*.md")
        for words in re.findall(r"`(?:distgrad admin \S+ )?configure ((?:\w+=\w[^ `]* ?)+)`", page.read_text())
    }
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with broker_process("--optimizer", "sgd", "--lr", "0.1") as (address, _):
        yield address


@pytest.fixture(autouse=True)
def as_it_began(address: str) -> None:
    configure(address, "policy=sync")  # what is named although it is in force keeps its settings
    done = configure(address, "policy=async", "mode=descent", "lr=0.1", "reduction=mean", "weigh_by_examples=false")
    assert done.exit_code == 0, done.output


def configure(address: str, *settings: str) -> Result:
    return CliRunner().invoke(admin, [address, "configure", *settings])


@pytest.mark.parametrize(
    ("typed", "in_force"),
    [
        (["policy=sync", "quorum=3"], ["policy=sync", "quorum=3"]),
        (["policy=sync", "quorum=2", "grace=250ms"], ["grace=0.25"]),
        (["policy=sync", "quorum=2", "grace=2"], ["grace=2"]),
        (["policy=buffered", "buffer_size=7"], ["policy=buffered", "buffer_size=7"]),
        (["policy=bounded", "bound=2"], ["policy=bounded", "bound=2"]),
        (["max_staleness=3"], ["policy=async", "max_staleness=3"]),
        (["staleness_scaling=sqrt"], ["staleness_scaling=sqrt"]),
        (["staleness_decay=0.5"], ["staleness_decay=0.5"]),
        (["reduction=sum"], ["reduction=sum"]),
        (["weigh_by_examples=true"], ["weigh_by_examples=True"]),
        (["mode=ascent"], ["mode=ascent"]),
        (["lr=1"], ["lr=1"]),
        (["lr=1e-3", "nesterov=false"], ["lr=0.001"]),
        (["policy=async", "policy_settings={max_staleness = 4}"], ["max_staleness=4"]),
    ],
)
def test_every_kind_of_setting_can_be_changed(address: str, typed: list[str], in_force: list[str]) -> None:
    done = configure(address, *typed)

    assert done.exit_code == 0, done.output
    assert set(in_force) <= set(done.output.splitlines())


def test_a_setting_of_the_policy_in_force_can_be_unset(address: str) -> None:
    configure(address, "policy=sync", "quorum=2", "grace=1s")

    done = configure(address, "grace=none")

    assert done.exit_code == 0, done.output
    assert "quorum=2" in done.output.splitlines()
    assert "grace=1" not in done.output.splitlines()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("policy=sink", "policy must be one of async, sync, bounded, buffered"),
        ("lr=fast", "lr must be a number"),
        ("max_staleness=3.5", "must be a whole number, got 3.5"),
        ("max_staleness=99999999999999999999", "must be a whole number"),
        ("reduction=median", "reduction must be one of mean, sum"),
        ("quorum=3", "policy 'async' has no quorum"),
        ("lrr=3", "lrr"),
        ("grace=soon", "grace: expected a time such as 30s"),
        ("policy_settings={limit", "policy_settings must be a TOML inline table"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_and_changes_nothing(address: str, typed: str, message: str) -> None:
    before = configure(address).output

    done = configure(address, typed)

    assert done.exit_code == 2
    assert message in done.output
    assert done.output.startswith("error: ")
    assert configure(address).output == before


@pytest.mark.parametrize("words", DOCUMENTED)
def test_what_the_pages_show_works(address: str, words: str) -> None:
    done = configure(address, *words.replace("=N", "=2").split())

    assert done.exit_code == 0, done.output


def test_the_pages_show_some() -> None:
    assert "policy=sync quorum=3" in DOCUMENTED


def test_the_help_tells_of_the_policy() -> None:
    done = CliRunner().invoke(admin, ["127.0.0.1", "configure", "--help"])

    assert "policy=sync quorum=3" in done.output
