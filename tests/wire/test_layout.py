import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import BLOCK_BYTES, TENSOR_ALIGN_BYTES, BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import bank_pb2

DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint8"]

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
initializers = st.one_of(
    st.just(("zeros_v1", 0.0)),
    st.tuples(st.just("constant_v1"), st.integers(0, 255).map(float)),
    st.tuples(st.just("uniform_v1"), st.floats(0, 10)),
)


@st.composite
def tensor_specs(draw, name: str) -> TensorSpec:
    algorithm, value = draw(initializers)
    allowed = {"zeros_v1": DTYPES, "constant_v1": [name for name in DTYPES if name != "bfloat16"], "uniform_v1": ["float32"]}
    dtype = draw(st.sampled_from(allowed[algorithm]))
    return TensorSpec(name=name, shape=draw(shapes), dtype=dtype, initializer=Initializer(algorithm, value))


@st.composite
def layouts(draw) -> Layout:
    parameters = tuple(draw(tensor_specs(f"p{index}")) for index in range(draw(st.integers(1, 4))))
    optimizer = tuple(draw(tensor_specs(f"o.{index}")) for index in range(draw(st.integers(0, 4))))
    return Layout(parameters=parameters, optimizer=optimizer)


def ffn() -> Layout:
    """w1 and b1 with one moment each: 5 * 7 * 4 = 140 bytes is 192 when padded; 28 bytes, 64."""
    return Layout(
        parameters=(TensorSpec(name="w1", shape=(5, 7)), TensorSpec(name="b1", shape=(7,))),
        optimizer=(TensorSpec(name="w1.exp_avg", shape=(5, 7)), TensorSpec(name="step", shape=(1,), dtype="int64")),
    )


def test_offsets_and_lengths_are_those_of_the_drawing():
    layout = ffn()
    assert layout.offsets == {"w1": 0, "b1": 192, "w1.exp_avg": 4096, "step": 4096 + 192}
    assert (layout.parameter_bytes, layout.optimizer_bytes, layout.body_bytes, layout.record_bytes) == (4096, 4096, 8192, 12288)


def test_a_layout_without_an_optimizer_has_no_second_section():
    layout = Layout(parameters=(TensorSpec(name="w", shape=(1025,)),))
    assert (layout.parameter_bytes, layout.optimizer_bytes, layout.record_bytes) == (8192, 0, 12288)


@given(layouts())
def test_tensors_are_aligned_in_order_and_inside_their_sections(layout):
    assert layout.parameter_bytes % BLOCK_BYTES == layout.optimizer_bytes % BLOCK_BYTES == 0
    for tensors, end, section_end in (
        (layout.parameters, 0, layout.parameter_bytes),
        (layout.optimizer, layout.parameter_bytes, layout.body_bytes),
    ):
        for tensor in tensors:
            start = layout.offsets[tensor.name]
            assert start % TENSOR_ALIGN_BYTES == 0
            assert 0 <= start - end < TENSOR_ALIGN_BYTES
            end = start + tensor.num_bytes
        assert 0 <= section_end - end < BLOCK_BYTES + TENSOR_ALIGN_BYTES


@given(layouts())
def test_arrays_are_views_that_tile_the_body_without_overlap(layout):
    body = bytearray(layout.body_bytes)
    for array in layout.arrays(body).values():
        words = array.view(np.uint8)
        assert not words.any()
        words[...] = 255
    assert sum(byte == 255 for byte in body) == sum(tensor.num_bytes for tensor in layout.tensors)


def test_a_parameters_only_body_has_only_the_parameters_views():
    layout = ffn()
    arrays = layout.arrays(bytes(layout.parameter_bytes))
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {"w1": ((5, 7), np.float32), "b1": ((7,), np.float32)}


def test_a_body_of_another_length_is_refused_naming_both_lengths():
    with pytest.raises(InvalidRequest, match="body: 100 bytes, the layout has 4096 or 8192"):
        ffn().arrays(bytes(100))


