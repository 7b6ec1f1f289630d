"""Step B's examples in files of numbers without a name, each read when it is asked for."""

import contextlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
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


ResponseBlock = Mapping[str, np.ndarray]  # What `pack_responses` makes of some examples.


def pack_responses(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Examples as arrays, which processes hand each other.

    Returns:
        "tokens" of all texts, one after the other; "lengths" of the texts; "texts", how many each
        example has; "names" as bytes and "name_lengths"; "extras", all examples' numbers.
    """
    texts = [ids for example in examples for ids in (example.prompt, *example.responses)]
    names = [example.name.encode(errors="surrogatepass") for example in examples]
    extras = [value for example in examples for value in example.extras.values()]
    tokens = [np.asarray(ids, np.int32) for ids in texts]
    return {
        "tokens": np.concatenate(tokens or [np.zeros(0, np.int32)]),
        "lengths": np.array([*map(len, texts)], np.int64),
        "texts": np.array([1 + len(example.responses) for example in examples], np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_lengths": np.array([*map(len, names)], np.int64),
        "extras": np.array(extras, np.float64),
    }


class StoredResponses(Sequence[Example]):
    """Examples of a prompt and its responses, of which nothing is held in memory.

    Args:
        blocks: Some examples after the others, from `pack_responses`; read once.
        extras: The names of their numbers.

    Raises:
        UserError: They cannot be written.
    """

    def __init__(self, blocks: Iterable[ResponseBlock], extras: Sequence[str] = ()):
        self._extras = [*extras]
        with contextlib.ExitStack() as stack:
            with writing(_WHAT):
                make, files = tempfile.TemporaryFile, {}
                for name in _TYPES:
                    files[name] = make(prefix="expandr-examples-")
                    stack.callback(give_up, files[name])
            last = {"ends": 0, "texts": 1, "name_ends": 0}

            def write(name: str, values: Sequence[Any] | np.ndarray) -> None:
                files[name].write(np.asarray(values, _TYPES[name]).tobytes())

            def write_ends(name: str, lengths: np.ndarray) -> None:
                ends = last[name] + np.cumsum(lengths)
                write(name, ends)
                last[name] = int(ends[-1]) if len(ends) else last[name]

            with writing(_WHAT):
                for name, value in last.items():
                    write(name, [value])
            for block in blocks:
                with writing(_WHAT):
                    for name in ("tokens", "names", "extras"):
                        write(name, block[name])
                    write_ends("ends", block["lengths"])
                    write_ends("texts", block["texts"])
                    write_ends("name_ends", block["name_lengths"])
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
