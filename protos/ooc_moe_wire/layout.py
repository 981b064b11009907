"""The layout of an expert: its tensors, the two sections in which they are stored, and their offsets.

    record = | header block, 4 KiB | parameter section, n x 4 KiB | optimizer section, m x 4 KiB |
    body   =                       | parameter section            | optimizer section            |

The daemon stores records, in its files and its shared memory. A trainer's GPU cache holds bodies, and bodies travel between daemon and
trainer in chunks. In a section, each tensor starts at a multiple of 64 bytes. The padding between tensors is zero, and the section's
checksum covers it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.initializers import Initializer, initialize
from ooc_moe_wire.v1 import bank_pb2

BLOCK_BYTES = 4096
TENSOR_ALIGN_BYTES = 64
RECORD_BYTES_MAX = 1 << 31
DIMENSIONS_MAX = 32  # The limit of numpy 1.

# numpy has no bfloat16: such tensors are arrays of raw 16-bit words.
_NUMPY_DTYPE = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "uint8": "|u1",
}
_FLOAT_DTYPES = ("float32", "float16", "bfloat16")
_FLOAT16_MAX = 65504.0
_PIECE = 64 << 10  # How many numbers are tested at once for being finite.
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,64}")
_BANK_NAME = re.compile(r"[A-Za-z0-9_\-./]{1,128}")

# Any contiguous bytes.
Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of an expert: its name, shape, dtype and initial value."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    initializer: Initializer = Initializer()

    def __post_init__(self) -> None:
        if not _TENSOR_NAME.fullmatch(self.name):
            raise InvalidRequest(f"tensor.name: {self.name!r} is not 1 to 64 letters, digits, '_' or '.'")
        if self.dtype not in _NUMPY_DTYPE:
            raise InvalidRequest(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(_NUMPY_DTYPE)}")
        if len(self.shape) > DIMENSIONS_MAX:
            raise InvalidRequest(f"tensor {self.name!r}: shape has {len(self.shape)} dimensions, at most {DIMENSIONS_MAX} are possible")
        if not self.shape or any(size < 1 for size in self.shape):
            raise InvalidRequest(f"tensor {self.name!r}: shape {self.shape} needs at least one dimension, each at least 1")
        if self.initializer.algorithm == "uniform_v1" and self.dtype != "float32":
            raise InvalidRequest(f"tensor {self.name!r}: uniform_v1 makes float32, not {self.dtype}")
        if self.initializer.algorithm == "constant_v1" and not _holds(self.dtype, self.initializer.value):
            raise InvalidRequest(f"tensor {self.name!r}: constant_v1 cannot begin {self.dtype} with {self.initializer.value:g}")

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes, without padding."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The tensor's dtype in numpy, little-endian. It is uint16 for bfloat16, which numpy does not have."""
        return np.dtype(_NUMPY_DTYPE[self.dtype])

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a float, so that the tensor can hold NaN and infinity."""
        return self.dtype in _FLOAT_DTYPES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of an expert, and where their bytes are in the expert's record (its stored form). All experts of a bank have the same
    layout."""

    parameters: tuple[TensorSpec, ...]
    optimizer: tuple[TensorSpec, ...] = ()

    def __post_init__(self) -> None:
        if not self.parameters:
            raise InvalidRequest("parameters: a layout needs at least one parameter tensor")
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise InvalidRequest(f"tensor names repeat: {', '.join(sorted(names))}")
        if self.record_bytes > RECORD_BYTES_MAX:
            raise InvalidRequest(f"record: {self.record_bytes} bytes are more than {RECORD_BYTES_MAX}")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors, parameters first, in the order in which they are stored."""
        return self.parameters + self.optimizer

    @cached_property
    def parameter_bytes(self) -> int:
        """The size of the parameter section in bytes, a multiple of 4 KiB."""
        return _section_bytes(self.parameters)

    @cached_property
    def optimizer_bytes(self) -> int:
        """The size of the optimizer section in bytes, a multiple of 4 KiB; 0 without optimizer tensors."""
        return _section_bytes(self.optimizer)

    @property
    def body_bytes(self) -> int:
        """The size in bytes of an expert's body: its parameter section and its optimizer section together."""
        return self.parameter_bytes + self.optimizer_bytes

    @property
    def record_bytes(self) -> int:
        """The size in bytes of an expert's record: its header block, parameter section and optimizer section together."""
        return BLOCK_BYTES + self.body_bytes

    @cached_property
    def offsets(self) -> dict[str, int]:
        """For each tensor name, where the tensor starts in the body (the parameter section and the optimizer section), in bytes."""
        starts = dict(_placed(self.parameters))
        starts.update((name, self.parameter_bytes + offset) for name, offset in _placed(self.optimizer))
        return starts

    def arrays(self, body: Buffer) -> dict[str, NDArray[np.generic]]:
        """Views of the tensors in a body (an expert's parameter and optimizer section) as numpy arrays, by name, without copies.

        A body of `parameter_bytes` has the parameter section only.

        Raises:
            InvalidRequest: `body` is neither `body_bytes` nor `parameter_bytes` long.
        """
        flat = np.frombuffer(body, dtype=np.uint8)
        if flat.size not in (self.body_bytes, self.parameter_bytes):
            raise InvalidRequest(f"body: {flat.size} bytes, the layout has {self.parameter_bytes} or {self.body_bytes}")
        tensors = self.tensors if flat.size == self.body_bytes else self.parameters
        return {
            tensor.name: flat[offset : offset + tensor.num_bytes].view(tensor.numpy_dtype).reshape(tensor.shape)
            for tensor in tensors
            for offset in (self.offsets[tensor.name],)
        }

    def initialize(self, body: memoryview | bytearray | NDArray[np.uint8], *, seed: int, expert: int) -> None:
        """Writes the initial values of an expert into `body`, which must be `body_bytes` long.

        The values depend on nothing but the layout, the bank's `seed` and the expert's id.
        """
        np.frombuffer(body, dtype=np.uint8)[:] = 0
        arrays = self.arrays(body)
        for index, tensor in enumerate(self.tensors):
            initialize(arrays[tensor.name], tensor.initializer, seed=seed, expert=expert, tensor=index)

    def nonfinite_tensor(self, body: Buffer) -> str | None:
        """The name of the first tensor in `body` (the bytes of an expert's tensors) that holds NaN or infinity. None: all values are
        finite."""
        arrays = self.arrays(body)
        for tensor in self.tensors:
            if tensor.is_float and tensor.name in arrays and not _all_finite(arrays[tensor.name], tensor.dtype):
                return tensor.name
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSpec:
    """What defines a bank, a named set of experts: its name, the number and layout of the experts, and the seed of their initial values."""

    name: str
    num_experts: int
    layout: Layout
    seed: int = 0

    def __post_init__(self) -> None:
        if not _BANK_NAME.fullmatch(self.name):
            raise InvalidRequest(f"bank name: {self.name!r} is not 1 to 128 letters, digits, '_', '-', '.' or '/'")
        if not 1 <= self.num_experts < 1 << 40:
            raise InvalidRequest(f"num_experts: {self.num_experts} is not between 1 and 2^40")
        if not 0 <= self.seed < 1 << 64:
            raise InvalidRequest(f"seed: {self.seed} is not an unsigned 64-bit number")

    def to_proto(self) -> bank_pb2.BankSpec:
        """Converts this spec to a protobuf message."""
        return bank_pb2.BankSpec(
            name=self.name,
            num_experts=self.num_experts,
            parameters=[_tensor_to_proto(tensor) for tensor in self.layout.parameters],
            optimizer=[_tensor_to_proto(tensor) for tensor in self.layout.optimizer],
            seed=self.seed,
        )

    @staticmethod
    def from_proto(message: bank_pb2.BankSpec) -> BankSpec:
        """Converts a protobuf message to a spec. Raises InvalidRequest when it breaks a rule of `BankSpec`, `Layout` or `TensorSpec`."""
        layout = Layout(
            parameters=tuple(_tensor_from_proto(tensor) for tensor in message.parameters),
            optimizer=tuple(_tensor_from_proto(tensor) for tensor in message.optimizer),
        )
        return BankSpec(name=message.name, num_experts=message.num_experts, layout=layout, seed=message.seed)


