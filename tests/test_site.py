"""The documentation as a site: it is built strictly, nothing on it leads nowhere, and nothing public is forgotten."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distgrad", "distgrad_worker", "distgrad_broker", "distgrad.policies")


# With extras of their own, so they are read and not imported.
MODULES = (
    *("distgrad_worker.torch", "distgrad_worker.jax", "distgrad_worker.sklearn", "distgrad_worker.ray"),
    "distgrad_broker.hooks",
)


def public(module: str) -> set[str]:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    [names] = re.findall(r"^__all__ = (\[.*?\])", Path(spec.origin).read_text(), re.MULTILINE | re.DOTALL)
    return set(ast.literal_eval(names))


class Links(HTMLParser):
    """Collects what a page links to, and what can be linked to on it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings_handlers") is None:
        pytest.skip("needs the extra docs: make site")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        capture_output=True, text=True, timeout=110, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_no_link_on_the_site_leads_nowhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            missing = target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].anchors
            if not target.exists() or missing:
                broken.append((page.relative_to(site).as_posix(), link))

    assert len(pages) > 30
    assert broken == []


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    page = (site / "index.html").read_text()

    assert re.findall(r"<(?:script|img)[^>]+src=\"https?:|<link[^>]+stylesheet[^>]+href=\"https?:", page) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name_with_its_docstring(site: Path, package: str) -> None:
    page = (site / "reference" / f"{package}.html").read_text()
    module = importlib.import_module(package)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))

    for name in module.__all__:
        found = getattr(module, name)
        assert name in text
        if isinstance(found, type) and found.__doc__:
            words = re.findall(r"\w+", found.__doc__.partition("\n")[0])
            assert re.search(r"\W+".join(words[:4]), text), f"{name}: {words}"


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_the_names_of_adapters_that_need_an_extra(site: Path, module: str) -> None:
    page = Links(site / "reference" / f"{module}.html")

    assert {name for name in public(module) if not any(anchor.endswith(f".{name}") for anchor in page.anchors)} == set()


# What the pages that people write (not the reference, which is made) must tell of.


def written() -> str:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "deploy" / "README.md"]
    return "\n".join(page.read_text() for page in pages)


def test_the_pages_forget_no_public_name() -> None:
    text = written()
    names = {name for package in PACKAGES for name in importlib.import_module(package).__all__}

    assert sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)) == []


@pytest.mark.parametrize("module", MODULES)
def test_the_page_of_names_forgets_no_name_of_an_adapter(module: str) -> None:
    [row] = [line for line in (ROOT / "docs" / "names.md").read_text().splitlines() if line.startswith(f"| `{module}`")]

    assert public(module) - set(re.findall(r"`(\w+)`", row)) == set()


def test_no_module_with_public_names_is_forgotten() -> None:
    """What another module of ours imports may have an ``__all__``, too; what only users import is listed here."""
    adapters = {
        path.stem for path in (ROOT / "worker" / "distgrad_worker").glob("*.py") if "__all__ =" in path.read_text()
    }

    assert {f"distgrad_worker.{name}" for name in adapters - {"__init__"}} <= set(MODULES)


def test_the_pages_forget_no_command() -> None:
    text = written()
    forgotten = []
    for entry in entry_points(group="distgrad.commands"):
        command: click.Command = entry.load()
        if f"distgrad {entry.name}" not in text:
            forgotten.append(entry.name)
        for sub in getattr(command, "commands", {}):
            spoken = rf"distgrad {entry.name}( [\w.:/-]+| ADDRESS)?( --\w+ [\w./]+)* {sub}\b|`{sub}( [^`]*)?`"
            if not re.search(spoken, text):
                forgotten.append(f"{entry.name} {sub}")

    assert forgotten == []


def test_every_page_with_a_program_has_a_test_that_reads_it() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "\n```python\n" in page.read_text()]

    assert len(pages) > 5
    assert [page.name for page in pages if page.name not in tests] == []
