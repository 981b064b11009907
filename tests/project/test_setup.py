import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH_SIDE = {"torch", "gymnasium", "ale-py", "matplotlib", "tensorboard"}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)] == []
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def requirements(extra: str = "") -> list[Requirement]:
    """What installing the project brings in directly, extras that name other extras followed."""
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = []
    for requirement in map(Requirement, texts):
        inner = [nested for name in requirement.extras for nested in requirements(name)]
        found += inner if requirement.name == PROJECT["name"] else [requirement]
    return found


def brought_in(requirement: Requirement, seen: set[str]) -> set[str]:
    """The names of all that a requirement installs here, itself included."""
    if str(requirement) not in seen:
        seen.add(str(requirement))
        for nested in map(Requirement, distribution(requirement.name).requires or []):
            wanted = [nested.marker is None or nested.marker.evaluate({"extra": extra}) for extra in [*requirement.extras, ""]]
            if any(wanted):
                brought_in(nested, seen)
    return {canonicalize_name(Requirement(text).name) for text in seen}


def dry_run(folder: Path, target: str) -> str:
    return subprocess.run(["make", "-n", target], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_every_direct_requirement_is_pinned_to_a_version_it_allows():
    pinned = pins()
    direct = [*requirements(), *requirements("dev"), *requirements("bench"), Requirement("hatchling")]
    assert [str(req) for req in direct if pinned.get(canonicalize_name(req.name), "") not in req.specifier] == []
    assert pinned["torch"] == "2.13.0"


def test_a_trainers_torch_is_one_that_has_grouped_products():
    floors = [req.specifier for req in requirements("train") if req.name == "torch"]
    assert not all(floor.contains("2.9.1") for floor in floors)  # The last one without torch.nn.functional.grouped_mm.
    assert all(floor.contains("2.10.0") for floor in floors)


def test_everything_that_the_project_brings_in_is_pinned():
    names = brought_in(Requirement("ooc-moe[dev]"), set()) - {"ooc-moe"}
    assert len(names) > 60
    assert [name for name in names - set(pins()) if not name.startswith(("nvidia-", "cuda-", "triton"))] == []  # Those torch pins itself.


def test_the_base_install_brings_no_torch():
    assert TORCH_SIDE & {canonicalize_name(req.name) for req in requirements()} == set()
    assert {canonicalize_name(req.name) for req in requirements("atari")} >= TORCH_SIDE


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that `make` takes for a checkout in which nothing was set up."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs"])
def test_the_first_run_sets_up_and_the_second_skips_it(checkout, target):
    assert "pip install" in dry_run(checkout, target)
    stamp, constraints = checkout / ".venv" / ".installed", checkout / "constraints.txt"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (constraints.stat().st_mtime + 10,) * 2)
    assert "pip install" not in dry_run(checkout, target)
    os.utime(constraints, (constraints.stat().st_mtime + 20,) * 2)
    assert "pip install" in dry_run(checkout, target)


def test_every_install_goes_through_the_constraints(checkout):
    installs = [line for line in dry_run(checkout, "setup").splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_make_test_lints_builds_the_docs_and_runs_the_tests(checkout):
    commands = dry_run(checkout, "test")
    for command in ("ruff check", "ruff format --check", "mypy", "lint-imports", "mkdocs build --strict", "pytest"):
        assert f".venv/bin/{command}" in commands or f"-m {command}" in commands


def test_an_interpreter_that_is_too_old_is_refused_in_one_line(checkout):
    fake = checkout / "python3.8"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8); exec(sys.argv[1])" "$2"\n')
    fake.chmod(0o755)
    made = subprocess.run(["make", f"PYTHON={fake}", "setup"], cwd=checkout, capture_output=True, text=True)
    assert made.returncode != 0
    assert "Python 3.11 or newer is needed" in made.stderr
    assert not (checkout / ".venv").exists()


def test_import_rules_hold():
    linted = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout
    assert " 0 broken" in linted.stdout


def floors(container: str) -> list[set[str]]:
    """The floor plan of a package as the import linter holds it, from the top floor down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (plan,) = (contract for contract in contracts if contract.get("containers") == [container])
    return [set(floor.split(" | ")) for floor in plan["layers"]]


@pytest.mark.parametrize("folder", ["ooc_moe", "client/ooc_moe_client", "server/ooc_moe_server", "protos/ooc_moe_wire"])
def test_contributing_lists_the_rooms_of_the_floor_plan_from_the_top_down(folder):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (table,) = re.findall(rf"^\| {folder}/ \| \|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    listed = [re.sub(r"/$|\.py$", "", name) for row in table.splitlines() for name in re.findall(r"`([^`]*)`", row.split(" | ")[0])]
    plan = floors(folder.rpartition("/")[2])
    assert sorted(listed) == sorted(set.union(*plan))
    floor_of = [index for name in listed for index, floor in enumerate(plan) if name in floor]
    assert floor_of == sorted(floor_of)


def test_every_console_script_is_a_function():
    for entry in distribution(PROJECT["name"]).entry_points:
        assert callable(entry.load()), entry
