"""The documentation says what is true: links, commands, options, examples, and every public function's docstring."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from distgrad import Admin
from distgrad.config import fields
from distgrad.durable.books import Books, MemberBook
from distgrad.durable.replay import Replay
from distgrad.holder import ParameterHolder
from distgrad.quantities import parse_seconds
from distgrad_broker import Broker
from distgrad_broker.config import BrokerConfig
from distgrad_worker import Worker
from support.broker_process import wait_until
from support.key_folders import make_key_folder
from support.processes import Process, run

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("distgrad", "broker", "worker")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in (*SOURCE_ROOTS, "deploy", "deploy/kubernetes")),
    ]
)
MODULES = sorted(path for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
README = (ROOT / "README.md").read_text()
# In front of what was typed on a console: the host, if there are several, and whether by root.
PROMPT = re.compile(r"^\w*[$#] ")
INSTALL = """python3 -m venv ~/distgrad-env
. ~/distgrad-env/bin/activate
pip install ".[fast]"
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_the_index_leads_to_every_page(page: Path) -> None:
    index = (ROOT / "docs" / "index.md").read_text()

    assert page.name == "index.md" or f"({page.name})" in index


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text()

    assert [page.name for page in (ROOT / "docs" / "decisions").glob("*.md") if f"({page.name})" not in listed] == [
        "README.md"
    ]


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = [path for path in MODULES if path.name not in ("__init__.py", "__main__.py")]

    assert [name_of(path) for path in modules if f"(../{name_of(path)})" not in page] == []


# Commands


def commands() -> dict[str, click.Command]:
    return {entry.name: entry.load() for entry in entry_points(group="distgrad.commands")}


