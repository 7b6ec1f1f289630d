"""Step B's examples in files of numbers without a name, each read when it is asked for."""

import contextlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from expandr_jax.files.scratch import give_up, writing
from expandr_jax.files.stored_rows import Picked
from expandr_jax.objectives.packing import Example

# File -> type of an entry. An example's texts are its name's bytes and its tokens.
_TYPES = {
    "tokens": np.int32, "ends": np.int64, "texts": np.int64,
    "names": np.uint8, "name_ends": np.int64, "extras": np.float64,
}  # fmt: skip
_WHAT = "step B's examples"


class StoredResponses(Sequence[Example]):
    """Examples of a prompt and its responses, of which nothing is held in memory.

    Args:
        examples: Read once; all have the same names of `extras`.

    Raises:
        UserError: They cannot be written.
    """

    def __init__(self, examples: Iterable[Example]):
        self._extras: list[str] = []
        with contextlib.ExitStack() as stack:
            with writing(_WHAT):
                make, files = tempfile.TemporaryFile, {}
                for name in _TYPES:
                    files[name] = make(prefix="expandr-examples-")
                    stack.callback(give_up, files[name])
            ends = dict.fromkeys(("tokens", "ends", "names"), 0)

            def write(name: str, values: Sequence[Any]) -> None:
                files[name].write(np.asarray(values, _TYPES[name]).tobytes())
                if name in ends:
                    ends[name] += len(values)

            with writing(_WHAT):
                for name, value in (("ends", [0]), ("texts", [1]), ("name_ends", [0])):
                    write(name, value)
            for example in examples:
                self._extras = [*example.extras]
                name = [*example.name.encode(errors="surrogatepass")]
                with writing(_WHAT):
                    for ids in (example.prompt, *example.responses):
                        write("tokens", ids)
                        write("ends", [ends["tokens"]])
                    write("texts", [ends["ends"]])
                    write("names", name)
                    write("name_ends", [ends["names"]])
                    write("extras", [*example.extras.values()])
            with writing(_WHAT):
                for file in files.values():
                    file.flush()
            self._arrays = {name: _mapped(file, _TYPES[name]) for name, file in files.items()}

    def __len__(self) -> int:
        return len(self._arrays["texts"]) - 1

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Picked(self, range(len(self))[at])
        number, arrays = range(len(self))[at], self._arrays
        first, last = arrays["texts"][number : number + 2].tolist()
        ends = arrays["ends"][first - 1 : last].tolist()
        prompt, *responses = (
            array("i", arrays["tokens"][start:end].tobytes())
            for start, end in itertools.pairwise(ends)
        )
        start, end = arrays["name_ends"][number : number + 2].tolist()
        count = len(self._extras)
        values = arrays["extras"][count * number : count * (number + 1)].tolist()
        return Example(
            prompt,
            responses,
            dict(zip(self._extras, values, strict=True)),
            arrays["names"][start:end].tobytes().decode(errors="surrogatepass"),
        )


def _mapped(file: Any, kind: type) -> np.ndarray:
    """What a file holds, in memory as far as the system wants; it may be closed meanwhile."""
    if not file.tell():  # What is empty cannot be mapped.
        return np.zeros(0, kind)
    return np.asarray(np.memmap(file, kind, "r"))
