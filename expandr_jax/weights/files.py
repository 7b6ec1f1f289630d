"""A model's files as one object: configuration, tokenizer, and tensors read by rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.weights.fairseq import FairseqTokenizer
from expandr_jax.weights.families import find_family, type_by_tensors
from expandr_jax.weights.fields import Fields, path_inside, shown
from expandr_jax.weights.safetensors_file import SafetensorsFile
from expandr_jax.weights.tokenizer import read_tokenizer


class ModelFiles(Protocol):
    """What every format offers, in Hugging Face's names and layout.

    Attributes:
        where: The weights file, for messages.
        files: The weights files.
        config: As in config.json.
        generation_config: As in generation_config.json; without fields if there is none.
        model_type: Which family it is of.
    """

    where: str
    files: list[Path]
    config: Fields
    generation_config: Fields
    model_type: str | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""

    def dtypes(self) -> dict[str, np.dtype]:
        """Types of all tensors by name."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of it."""

    def tokenizer(self) -> PreTrainedTokenizerFast | FairseqTokenizer:
        """The tokenizer, chat template included."""


class HfDirectory:
    """A directory as transformers writes it; a `ModelFiles`."""

    def __init__(self, path: Path):
        """Opens the files; raises UserError if one is missing or cannot be read."""
        self._path = path
        self.config = Fields.read(path / "config.json")
        self.generation_config = Fields.read(path / "generation_config.json", optional=True)
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if single.is_file():
            self.where, self.files, places = str(single), [single], {}
        elif index.is_file():
            self.where, places = str(index), _read_index(index)
            self.files = sorted({*places.values()})
        else:
            raise UserError(
                f"{path}: no model.safetensors here; pytorch_model.bin, a pickle, can run code "
                "when read and is refused: load and save such a model with transformers first"
            )
        self._stored = {}
        for file_path in self.files:
            file = SafetensorsFile(file_path)
            for name in file.entries:
                # Files converted from TensorFlow keep its names of a norm's parameters.
                present = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                present = present.replace("LayerNorm.beta", "LayerNorm.bias")
                if present in self._stored:
                    raise UserError(f"{file_path}: tensor {shown(name)} is there twice")
                self._stored[present] = file, name
            _check_listed(file, [name for name in places if places[name] == file_path], file_path)

    @property
    def model_type(self) -> str | None:
        """config.json's, or that of a family which only its tensors tell from another."""
        return type_by_tensors(self._stored) or self.config.values.get("model_type")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: file.entries[key].shape for name, (file, key) in self._stored.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """Types of all tensors by name."""
        return {name: file.entries[key].dtype for name, (file, key) in self._stored.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of it, in the type it has in the file."""
        file, stored_name = self._stored[name]
        return file.read(stored_name, rows)

    def tokenizer(self) -> PreTrainedTokenizerFast | FairseqTokenizer:
        """The tokenizer, chat template included."""
        own = find_family(self.config.where, self.model_type).tokenizer
        return read_tokenizer(self._path, self.model_type) if own is None else own(self._path)


def _read_index(index: Path) -> dict[str, Path]:
    """Where each tensor is, by the index of a model in several files."""
    listed = Fields.read(index).section("weight_map")
    names = {tensor: listed.text(tensor) for tensor in listed.values}
    places = {tensor: path_inside(index.parent, names[tensor], str(index)) for tensor in names}
    for path in sorted({*places.values()}):
        if not path.is_file():
            raise UserError(f"{index}: it names {path.name}, which is not there: fetch it too")
    if not places:
        raise UserError(f"{index}: it lists no weights files")
    return places


def _check_listed(file: SafetensorsFile, names: Iterable[str], where: Path) -> None:
    """Refuses a file that lacks tensors which the index says it has."""
    missing = sorted({*names} - file.entries.keys())
    if missing:
        raise UserError(
            f"{where}: {len(missing)} tensors are missing that the index places here: "
            + shown(", ".join(missing))
        )
