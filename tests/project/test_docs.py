"""What the pages tell people to type exists; their links lead somewhere; their Python runs; and their site needs nothing but itself."""

import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.pages import DOCS, PAGES, ROOT, anchors, blocks, commands, help_of, links, subcommand, unknown_flags

TOP = "protos|server|client|ooc_moe|tests|deploy|docs|examples"


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_is_shown_is_known(name: str) -> None:
    assert unknown_flags(PAGES[name]) == []


def test_every_flag_in_a_sentence_belongs_to_some_command() -> None:
    commands_of_ours = {tuple(subcommand(words)) for page in PAGES.values() for words in commands(page)} | {("ooc-moe-server",)}
    known = {flag for command in commands_of_ours for flag in re.findall(r"--[a-z][a-z-]*", help_of(*command) or "")}
    named = {flag for page in PAGES.values() for span in re.findall(r"`(--[^`\n]*)`", page) for flag in re.findall(r"--[a-z][a-z-]*", span)}
    assert len(named) > 30
    assert sorted(named - known) == []


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_is_shown_is_known(name: str) -> None:
    unknown = [words for words in commands(PAGES[name]) if words[0] == "ooc-moe" and words[1:] and len(subcommand(words)) < 2]
    assert [words for words in unknown if words[1] != "--help"] == []


def test_the_commands_are_found_at_all() -> None:
    shown = {tuple(words[:2]) for page in PAGES.values() for words in commands(page)}
    assert shown >= {("ooc-moe", "train"), ("ooc-moe", "config"), ("ooc-moe", "games"), ("ooc-moe-server", "verify")}


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".md")])
def test_every_link_leads_somewhere(name: str) -> None:
    broken = []
    for link in links(PAGES[name]):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        if not (ROOT / target).exists() or (anchor and anchor not in anchors((ROOT / target).read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_every_file_that_is_named_exists(name: str) -> None:
    named = re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w./-]*\w)", (ROOT / name).read_text())
    assert [path for path in named if not (ROOT / path).exists() and not (ROOT / "docs" / path).exists()] == []


@pytest.mark.parametrize("name", [name for name in DOCS if blocks(PAGES[name], "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(name: str) -> None:
    variables = {"__name__": "page"}
    for block in blocks(PAGES[name], "python"):
        exec(compile(block, name, "exec"), variables)


def test_two_pages_have_python_that_runs() -> None:
    assert [name for name in DOCS if blocks(PAGES[name], "python")] == ["docs/library.md", "docs/wire.md"]


def build(directory: Path, config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    built = build(directory, ROOT / "mkdocs.yml")
    assert built.returncode == 0, built.stderr
    return directory


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\"\s>]+)", html)
        loaded += re.findall(r"<link\b[^>]*\brel=\"?(?:stylesheet|icon|preload|preconnect|prefetch)\"?[^>]*\bhref=\"?([^\"\s>]+)", html)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"?([^\"\s>]+)\"?[^>]*\brel=\"?(?:stylesheet|icon|preload|preconnect|prefetch)", html)
        assert loaded
        assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == [], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", styles) == []


def test_results_notebooks_and_sources_are_in_the_site(site: Path) -> None:
    assert "Verdicts" in (site / "tests" / "bench" / "results" / "studies" / "synthetic.html").read_text()
    assert "bit for bit: True" in (site / "examples" / "your_own_model.html").read_text()
    assert (site / "source" / "ooc_moe" / "moe" / "layer.py.txt").read_text() == (ROOT / "ooc_moe" / "moe" / "layer.py").read_text()


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in DOCS if f": {posixpath.basename(name)}\n" not in config] == []


@pytest.mark.parametrize(
    "link", ["../server/no_such_file.py", "no_such_page.md", "limits.md#no-such-heading", "../tests/bench/results/none.md"]
)
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n[a link]({link})\n")
    (tmp_path / "docs" / "limits.md").write_text("# Limits\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings[settings.index("validation:") : settings.index("\nnav:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: broken\nhooks: [{ROOT}/docs/hooks.py]\nplugins: []\n{validation}")
    built = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert built.returncode != 0
    assert link in built.stderr