def lines_for_a_shell(page: Path) -> Iterator[list[str]]:
    """Yield every command line of a page: those in fenced blocks, and those in the prose that name a command."""
    text = page.read_text()
    for language, block in fenced(text):
        if language in ("sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                typed = line if language == "sh" else PROMPT.sub("", line)
                if language == "sh" or typed != line:  # the rest of a console is what came back
                    yield shlex.split(typed, comments=True)
    for inline in re.findall(r"`((?:distgrad|make) [^`]+)`", prose(text)):
        yield shlex.split(inline)


def is_known(words: list[str]) -> bool:
    """Tell whether every command and option in the words after ``distgrad`` exists."""
    name, *rest = words
    if name in ("--version", "--help", "…"):
        return True
    command = commands().get(name)
    if command is None:
        return False
    options = {"--help"}
    nested = command
    for word in rest:
        if isinstance(nested, click.Group) and word in nested.commands:
            nested = nested.commands[word]
        options |= {
            option
            for parameter in (*command.params, *nested.params)
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
    return all(word.partition("=")[0] in options for word in rest if word.startswith("-"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_mentioned_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    unknown = []
    for words in lines_for_a_shell(page):
        if words[:1] == ["distgrad"] and not is_known(words[1:]):
            unknown.append(words)
        if words[:1] == ["make"] and not {word for word in words[1:] if "=" not in word} <= targets:
            unknown.append(words)

    assert unknown == []


def test_every_command_can_explain_itself() -> None:
    for name, command in commands().items():
        for arguments in (["--help"], *([sub, "--help"] for sub in getattr(command, "commands", ()))):
            result = CliRunner().invoke(command, ["127.0.0.1", *arguments] if name == "admin" else arguments)

            assert result.exit_code == 0, (name, arguments, result.output)


# Examples in the README


def section(title: str) -> list[tuple[str, str]]:
    """Return the fenced blocks under one of the README's headings."""
    _, found, rest = README.partition(f"\n## {title}\n")
    assert found, f"the README has no section {title!r}"
    return fenced(rest.partition("\n## ")[0])


def test_the_readme_has_no_example_that_is_not_run() -> None:
    titles = ("In one process", "On many machines", "When something dies", "Following along")
    run_here = [block for title in titles for block in section(title)]
    others = [block for block in fenced(README) if block not in run_here]

    assert others == [("sh", "make demo\n"), ("sh", INSTALL)], "those two have tests of their own"


def test_the_readmes_example_in_one_process_learns(capsys: pytest.CaptureFixture[str]) -> None:
    [(_, code)] = section("In one process")
    assert len(code.splitlines()) <= 15

    exec(compile(code, "README.md", "exec"), {})

    w0, w1, b = (float(number) for number in re.findall(r"-?\d+\.\d*", capsys.readouterr().out))
    assert (w0, w1, b) == pytest.approx((2.0, -1.0, 0.5), abs=0.2)


def test_the_readmes_example_on_many_machines_learns(tmp_path: Path) -> None:
    """Every line is run as it stands, but for addresses: a machine is a folder here, and ports are free ones."""
    boss, other = tmp_path / "boss", tmp_path / "other"
    boss.mkdir()
    other.mkdir()
    address, printed = "", ""
    blocks = section("On many machines")
    assert sum(len(block.splitlines()) for _, block in blocks) <= 24

    with contextlib.ExitStack() as stack:
        for language, block in blocks:
            if language == "python":
                (other / block.splitlines()[0].removeprefix("# ")).write_text(block)
                continue
            folder = other if "scp " in block else boss
            for program, *words in map(shlex.split, block.splitlines()):
                local = [{"0.0.0.0": "127.0.0.1:0", "boss": address}.get(word, word) for word in words]
                if program == "scp":
                    shutil.copy(boss / words[0].removeprefix("boss:"), other / words[1])
                elif words[0] == "broker":
                    broker = stack.enter_context(Process(*local, cwd=folder))
                    address = broker.wait_for_line(r"control=(\S+)")[1]
                else:
                    assert program == "distgrad", f"how is {program} to be run?"
                    done = run(*local, cwd=folder)
                    assert done.returncode == 0, done.stdout + done.stderr
                    printed += done.stdout
        broker.terminate()
        assert broker.wait() == 0

    learned = load_file(boss / "model.safetensors")
    assert [*learned["w"], *learned["b"]] == pytest.approx([2.0, -1.0, 0.5], abs=0.2)
    assert "version 500" in printed, "two processes pushed 250 gradients each"


def test_the_readmes_example_that_follows_sees_new_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [(_, code)] = section("Following along")
    keys = make_key_folder(tmp_path)
    shutil.copy(keys.read, tmp_path / "evaluator.key")
    monkeypatch.chdir(tmp_path)
    seen: list[float] = []

    with (
        Broker(parameters={"w": np.zeros(1)}, keys=keys.folder) as broker,
        Worker(broker.address, keys=keys.worker) as worker,
    ):

        def evaluate(parameters: dict[str, np.ndarray[Any, Any]]) -> float:
            """Answer each version with an update, and end the loop at the third."""
            seen.append(float(parameters["w"][0]))
            if len(seen) == 3:
                names["reader"].close()
            worker.push({"w": np.ones(1)})
            return seen[-1]

        names: dict[str, Any] = {"evaluate": evaluate}
        exec(compile(code.replace('"boss"', repr(broker.address)), "README.md", "exec"), names)

    assert seen == [0.0, -1.0, -2.0]


@pytest.mark.parametrize(("page", "batches"), [("README.md", 300), ("docs/guarantees.md", 400)])
def test_the_example_that_is_killed_counts_each_batch_once(tmp_path: Path, page: str, batches: int) -> None:
    """Both of its lines are run as they stand, but for ports, killed, and run again."""
    blocks = [block for _, block in fenced((ROOT / page).read_text())]
    [code] = [block for block in blocks if block.startswith("# steady.py")]
    [lines] = [block for block in blocks if "steady:train" in block]
    (tmp_path / "steady.py").write_text(code)
    begin_broker, begin_worker = (shlex.split(line)[1:] for line in lines.splitlines())
    ports = {"DISTGRAD_CONTROL": "127.0.0.1:0", "DISTGRAD_GRADIENTS": "127.0.0.1:0"}

    with contextlib.ExitStack() as stack:

        def start_broker() -> Process:
            broker = stack.enter_context(Process(*begin_broker, cwd=tmp_path, env=ports))
            found = broker.wait_for_line(r"control=(\S+) gradients=(\S+)")
            ports.update(DISTGRAD_CONTROL=found[1], DISTGRAD_GRADIENTS=found[2])
            return broker

        def start_worker() -> Process:
            words = [word.replace("127.0.0.1", ports["DISTGRAD_CONTROL"]) for word in begin_worker]
            return stack.enter_context(Process(*words, cwd=tmp_path))

        broker, worker = start_broker(), start_worker()
        admin = stack.enter_context(Admin(ports["DISTGRAD_CONTROL"]))
        for part in (1, 2, 3):
            wait_until(lambda part=part: admin.status()["version"] > part * batches // 5)  # type: ignore[misc]
            broker.kill()
            if part == 2:
                worker.close()
                worker = start_worker()
            broker = start_broker()
        assert worker.wait() == 0, worker.output()
        counts = {key: admin.status()[key] for key in ("version", "applied", "refused")}
        assert counts == {"version": batches, "applied": batches, "refused": {}}
        goal = [2.0, -1.0] if page == "README.md" else [1.0, 2.0, 3.0, 4.0]
        # Loosely: what was computed while there was no broker is stale.
        assert admin.get_model_parameters()["w"] == pytest.approx(goal, abs=0.2)


# Formats


def test_every_kind_of_record_and_every_key_of_a_checkpoint_is_documented() -> None:
    journal, checkpoint = ((ROOT / "docs" / name).read_text() for name in ("journal.md", "checkpoint.md"))
    kinds = vars(Replay(ParameterHolder(), Books()))["_kinds"]
    keys = [field.name for kind in (Books, MemberBook) for field in dataclasses.fields(kind)]

    assert [kind for kind in kinds if f"\n| `{kind}` |" not in journal] == []
    assert [key for key in keys if f"`{key}`" not in checkpoint] == []


# Configuration


def test_every_setting_is_documented_as_it_is() -> None:
    rows = {
        row[0].strip("`"): row[1:]
        for row in (
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in (ROOT / "docs" / "configuration.md").read_text().splitlines()
            if line.startswith("| `")
        )
        if len(row) == 6
    }

    assert list(rows) == [field.name for field in fields(BrokerConfig)]
    for field in fields(BrokerConfig):
        flag, variable, unit, default, _ = rows[field.name]
        assert (flag, variable) == (f"`{field.flag}`", f"`{field.variable}`")
        assert all(f"`{choice}`" in unit for choice in field.setting.choices)
        assert (field.setting.unit or "") in unit
        if field.default is not None:
            assert default == f"`{str(field.default).lower() if field.kind is bool else field.default}`"


def test_the_sample_file_has_every_setting_with_its_default() -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", (ROOT / "deploy" / "broker.toml").read_text(), flags=re.MULTILINE)
    sample = tomllib.loads(text)

    assert sample.keys() == {field.name for field in fields(BrokerConfig)}
    for field in fields(BrokerConfig):
        value = sample[field.name]
        if field.default is not None:
            assert (parse_seconds(value) if field.setting.unit == "seconds" else value) == field.default


# Code


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in (*MODULES, *SCRIPTS)}

    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_name_is_documented(path: Path) -> None:
    """As ``numpydoc lint``, and *Returns* as well, of functions only: numpydoc would ask properties for it too."""
    missing = []
    for name, node in public_definitions(ast.parse(path.read_text()), ""):
        text = ast.get_docstring(node) or ""
        if not text:
            missing.append(f"{name}: docstring")
        elif re.search(rf"see `(Policy|Disk|File|Lock)\.{node.name}`\.$", text):
            continue  # an override says what it does; what it is given is told once, by the interface
        elif isinstance(node, ast.FunctionDef) and not is_property_or_command(node):
            missing += [
                f"{name}: {word}" for word in parameters(node) if not re.search(rf"^[*\w, ]*\b{word}\b", text, re.M)
            ]
            if returns_something(node) and not re.search(r"^(Returns|Yields)\n-+$", text, re.MULTILINE):
                missing.append(f"{name}: Returns")

    assert missing == []


def public_definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{prefix}{child.name}.")


def parameters(node: ast.FunctionDef) -> list[str]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    names = [argument.arg for argument in given if argument is not None]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def returns_something(node: ast.FunctionDef) -> bool:
    return node.returns is not None and ast.unparse(node.returns) not in ("None", "Never", "NoReturn")


def is_property_or_command(node: ast.FunctionDef) -> bool:
    """Tell whether the docstring reads as an attribute's, or is what ``--help`` prints."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return bool(re.search(r"property|\.setter|overload|click\.|\.command\(", decorators))