@given(layouts(), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_initial_values_depend_on_seed_and_expert_and_leave_padding_zero(layout, seed, expert):
    first, second = bytearray(b"\xaa" * layout.body_bytes), bytearray(layout.body_bytes)
    layout.initialize(first, seed=seed, expert=expert)
    layout.initialize(second, seed=seed, expert=expert)
    assert first == second
    for array in layout.arrays(first).values():
        array.view(np.uint8)[...] = 0
    assert not any(first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_nan_or_infinity_is_found_by_the_tensors_name(dtype, bad):
    layout = Layout(
        parameters=(TensorSpec(name="sound", shape=(3,)), TensorSpec(name="bad", shape=(2, 2), dtype=dtype)),
        optimizer=(TensorSpec(name="step", shape=(1,), dtype="int64"),),
    )
    body = bytearray(layout.body_bytes)
    arrays = layout.arrays(body)
    arrays["step"][:] = -1  # All bits set: a NaN, if it were a float.
    assert layout.nonfinite_tensor(body) is None
    word = np.array([bad], dtype=np.float32)
    arrays["bad"][1, 0] = word.view(np.uint32)[0] >> 16 if dtype == "bfloat16" else word[0]
    assert layout.nonfinite_tensor(body) == "bad"
    assert layout.nonfinite_tensor(memoryview(body)[: layout.parameter_bytes]) == "bad"


def test_the_largest_finite_bfloat16_is_finite():
    layout = Layout(parameters=(TensorSpec(name="w", shape=(1,), dtype="bfloat16"),))
    body = bytearray(layout.body_bytes)
    layout.arrays(body)["w"][0] = 0x7F7F
    assert layout.nonfinite_tensor(body) is None


@given(layouts(), st.integers(1, 2**40 - 1), st.integers(0, 2**64 - 1))
def test_a_bank_spec_survives_its_message(layout, num_experts, seed):
    spec = BankSpec(name="run-1/layer.0", num_experts=num_experts, layout=layout, seed=seed)
    message = bank_pb2.BankSpec.FromString(spec.to_proto().SerializeToString())
    assert BankSpec.from_proto(message) == spec


def test_an_unnamed_algorithm_in_a_message_means_zeros():
    message = bank_pb2.BankSpec(name="b", num_experts=1, parameters=[bank_pb2.Tensor(name="w", shape=[2], dtype="float32")])
    assert BankSpec.from_proto(message).layout.parameters[0].initializer == Initializer("zeros_v1")


def tensor(**changes) -> bank_pb2.Tensor:
    fields = {"name": "w", "shape": [2, 3], "dtype": "float32"}
    initializer = bank_pb2.Initializer(algorithm=changes.pop("algorithm", ""), value=changes.pop("value", 0.0))
    return bank_pb2.Tensor(**(fields | changes), initializer=initializer)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": ""}, "bank name: ''"),
        ({"name": "a b"}, "bank name: 'a b'"),
        ({"name": "x" * 129}, "bank name: 'xxx"),
        ({"name": "b\n"}, "bank name"),
        ({"num_experts": 0}, "num_experts: 0"),
        ({"num_experts": 1 << 40}, f"num_experts: {1 << 40}"),
        ({"parameters": []}, "parameters"),
        ({"optimizer": [tensor()]}, "tensor names repeat: w, w"),
        ({"parameters": [tensor(name="")]}, "tensor.name: ''"),
        ({"parameters": [tensor(name="w/1")]}, "tensor.name: 'w/1'"),
        ({"parameters": [tensor(name="w" * 65)]}, "tensor.name: 'www"),
        ({"parameters": [tensor(dtype="float64")]}, "dtype 'float64'"),
        ({"parameters": [tensor(dtype="")]}, "dtype ''"),
        ({"parameters": [tensor(shape=[])]}, "tensor 'w': shape"),
        ({"parameters": [tensor(shape=[3, 0])]}, r"tensor 'w': shape \(3, 0\)"),
        ({"parameters": [tensor(shape=[1] * 33)]}, "tensor 'w': shape has 33 dimensions, at most 32"),
        ({"parameters": [tensor(shape=[1 << 31])]}, "record: .* bytes are more than 2147483648"),
        ({"parameters": [tensor(shape=[(1 << 64) - 1] * 9)]}, "record: .* bytes are more than 2147483648"),
        ({"parameters": [tensor(algorithm="normal_v1")]}, "initializer.algorithm: 'normal_v1'"),
        ({"parameters": [tensor(algorithm="constant_v1", value=float("nan"))]}, "initializer.value: nan"),
        ({"parameters": [tensor(algorithm="uniform_v1", value=1, dtype="float16")]}, "uniform_v1 makes float32, not float16"),
        ({"parameters": [tensor(algorithm="constant_v1", value=256, dtype="uint8")]}, "constant_v1 cannot begin uint8 with 256"),
        ({"parameters": [tensor(algorithm="constant_v1", value=0.5, dtype="int64")]}, "constant_v1 cannot begin int64 with 0.5"),
        ({"parameters": [tensor(algorithm="constant_v1", value=2.0**63, dtype="int64")]}, "constant_v1 cannot begin int64"),
        ({"parameters": [tensor(algorithm="constant_v1", value=7e4, dtype="float16")]}, "constant_v1 cannot begin float16 with 70000"),
        ({"parameters": [tensor(algorithm="constant_v1", value=1, dtype="bfloat16")]}, "constant_v1 cannot begin bfloat16 with 1"),
    ],
)
def test_a_bank_spec_that_is_not_well_formed_is_refused_naming_the_field(changes, named):
    fields = {"name": "b", "num_experts": 4, "parameters": [tensor()]}
    BankSpec.from_proto(bank_pb2.BankSpec(**fields))
    with pytest.raises(InvalidRequest, match=named):
        BankSpec.from_proto(bank_pb2.BankSpec(**(fields | changes)))


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_does_not_fit_64_bits_is_refused(seed):
    with pytest.raises(InvalidRequest, match=f"seed: {seed}"):
        BankSpec(name="b", num_experts=1, layout=ffn(), seed=seed)
