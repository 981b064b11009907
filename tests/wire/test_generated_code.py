import importlib.util
import re
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"
V1 = PROTOS / "ooc_moe_wire" / "v1"


def generator():
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_code_and_stubs_are_what_the_generator_makes(tmp_path):
    generator().generate(tmp_path)
    made = {path.name: path.read_bytes() for path in (tmp_path / "ooc_moe_wire" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in V1.glob("*_pb2*.py*")}
    assert len(made) == 4 * len(list(V1.glob("*.proto")))
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []


def test_every_call_says_whether_it_may_be_retried():
    silent = []
    for path in V1.glob("*.proto"):
        for comment, call in re.findall(r"((?:^  //.*\n)*)^  rpc (\w+)", path.read_text(), flags=re.MULTILINE):
            silent += [] if "Retry: " in comment else [call]
    assert silent == []