def _placed(tensors: Sequence[TensorSpec]) -> Iterator[tuple[str, int]]:
    offset = 0
    for tensor in tensors:
        yield tensor.name, offset
        offset += _round_up(tensor.num_bytes, TENSOR_ALIGN_BYTES)


def _section_bytes(tensors: Sequence[TensorSpec]) -> int:
    return _round_up(sum(_round_up(tensor.num_bytes, TENSOR_ALIGN_BYTES) for tensor in tensors), BLOCK_BYTES)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _holds(dtype: str, value: float) -> bool:
    """Whether a tensor of `dtype` can be filled with this value.

    Integers need a whole number in their range, float16 a number in its range. bfloat16 cannot be filled, because numpy does not have it.
    """
    if dtype in _FLOAT_DTYPES:
        return dtype == "float32" or (dtype == "float16" and abs(value) <= _FLOAT16_MAX)
    limits = np.iinfo(_NUMPY_DTYPE[dtype])
    return value.is_integer() and int(limits.min) <= value <= int(limits.max)


def _all_finite(array: NDArray[np.generic], dtype: str) -> bool:
    if dtype == "bfloat16":  # NaN and infinity are the numbers whose exponent bits are all ones.
        words = array.view(np.uint16)
        return not bool(((words & 0x7F80) == 0x7F80).any())
    # In pieces, so that the results stay in the processor's cache.
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _PIECE]).all()) for start in range(0, flat.size, _PIECE))


def _tensor_to_proto(tensor: TensorSpec) -> bank_pb2.Tensor:
    initializer = bank_pb2.Initializer(algorithm=tensor.initializer.algorithm, value=tensor.initializer.value)
    return bank_pb2.Tensor(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, initializer=initializer)


def _tensor_from_proto(message: bank_pb2.Tensor) -> TensorSpec:
    initializer = Initializer(message.initializer.algorithm or "zeros_v1", message.initializer.value)
    return TensorSpec(name=message.name, shape=tuple(message.shape), dtype=message.dtype, initializer=initializer)
