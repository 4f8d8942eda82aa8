"""Hooks of mkdocs (mkdocs.yml): pages from outside docs/, their links, the references, the marks of command blocks."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import repository
import rest

MARK: Final = re.compile(r"^<!-- (run|not run here): (.+?) -->$", re.MULTILINE | re.DOTALL)
PYTHON: Final = """# Python

From the docstrings of the code; [the client's page](../client.md) is the introduction. Signatures are those of
`AsyncClient`; `Client` has the same methods, each without `await`, and what is iterated with `async for` there with
`for`.

"""
OBJECTS: Final = {
    "AsyncClient, Client": "client.aio.AsyncClient",
    "client.jobs": "client.aio.AsyncJobs",
    "client.files": "client.files.AsyncFiles",
    "client.models": "client.catalog.AsyncModels",
    "client.recipes": "client.catalog.AsyncRecipes",
    "client.verifiers": "client.catalog.AsyncVerifiers",
    "client.services": "client.catalog.AsyncServices",
    "client.keys": "client.keys.AsyncKeys",
    "Errors of answers": "client.errors",
    "Other errors": "core.errors",
}
"""What the Python reference shows, by heading."""


def slug(heading: str, separator: str) -> str:
    """Anchor of a heading, as code hosts make it: links hold there and here."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds READMEs, what pages link to, and the references."""
    for path in repository.shown_files():
        name = repository.place(path)
        if files.get_file_from_path(name) is not None:
            continue
        if path.suffix == ".md" or path.suffix in repository.PICTURES:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, name, content=repository.shown(path)))
    for name, text in rest.pages(json.loads((repository.ROOT / "docs" / "openapi.json").read_text())).items():
        files.append(File.generated(config, f"reference/rest/{name}.md", content=text))
    objects = "\n\n".join(f"## {heading}\n\n::: stillhouse.{name}" for heading, name in OBJECTS.items())
    files.append(File.generated(config, "reference/python.md", content=PYTHON + objects))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site, and what runs a block, in small letters above it."""
    path = Path(page.file.abs_src_path or "")
    if path.suffix == ".md" and path.is_relative_to(repository.ROOT):
        markdown = repository.relative(markdown, path)
    return repository.outside_fences(markdown, lambda text: MARK.sub(_note, text))


def _note(mark: re.Match[str]) -> str:
    kind, what = mark[1], html.escape(" ".join(mark[2].split()))
    text = f"Run by <code>{what}</code>" if kind == "run" else f"Not run by a test: {what}"
    return f'<p class="mark">{text}</p>\n'
