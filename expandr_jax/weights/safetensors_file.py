"""Reads and writes safetensors files a piece at a time.

The safetensors library maps a file into memory, and what it has read stays resident; here a tensor,
or some rows of it, is read or written and then forgotten.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from expandr_jax.errors import UserError

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
_LONGEST_HEADER = 100_000_000  # The library's own limit, in bytes.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        offset: Of its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The parsed header of a safetensors file.

    Attributes:
        entries: By name.
    """

    def __init__(self, path: Path):
        """Parses the header; raises UserError if it is not a whole safetensors file."""
        self._path = path
        try:
            self.entries = dict(_parse(path))
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of it, in the type it has in the file."""
        entry = self.entries[name]
        start, stop, _ = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        width = math.prod(entry.shape[1:])
        offset = entry.offset + start * width * entry.dtype.itemsize
        count = (stop - start) * width
        values = np.fromfile(self._path, entry.dtype, count, offset=offset)
        return values.reshape((stop - start, *entry.shape[1:]) if entry.shape else ())


def _parse(path: Path) -> Iterator[tuple[str, Entry]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
            raise ValueError(f"the place of {name} does not fit it")
        yield name, Entry(dtype, shape, 8 + length + start)


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
    parts: Iterable[np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that PyTorch's loaders accept, holding one part of one tensor at a time.

    Args:
        path: The file.
        tensors: By name.
    """
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
            for part in tensors[name].parts:
                array = np.ascontiguousarray(part, tensors[name].dtype)
                file.write(array.reshape(-1).view(np.uint8).data)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as they are."""
    tensors = {name: Tensor(array.dtype, array.shape, [array]) for name, array in arrays.items()}
    write_safetensors(path, tensors)
