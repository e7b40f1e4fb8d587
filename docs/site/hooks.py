"""What the site has beside the pages of docs/: pages and files from elsewhere in the repository, and the reference.

A link that leads out of docs/ is a link to a page where the target is Markdown (README.md, deploy/README.md, …), and to
the file itself otherwise, both within the site: nothing on it depends on where the repository is hosted.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Where what is outside of docs/ goes.
ELSEWHERE = "repository"
# Pages of the reference: what is imported by whom.
PACKAGES = {
    "distgrad": "One process, control, reading",
    "distgrad_worker": "Workers",
    "distgrad_broker": "Brokers",
    "distgrad.policies": "Policies",
}
# The same for what may need an extra that is not installed here: these are read, not imported.
READ = {
    "distgrad_worker.torch": "PyTorch",
    "distgrad_worker.jax": "JAX",
    "distgrad_worker.sklearn": "scikit-learn",
    "distgrad_worker.ray": "Ray",
    "distgrad_broker.hooks": "Hooks",
}
COMMANDS = "commands"

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the order of the pages from the table of the index."""
    table = [line for line in (DOCS / "index.md").read_text().splitlines() if line.startswith("| [")]
    pages = [
        {name: link} for line in table for name, link in re.findall(r"\[([^]]+)\]\(([^)]+\.md)\)", line.split("|")[1])
    ]
    reference = [{name: f"reference/{name}.md"} for name in (*PACKAGES, *READ, COMMANDS)]
    config.nav = [{"Start here": "index.md"}, {"Pages": pages}, {"Reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked from the pages and lies elsewhere, then the reference."""
    waiting = [Path(file.abs_src_path) for file in files if file.is_documentation_page() and file.abs_src_path]
    seen: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if target in seen or target.is_relative_to(DOCS):
                continue
            seen.add(target)
            if target.is_dir():
                listing = "\n".join(f"- `{path.name}`" for path in sorted(target.iterdir()) if path.name[0] not in "._")
                files.append(
                    File.generated(config, _uri(target), content=f"# {target.relative_to(ROOT)}\n\n{listing}\n")
                )
            elif target.suffix == ".md":
                files.append(File.generated(config, _uri(target), content=_moved(target)))
                waiting.append(target)
            else:
                files.append(File.generated(config, _uri(target), content=target.read_bytes()))
    for name, title in PACKAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(name, title)))
    for name, title in READ.items():
        blocks = [f"# {title}: `{name}`\n", *(f"::: {name}.{public}\n" for public in names_of(name))]
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(blocks)))
    files.append(File.generated(config, f"reference/{COMMANDS}.md", content=_commands()))
    return files


def names_of(module: str) -> list[str]:
    """Read a module's ``__all__`` without importing the module."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for statement in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return sorted(ast.literal_eval(statement.value))
    raise LookupError(f"{module} has no __all__")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that lead out of docs/ lead to where the target is on the site."""
    source = page.file.abs_src_path
    if source is None or not Path(source).is_relative_to(DOCS):
        return markdown
    return _with_links(markdown, Path(source), page.file.src_uri)


def _moved(path: Path) -> str:
    return _with_links(path.read_text(), path, _uri(path))


def _with_links(text: str, source: Path, uri: str) -> str:
    """Rewrite the links of a page, outside of fenced code, for the place where the page is on the site."""

    def rewritten(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if ":" in link:
            return match[0]
        target = (source.parent / link).resolve()
        new = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else _uri(target)
        return os.path.relpath(new, os.path.dirname(uri) or ".") + anchor

    pieces, last = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_LINK.sub(rewritten, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*pieces, _LINK.sub(rewritten, text[last:])])


def _targets(page: Path) -> list[Path]:
    text = _FENCE.sub("", page.read_text())
    links = [match[1] for match in _LINK.finditer(text) if ":" not in match[1]]
    return [(page.parent / link).resolve() for link in links]


def _uri(path: Path) -> str:
    """Name a file of the repository on the site; source files get an ending that browsers show."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{ELSEWHERE}/{name}/contents.md"
    return f"{ELSEWHERE}/{name}" if path.suffix in (".md", ".png", ".svg") else f"{ELSEWHERE}/{name}.txt"


def _reference(name: str, title: str) -> str:
    module = importlib.import_module(name)
    blocks = [f"# {title}: `{name}`\n"]
    for public in sorted(module.__all__):
        found: Any = getattr(module, public)
        home = getattr(found, "__module__", None)
        if isinstance(home, str) and hasattr(found, "__qualname__"):
            blocks.append(f"::: {home}.{found.__qualname__}\n")
        else:
            blocks.append(f"## `{public}`\n\n`{found!r:.200}`\n")
    return "\n".join(blocks)


def _commands() -> str:
    blocks = ["# Commands\n\nEverything that `--help` says.\n"]
    for entry in sorted(entry_points(group="distgrad.commands"), key=lambda entry: entry.name):
        command: click.Command = entry.load()
        blocks += _help(command, f"distgrad {entry.name}")
    return "\n".join(blocks)


def _help(command: click.Command, name: str) -> list[str]:
    text = command.get_help(click.Context(command, info_name=name, max_content_width=100))
    blocks = [f"## `{name}`\n\n```text\n{text}\n```\n"]
    for sub, nested in sorted(getattr(command, "commands", {}).items()):
        blocks += _help(nested, f"{name}{' ADDRESS' if name == 'distgrad admin' else ''} {sub}")
    return blocks
