"""Generates the Python code of the wire from its .proto files, in place.

Run: python protos/generate.py   (tests/wire/test_generated_code.py fails when the committed code differs)

The generator is the oldest grpcio-tools we support: generated code refuses a runtime older than its generator.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Writes *_pb2.py, *_pb2_grpc.py and their stubs below `out`/ooc_moe_wire/v1."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ooc_moe_wire/v1/*.proto"))
    includes = [f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    plugins = [f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", *includes, *plugins, *outputs, *protos]) != 0:
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(ROOT)
