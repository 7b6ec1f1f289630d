"""Reads and writes safetensors files a piece at a time.

The safetensors library reads the headers. It maps a file into memory, and what it has read of the
tensors stays resident; here one, or some rows of it, is read or written and then forgotten.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from expandr_jax.errors import UserError
from expandr_jax.weights.fields import one_line, shown

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_TYPES = {name: np.dtype(dtype) for name, dtype in _TYPES.items()}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class SafetensorsFile:
    """The parsed header of a safetensors file.

    Attributes:
        entries: Shapes and types of its tensors by name.
    """

    def __init__(self, path: Path):
        """Parses the header; raises UserError if it is not a whole safetensors file."""
        self._path, self.entries, self._offsets = path, {}, {}
        try:
            with path.open("rb") as file:
                offset = 8 + int.from_bytes(file.read(8), "little")
            # The library refuses a header whose tensors do not fill the file, one after another.
            with safe_open(path, "numpy") as file:
                for name in file.offset_keys():
                    tensor = file.get_slice(name)
                    kind = tensor.get_dtype()
                    if kind not in _TYPES:
                        raise UserError(f"{path}: {shown(name)} is of unknown type {kind}")
                    entry = jax.ShapeDtypeStruct(tuple(tensor.get_shape()), _TYPES[kind])
                    self.entries[name], self._offsets[name] = entry, offset
                    offset += entry.size * entry.dtype.itemsize
        except OSError as error:
            raise UserError(f"{path}: cannot read it: {error.strerror}") from None
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file: {one_line(error)}") from None

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of it, in the type it has in the file."""
        entry = self.entries[name]
        start, stop, _ = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        width = math.prod(entry.shape[1:])
        offset = self._offsets[name] + start * width * entry.dtype.itemsize
        count = (stop - start) * width
        values = np.fromfile(self._path, entry.dtype, count, offset=offset)
        return values.reshape((stop - start, *entry.shape[1:]) if entry.shape else ())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written.

    Attributes:
        dtype: Its type in the file.
        shape: Its shape.
        parts: Makes arrays which, one after another, are its rows.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that PyTorch's loaders accept, holding one part of one tensor at a time."""
    # Wide types first, so that every tensor begins at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.num_bytes],
        }
        place += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for part in tensors[name].parts():
                array = np.ascontiguousarray(part, tensors[name].dtype)
                file.write(array.reshape(-1).view(np.uint8).data)


def write_plain_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as they are."""
    write_safetensors(
        path, {name: Tensor(x.dtype, x.shape, lambda x=x: [x]) for name, x in arrays.items()}
    )
