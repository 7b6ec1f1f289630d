"""A model's files as one object: configuration, tokenizer, and tensors read one at a time."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.weights.tokenizer import read_json, read_tokenizer


class ModelFiles(Protocol):
    """What every format offers, in Hugging Face's names and layout.

    Attributes:
        where: The weights file, for messages.
        files: The weights files.
        config: As in config.json.
        generation_config: As in generation_config.json, if there is one.
    """

    where: str
    files: list[Path]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""

    def read(self, name: str) -> np.ndarray:
        """One tensor."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, chat template included."""


class HfDirectory:
    """A directory as transformers writes it; a `ModelFiles`."""

    def __init__(self, path: Path):
        """Opens the files; raises UserError if one is missing or cannot be read."""
        self._path = path
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", {}) or None
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if single.is_file():
            self.where, self.files = str(single), [single]
        elif index.is_file():
            shards = set(read_json(index).get("weight_map", {}).values())
            self.where, self.files = str(index), [path / name for name in sorted(shards)]
        else:
            raise UserError(
                f"{path}: no model.safetensors here; pytorch_model.bin, a pickle, can run code "
                "when read and is refused: load and save such a model with transformers first"
            )
        if not self.files:
            raise UserError(f"{index}: it lists no weights files")
        self._stored = {}
        self._shapes = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: not a readable safetensors file: {error}") from None
            names = handle.keys()
            for name in names:
                # Files converted from TensorFlow keep its names of a norm's parameters.
                present = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                present = present.replace("LayerNorm.beta", "LayerNorm.bias")
                self._stored[present] = handle, name
                self._shapes[present] = tuple(handle.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type it has in the file."""
        handle, stored_name = self._stored[name]
        return handle.get_tensor(stored_name)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, chat template included."""
        return read_tokenizer(self._path, self.config.get("model_type"))
