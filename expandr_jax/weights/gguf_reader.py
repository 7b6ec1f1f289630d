"""Parses GGUF files: metadata and the place of each tensor.

The gguf package has a reader too, which takes five seconds on a vocabulary of 49,152 tokens; this
takes a tenth of one. Dequantization is the package's.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.weights.fields import Fields, one_line, shown

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file, still quantized.

    Attributes:
        shape: Axes from the slowest, as numpy has them.
        kind: How it is quantized.
        offset: Where its first byte lies in the file.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int


class GgufReader:
    """The parsed header of a GGUF file.

    Attributes:
        metadata: Values by key; arrays are lists.
        tensors: By name, in the file's order.
    """

    def __init__(self, path: Path):
        """Parses the header; raises UserError if it is not a whole little-endian GGUF file."""
        self._path = path
        try:
            self._buffer = memoryview(np.memmap(path, np.uint8, mode="r"))
            self._place = 0
            self._parse()
            del self._buffer  # What was read through it would stay resident.
        except (OSError, ValueError, KeyError, struct.error, RecursionError) as error:
            raise UserError(f"{path}: not a whole GGUF file: {one_line(error)}") from None

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or some rows of it, dequantized to float32.

        Raises:
            UserError: If the gguf package cannot dequantize it.
        """
        tensor = self.tensors[name]
        try:
            if len(tensor.shape) == 1:
                return self._read(tensor)[rows]
            start, stop, _ = rows.indices(tensor.shape[0])
            place = tensor.offset + start * (_num_bytes(tensor) // tensor.shape[0])
            return self._read(GgufTensor((stop - start, *tensor.shape[1:]), tensor.kind, place))
        except NotImplementedError:
            raise UserError(
                f"{self._path}: tensor {name} is stored as {tensor.kind.name}, which the gguf "
                "package cannot dequantize: take a file with another quantization"
            ) from None

    def _read(self, tensor: GgufTensor) -> np.ndarray:
        data = np.fromfile(self._path, np.uint8, _num_bytes(tensor), offset=tensor.offset)
        if tensor.kind == gguf.GGMLQuantizationType.F32:
            values = data.view(np.float32)
        elif tensor.kind == gguf.GGMLQuantizationType.F16:
            values = data.view(np.float16).astype(np.float32)
        else:
            values = gguf.dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.kind)
        return values.reshape(tensor.shape)

    def _parse(self) -> None:
        magic, version = self._unpack("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as version 2 or 3 does")
        num_tensors, num_keys = self._unpack("QQ")
        self.metadata = {}
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise ValueError(f"key {shown(key)} is there twice")
            self.metadata[key] = self._value(*self._unpack("I"))
        headers = []
        for _ in range(num_tensors):
            name = self._string()
            (rank,) = self._unpack("I")
            shape = self._unpack(f"{rank}Q")[::-1]
            headers.append((name, shape, *self._unpack("IQ")))
        align = Fields(self.metadata, str(self._path)).count("general.alignment", 32)
        start = -(-self._place // align) * align
        self.tensors = {
            name: GgufTensor(shape, gguf.GGMLQuantizationType(kind), start + offset)
            for name, shape, kind, offset in headers
        }
        if len(self.tensors) < num_tensors:
            raise ValueError("it has two tensors of one name")
        place = start
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < place:
                raise ValueError(f"{shown(name)} begins before the tensor before it ends")
            place = tensor.offset + _num_bytes(tensor)
            if place > len(self._buffer):
                raise ValueError(f"it ends before the data of {shown(name)}")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        kind, count = self._unpack("IQ")
        if kind in (_STRING, _ARRAY):
            return [self._value(kind) for _ in range(count)]
        return list(self._unpack(f"{count}{_SCALARS[kind]}"))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        (text,) = self._unpack(f"{length}s")
        return text.decode("utf-8")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._buffer, self._place)
        self._place += struct.calcsize("<" + form)
        return values


def _num_bytes(tensor: GgufTensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // block * size
