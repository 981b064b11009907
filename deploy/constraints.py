"""Writes constraints.txt: one `name==version` line for everything that `pip install '.[dev,bench]'` and its build bring in.

Run: make constraints   (to take up new releases; then `make test`, and commit both)

The resolver decides: it takes the newest releases that pyproject.toml and `HELD` allow, and installs nothing. Knows nothing of hashes or of
download addresses: the file holds for any package index, and for torch's CPU and CUDA builds alike. That is why labels like `+cpu` and the
CUDA libraries, which torch pins for itself, are left out.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Written by deploy/constraints.py (make constraints). Every install goes through it: pip install -c constraints.txt ...\n"

# Raised by hand only: another torch has other kernels, and runs that were equal bit for bit no longer are.
HELD = ["torch==2.13.0"]
CUDA_LIBRARIES = ("nvidia-", "cuda-", "triton")


def resolve(requirements: list[str]) -> dict[str, str]:
    """The versions by package name that pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-", *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}


def pins(versions: dict[str, str], *, project: str) -> str:
    """The lines of the file, by name, without the project itself."""
    names = sorted(name for name in versions if name != project and not name.startswith(CUDA_LIBRARIES))
    return "".join(f"{name}=={versions[name].partition('+')[0]}\n" for name in names)


def main() -> None:
    """Resolves pyproject.toml's development set, the benchmark's peers and the build requirements together."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = resolve([*HELD, *pyproject["build-system"]["requires"], ".[dev,bench]"])
    (ROOT / "constraints.txt").write_text(HEADER + pins(versions, project=pyproject["project"]["name"]))


if __name__ == "__main__":
    main()
