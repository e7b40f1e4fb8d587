"""What the demo shows and draws, and how it declines; the whole of it runs in ``scenarios/test_demo.py``."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distgrad.command import main
from distgrad_worker import demo as demo_module
from distgrad_worker.demo import find_example, way_to_look_on
from distgrad_worker.demo_view import Point, ProgressView, rate, workers_table


def point(seconds: float, version: int, train_loss: float | None = 0.5) -> Point:
    return Point(seconds=seconds, version=version, train_loss=train_loss, test_loss=0.4, accuracy=0.975)


def console(**options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, highlight=False, **options), file


def test_the_example_of_a_checkout_is_found() -> None:
    assert find_example().name == "digits.py"


def test_the_example_inside_an_installed_package_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder ``examples`` above the installed package must not be taken for ours."""
    inside = tmp_path / "lib" / "site" / "distgrad_worker" / "examples" / "digits.py"
    above = tmp_path / "lib" / "examples" / "digits.py"
    for place in (inside, above):
        place.parent.mkdir(parents=True)
        place.touch()
    monkeypatch.setattr(demo_module, "__file__", str(inside.parents[1] / "demo.py"))

    assert find_example() == inside


def test_a_missing_example_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "__file__", str(tmp_path / "a" / "b" / "demo.py"))

    with pytest.raises(FileNotFoundError, match=r"neither .*a/b/examples/digits.py nor .*/examples/digits.py"):
        find_example()


@pytest.mark.parametrize(
    ("options", "missing"), [([], "scikit-learn and matplotlib"), (["--no-picture"], "scikit-learn")]
)
def test_without_the_extra_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], missing: str
) -> None:
    find_spec = importlib.util.find_spec
    hidden = ("sklearn", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))

    assert main(["demo", *options]) == 2
    mend = 'pip install ".[demo]" in the clone of distgrad'
    assert capsys.readouterr().err == f"error: the demo needs {missing}: {mend}\n"


def test_a_picture_that_cannot_be_written_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    assert main(["demo", "--out", str(tmp_path / "nowhere" / "x.png")]) == 2
    assert f"cannot write into the folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_a_rate_is_gradients_over_seconds() -> None:
    assert rate([point(1.0, 100), point(3.0, 500)]) == 200
    assert rate([point(1.0, 100)]) == 0
    assert rate([]) == 0


def test_where_nobody_watches_a_line_is_printed_each_second_and_at_the_end() -> None:
    screen, file = console(force_terminal=False)

    with ProgressView(screen, total=400) as view:
        for tenth in range(25):
            view.show(point(tenth / 10, 10 * tenth, None if tenth < 5 else 0.5))
        view.show(point(2.5, 400))

    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "100", "200", "400"]
    assert lines[0].split("gradients")[1].split() == ["0/s", "accuracy", "97.5%"]
    assert lines[1].split("gradients")[1].split() == ["100/s", "loss", "0.500", "accuracy", "97.5%"]


def test_on_a_terminal_one_line_is_redrawn() -> None:
    screen, file = console(force_terminal=True, color_system=None)

    with ProgressView(screen, total=400) as view:
        view.show(point(0.0, 0))
        view.show(point(2.0, 400))

    assert "400 of 400 gradients" in file.getvalue()
    assert "\x1b[2K" in file.getvalue()


def test_the_table_has_a_row_for_each_worker_and_one_for_all() -> None:
    screen, file = console()
    worker = {"id": "w-0", "applied": 300, "settled": 301, "refused": 1, "loss": 0.25}
    other = {"id": "w-1", "applied": 100, "settled": 100, "refused": 0, "loss": None}

    screen.print(
        workers_table(
            [
                {**worker, "staleness_mean": 2.0, "staleness_max": 7},
                {**other, "staleness_mean": 4.0, "staleness_max": 5},
            ]
        )
    )

    rows = [line.replace("│", " ").split() for line in file.getvalue().splitlines()]
    assert ["w-0", "300", "301", "1", "2.0", "7", "0.250"] in rows
    assert ["w-1", "100", "100", "0", "4.0", "5"] in rows
    assert ["all", "400", "401", "1", "2.5", "7"] in rows


@pytest.fixture(scope="module")
def draw() -> Callable[..., None]:
    """Draw once: matplotlib then keeps its fonts open, which the watch for leaks must not blame on a test."""
    pytest.importorskip("matplotlib")
    from distgrad_worker.picture import draw

    draw([point(0.0, 0)], Path(os.devnull), title="warm-up", goal=0.95)
    return draw


@pytest.mark.parametrize("points", [[point(0.0, 0, None)], [point(0.0, 0, None), point(1.0, 400)]])
def test_a_picture_is_drawn_of_however_few_points(
    draw: Callable[..., None], tmp_path: Path, points: list[Point]
) -> None:
    draw(points, tmp_path / "x.png", title="one", goal=0.95)

    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_to_look_on_with_is_one_that_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `make demo` there is an environment that is not active, and no extra for `distgrad top` in it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textual" else find_spec(name))
    monkeypatch.setenv("PATH", os.devnull)

    program, *words = way_to_look_on("tcp://127.0.0.1:1").split()

    assert words == ["admin", "tcp://127.0.0.1:1", "status", "--watch"]
    assert not Path(program).is_absolute()
    assert os.access(program, os.X_OK)
