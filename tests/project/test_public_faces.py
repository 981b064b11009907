"""The four packages offer their public names lazily: `import ooc_moe` imports no torch. Every name that a page imports exists."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACES = {
    "ooc_moe": ROOT / "ooc_moe",
    "ooc_moe_client": ROOT / "client" / "ooc_moe_client",
    "ooc_moe_server": ROOT / "server" / "ooc_moe_server",
    "ooc_moe_wire": ROOT / "protos" / "ooc_moe_wire",
}
NAMES = [(face, name) for face in FACES for name in importlib.import_module(face).__all__]
# Pages for people who use the packages from outside.
PAGES = [
    path
    for pattern in ("*.md", "deploy/*.md", "docs/**/*.md", "examples/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".md", ".ipynb", ".py") and ".ipynb_checkpoints" not in path.parts
]


def imports_of(tree: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    ]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(("face", "name"), NAMES)
def test_a_public_name_resolves_and_is_listed(face, name):
    package = importlib.import_module(face)
    assert not name.startswith("_")
    assert getattr(package, name) is getattr(package, name)
    assert name in dir(package)


@pytest.mark.parametrize("face", FACES)
def test_type_checkers_and_editors_see_the_same_names(face):
    tree = ast.parse((FACES[face] / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    seen = imports_of(checked)
    package = importlib.import_module(face)
    assert sorted(name for _, name in seen) == sorted(package.__all__)
    for module, name in seen:
        if module != face:
            assert package._MODULES[name] == module.removeprefix(f"{face}.")


@pytest.mark.parametrize("face", FACES)
def test_no_public_name_hides_a_room(face):
    package = importlib.import_module(face)
    rooms = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert {name for name in package.__all__ if name in rooms} == {name for name in package.__all__ if not package._MODULES[name]}


@pytest.mark.parametrize("face", FACES)
def test_a_name_that_does_not_exist_is_an_attribute_error(face):
    package = importlib.import_module(face)
    with pytest.raises(AttributeError, match=f"module '{face}' has no attribute 'Nonsense'"):
        package.Nonsense  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import ooc_moe, ooc_moe_client, ooc_moe_server, ooc_moe_wire; dir(ooc_moe); dir(ooc_moe_client)",
        "from ooc_moe import PRESETS, AgentConfig, PPOConfig, RunConfig, embedded_daemon, envs; envs.make",
        "from ooc_moe_client import AdmissionMode, CacheStats, ExpertStore, InMemoryStore, Push, RemoteStore, Sections",
        "from ooc_moe_server import ServerConfig, run",
        "from ooc_moe_wire import BankSpec, Initializer, Layout, TensorSpec, errors",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(code):
    ended = python(f"import sys\n{code}\nprint('torch' in sys.modules)")
    assert ended.stdout == "False\n", ended.stderr


def test_help_does_not_import_torch():
    code = """
import sys
from ooc_moe.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr
    assert "train" in ended.stdout


def test_modules_import_from_rooms_and_not_from_the_faces():
    """A face reaches every room: an import from a face would be a circle, and the floor plans could not see it."""
    found = []
    for folder in FACES.values():
        for path in folder.rglob("*.py"):
            if path != folder / "__init__.py":
                for module, name in imports_of(ast.parse(path.read_text())):
                    if module in FACES and importlib.import_module(module)._MODULES.get(name):
                        found.append(f"{path.relative_to(ROOT)}: from {module} import {name}")
    assert found == []


def code_of(page: Path) -> str:
    """The code of a page: the fenced blocks of Markdown, the code cells of a notebook, all of a program."""
    text = page.read_text()
    if page.suffix == ".md":
        return "\n".join(re.findall(r"^ *```.*?\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL))
    if page.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return text


def imported_names(text: str) -> set[tuple[str, str]]:
    """(module, name) of every import of ours in a text, `import ooc_moe` included (with the names that are used of it)."""
    found = set()
    for module, names in re.findall(r"from (ooc_moe[\w.]*) import (\([^)]*\)|.+)", text):
        found |= {(module, name) for name in re.findall(r"(\w+)(?: as \w+)?", names.partition("#")[0])}
    for face in re.findall(r"^\s*(?:>>> )?import (ooc_moe\w*)$", text, flags=re.MULTILINE):
        found |= {(face, name) for name in re.findall(rf"(?<![\w/.`])(?<!from ){face}\.(\w+)", text)}
    return found


def test_imports_are_found_in_every_form():
    text = "from ooc_moe.a import B, C as D  # e\nfrom ooc_moe_wire import (\n    F,\n    G,\n)\nimport ooc_moe\nooc_moe.train(1)\n"
    expected = {("ooc_moe.a", "B"), ("ooc_moe.a", "C"), ("ooc_moe_wire", "F"), ("ooc_moe_wire", "G"), ("ooc_moe", "train")}
    assert imported_names(text) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_that_a_page_imports_exists(page):
    for module, name in sorted(imported_names(code_of(page))):
        imported = importlib.import_module(module)
        assert hasattr(imported, name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".ipynb"], ids=lambda page: page.name)
def test_a_notebook_needs_nothing_but_the_public_faces(page):
    assert {module for module, _ in imported_names(code_of(page))} <= set(FACES)
