"""The tables and examples in the comments of the .proto files are true."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ooc_moe_wire import codec, errors, layout, local
from ooc_moe_wire.initializers import Initializer, initialize
from ooc_moe_wire.layout import Layout, TensorSpec
from tests.wire import stranger

V1 = Path(__file__).parents[2] / "protos" / "ooc_moe_wire" / "v1"
BANK, EXPERT, LOCAL = ((V1 / f"{name}.proto").read_text() for name in ("bank", "expert", "local"))


def test_the_table_of_errors_is_that_of_errors_py():
    rows = re.findall(r"^//     ([A-Z]\w+) +([A-Z_]{5,}) ", BANK, flags=re.MULTILINE)
    abstract = {errors.NotFound, errors.AlreadyExists}  # Parents that are not raised.
    assert dict(rows) == {kind.__name__: status.name for kind, status in errors.STATUS.items() if kind not in abstract}
    assert f'"{errors.ERROR_KEY}"' in BANK
    assert f'"{errors.RETRY_AFTER_KEY}"' in BANK
    assert f'"{codec.TRAINER_KEY}": at most {codec.TRAINER_BYTES_MAX} bytes' in BANK


def test_every_error_that_a_call_names_stands_in_the_table_with_that_status():
    statuses = {status.name for status in errors.STATUS.values()}
    kinds = {kind.__name__: status.name for kind, status in errors.STATUS.items()}
    for path in V1.glob("*.proto"):
        for comment in re.findall(r"((?:^  //.*\n)+)^  rpc ", path.read_text(), flags=re.MULTILINE):
            words = re.findall(r"\w+", comment)
            named = [(status, kind) for status, kind in pairwise(words) if status in statuses]
            assert [(status, kind) for status, kind in named if kinds.get(kind) != status] == [], comment
            assert bool(named) == any(status in comment for status in statuses), comment


@pytest.mark.parametrize("path", sorted(V1.glob("*.proto")), ids=lambda path: path.stem)
def test_every_comment_is_whole_lines_of_text(path):
    """A line such as `//TODO` or `//XX` is a draft that was never finished: it would be generated into the documentation."""
    comments = [line for line in path.read_text().splitlines() if line.lstrip().startswith("//")]
    assert len(comments) > 10
    assert [line for line in comments if not re.match(r"^\s*//( |$)", line)] == []


def test_the_limits_are_those_of_the_code():
    assert "message              4 MiB" in BANK
    assert codec.MESSAGE_BYTES_MAX == 4 << 20
    assert "payload of a chunk   1 byte to 2 MiB" in BANK
    assert codec.CHUNK_BYTES_MAX == 2 << 20
    assert "record               2 GiB" in BANK
    assert layout.RECORD_BYTES_MAX == 2 << 30
    assert f"1 to {layout.DIMENSIONS_MAX} dimensions" in BANK
    assert f"uint32 protocol = {local.PROTOCOL}" in LOCAL
    assert f"at most {local.PACKET_BYTES_MAX} bytes" in LOCAL
    assert f"up to {local.RELEASES_MAX} lease ids" in LOCAL
    assert f"ends after {local.LEASE_S:g} s" in LOCAL


def test_the_example_of_uniform_v1_is_what_the_algorithm_makes():
    place = re.search(r"Example: seed (\d+), expert (\d+), tensor (\d+), value ([\d.]+) \(as float32: 0x(\w+)\)", BANK)
    seed, expert, tensor, value = int(place[1]), int(place[2]), int(place[3]), float(place[4])
    assert f"{np.float32(value).view(np.uint32):08x}" == place[5]
    words = re.search(r"Its words are ((?:\w{16}[ .])+)", BANK)[1].rstrip(".").split()
    assert words == [f"{word:016x}" for word in stranger.philox((1, 0, 0, tensor), (seed, expert))]
    assert f"{stranger.philox((2, 0, 0, tensor), (seed, expert))[0]:016x}" in BANK

    row = r"^//     (\d+) +(\w{8}) +(\w{6}) +(-?[\d.]+) +(-?[\d.]+) +(\w{8})$"
    rows = re.findall(row, BANK, flags=re.MULTILINE)
    assert [int(index) for index, *_ in rows] == list(range(9))
    elements = np.empty(9, np.float32)
    initialize(elements, Initializer("uniform_v1", value), seed=seed, expert=expert, tensor=tensor)
    for (_, half, top, unit, element, bits), made in zip(rows, elements, strict=True):
        assert int(half, 16) >> 8 == int(top, 16)
        assert np.float32(unit) == np.float32(int(top, 16) * 2.0**-23 - 1)
        assert np.float32(element) == made
        assert f"{made.view(np.uint32):08x}" == bits


@pytest.mark.parametrize(("seed", "expert", "tensor"), [(0, 0, 0), (2**64 - 1, 2**40 - 1, 12)])
def test_the_strangers_uniform_v1_is_ours(seed, expert, tensor):
    ours = np.empty(21, np.float32)
    initialize(ours, Initializer("uniform_v1", 0.3), seed=seed, expert=expert, tensor=tensor)
    theirs = stranger.uniform_v1(21, 0.3, seed=seed, expert=expert, tensor=tensor)
    assert theirs.tobytes() == ours.tobytes()


def test_the_example_of_a_layout_is_what_a_layout_is():
    example = re.search(r"Example: parameters (.*?); optimizer (.*?)\.\n", BANK)
    parameters, optimizer = (
        tuple(
            TensorSpec(name=name, shape=tuple(map(int, shape.split(","))), dtype=dtype)
            for name, dtype, shape in re.findall(r"(\w+) (\w+\d) \[([\d, ]+)\]", section)
        )
        for section in example.groups()
    )
    made = Layout(parameters=parameters, optimizer=optimizer)
    rows = re.findall(r"^//     (\w+) +(\d+) +(\d+) to (\d+)$", BANK, flags=re.MULTILINE)
    assert [(name, int(index), int(start), int(end)) for name, index, start, end in rows] == [
        (tensor.name, index, made.offsets[tensor.name], made.offsets[tensor.name] + tensor.num_bytes)
        for index, tensor in enumerate(made.tensors)
    ]
    assert f"The parameter section has {made.parameter_bytes} bytes" in BANK
    assert f"the body has {made.body_bytes} and the record {made.record_bytes}" in BANK


def test_the_example_of_chunks_adds_up():
    parameter_bytes, optimizer_bytes, offset, rest = re.search(
        r"header\(expert 5: (\d+) \+ (\d+) bytes\)  chunk\(0, 1 MiB\)  chunk\((\d+), (\d+) bytes\)", EXPERT
    ).groups()
    assert int(offset) == 1 << 20
    assert int(parameter_bytes) + int(optimizer_bytes) == int(offset) + int(rest)
