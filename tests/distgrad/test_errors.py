from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

import distgrad
from distgrad import errors
from distgrad.errors import (
    BrokerUnreachable,
    ConfigError,
    ControlError,
    DataDamaged,
    Destroyed,
    DistgradError,
    GradientRefused,
    InvalidMode,
    LayoutError,
    NoParameters,
    StateError,
    from_code,
)

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DistgradError)]
CODES = [
    "malformed",
    "protocol",
    "unknown_op",
    "forbidden",
    "restarted",
    "fenced",
    "unknown_worker",
    "too_many_workers",
    "too_large",
    "no_parameters",
    "revoked",
    "invalid",
    "failed",
    "pending",
    "history_lost",
    "destroyed",
]


def example(kind: type[DistgradError]) -> DistgradError:
    if issubclass(kind, ControlError):
        return kind("code", "a sentence", hint="a hint")
    if issubclass(kind, InvalidMode):
        return kind("sideways")
    if issubclass(kind, LayoutError):
        return kind("a sentence", leaf="a.b")
    if issubclass(kind, GradientRefused):
        return kind("not_finite", "a sentence", leaf="a.b", number=7)
    if issubclass(kind, DataDamaged):
        return kind("a sentence", path="a/file", offset=64, hint="a hint")
    return kind("a sentence", hint="a hint")


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickling_with_its_fields(kind: type[DistgradError]) -> None:
    error = example(kind)

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    assert again.args == error.args


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_in_the_tree_of_the_docstring(kind: type[DistgradError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", ALL)
def test_every_error_can_be_imported_from_the_package_and_is_on_the_page_of_names(kind: type[DistgradError]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "names.md").read_text()

    assert getattr(distgrad, kind.__name__) is kind
    assert kind.__name__ in distgrad.__all__
    assert kind is DistgradError or f"\n| `{kind.__name__}` |" in page


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(ConfigError, ValueError), (StateError, RuntimeError), (BrokerUnreachable, TimeoutError)],
)
def test_branches_are_also_what_python_programs_catch(kind: type[DistgradError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise example(kind)


def test_an_invalid_mode_names_the_allowed_ones() -> None:
    assert "'descent' or 'ascent'" in str(InvalidMode("sideways"))


@pytest.mark.parametrize("code", CODES)
def test_every_code_of_the_wire_becomes_an_error_with_the_brokers_sentence(code: str) -> None:
    error = from_code(code, "a sentence")

    assert str(error) == "a sentence"
    if isinstance(error, ControlError):
        assert error.code == code


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("forbidden", errors.Forbidden),
        ("restarted", errors.BrokerRestarted),
        ("fenced", errors.Fenced),
        ("revoked", errors.SnapshotRevoked),
        ("no_parameters", NoParameters),
        ("destroyed", Destroyed),
        ("invalid", ConfigError),
        ("of a later version", ControlError),
    ],
)
def test_codes_that_programs_tell_apart_have_leaves(code: str, kind: type[DistgradError]) -> None:
    assert type(from_code(code, "a sentence")) is kind
