"""Makes MkDocs show pages that lie outside docs/, and links to source files, as GitHub does.

Pages under docs/ point to the rest of the repository by relative links, such as `../tests/bench/results/store.md`. GitHub follows these.
MkDocs knows only what lies under docs/, so this hook

- adds the results pages, the notebooks and a few single pages (`PAGES`) to the site, under their own paths,
- adds every other file that a page links to as plain text, under `source/`,
- rewrites the links to them.

A link to a file that does not exist stays as it is; MkDocs then warns, and `strict` makes the warning an error.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Patterns of what is shown as a page (or picture) of the site, though it lies outside docs/.
PAGES = (
    "tests/bench/results/**/*.md",
    "tests/bench/results/**/*.png",
    "examples/*.ipynb",
    "deploy/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)((?:#[^)\s]*)?)(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and the source files that pages link to."""
    for path in sorted({found for pattern in PAGES for found in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            files.append(File.generated(config, _site_path(name), content=_notebook_page(path)))
        else:
            files.append(File.generated(config, _site_path(name), abs_src_path=str(path)))
    linked = {target for page in files.documentation_pages() for target in _targets(page.content_string, _repository_path(page.src_uri))}
    for name in sorted(linked):
        if _is_source(name):
            files.append(File.generated(config, _site_path(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrites relative links from paths of the repository to paths of the site."""
    here = _repository_path(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = _resolved(link[1], here)
        if not (ROOT / target).is_file():
            return link[0]
        return posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".") + link[2]

    return LINK.sub(rewritten, markdown)


def _site_path(name: str) -> str:
    """Where a file of the repository is in the site: `docs/` falls away, notebooks become Markdown, source files become text."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if _is_source(name):
        return f"source/{name}.txt"
    return name.removesuffix(".ipynb") + ".md" if name.endswith(".ipynb") else name


def _repository_path(site_path: str) -> str:
    """The file of the repository that a page of the site is made from."""
    if (ROOT / "docs" / site_path).exists():
        return f"docs/{site_path}"
    if site_path.startswith("examples/"):
        return site_path.removesuffix(".md") + ".ipynb"
    return site_path


def _is_source(name: str) -> bool:
    """Whether it is a file outside docs/ that is not a page of the site."""
    path = ROOT / name
    return path.is_file() and not name.startswith("docs/") and not any(path in ROOT.glob(pattern) for pattern in PAGES)


def _resolved(link: str, here: str) -> str:
    """The path in the repository that a relative link of the file `here` points to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _targets(markdown: str, here: str) -> Iterator[str]:
    for link in LINK.finditer(markdown):
        yield _resolved(link[1], here)


def _notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and its kept outputs."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = data["image/png"].replace("\n", "")
                parts.append(f'<img alt="The output of the cell above." src="data:image/png;base64,{picture}">')
            else:
                text = output.get("text") or data.get("text/plain", "")
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
