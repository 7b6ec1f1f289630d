"""A model's files as one object: configuration, tokenizer, and tensors read by rows."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.weights.fairseq import FairseqTokenizer
from expandr_jax.weights.safetensors_file import SafetensorsFile
from expandr_jax.weights.tokenizer import read_json, read_tokenizer

# AnchorDR's config.json says T5; only this tensor tells them apart.
_OF_ANCHORDR = "encoder.pos_embed.weight"
_ANCHORDR_LENGTH = 1024


class ModelFiles(Protocol):
    """What every format offers, in Hugging Face's names and layout.

    Attributes:
        where: The weights file, for messages.
        files: The weights files.
        config: As in config.json.
        generation_config: As in generation_config.json, if there is one.
        model_type: Which family it is of.
    """

    where: str
    files: list[Path]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
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
        for path in self.files:
            file = SafetensorsFile(path)
            for name in file.entries:
                # Files converted from TensorFlow keep its names of a norm's parameters.
                present = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                present = present.replace("LayerNorm.beta", "LayerNorm.bias")
                self._stored[present] = file, name

    @property
    def model_type(self) -> str | None:
        """config.json's, or "anchordr" for the model that only its tensors tell from T5."""
        return "anchordr" if _OF_ANCHORDR in self._stored else self.config.get("model_type")

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
        if self.model_type == "anchordr":
            return FairseqTokenizer(self._path, _ANCHORDR_LENGTH)
        return read_tokenizer(self._path, self.model_type)
