"""A model's files as one object: configuration, tokenizer, and tensors read by rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import Pooling
from expandr_jax.weights.fairseq import FairseqTokenizer
from expandr_jax.weights.families import BY_TYPE, find_family
from expandr_jax.weights.fields import Fields, path_inside, shown
from expandr_jax.weights.safetensors_file import SafetensorsFile
from expandr_jax.weights.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files of a model, whatever their format, in Hugging Face's names and layout.

    Attributes:
        where: The weights file, for messages.
        files: The weights files.
        config: As in config.json.
        generation_config: As in generation_config.json; without fields if there is none.
        model_type: Which family it is of.
        tensors: Shapes and types of all tensors by name, those of a GGUF file once dequantized.
        read: (name, rows) -> a tensor, or some rows of it.
        tokenizer: Makes the tokenizer, chat template included.
        pooling: What makes a text's vector, where the weights file says so.
        adapter: The directory of a PEFT adapter that is to be merged into the model.
    """

    where: str
    files: Sequence[Path]
    config: Fields
    generation_config: Fields
    model_type: str | None
    tensors: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str, slice], np.ndarray]
    tokenizer: Callable[[], PreTrainedTokenizerFast | FairseqTokenizer]
    pooling: Pooling | None = None
    adapter: Path | None = None


def open_directory(path: Path) -> ModelFiles:
    """Opens a directory as transformers writes it.

    Raises:
        UserError: If a file is missing or cannot be read.
    """
    config = Fields.read(path / "config.json")
    generation_config = Fields.read(path / "generation_config.json", optional=True)
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        where, files, places = single, [single], {}
    elif index.is_file():
        where, places = index, _read_index(index)
        files = sorted({*places.values()})
    else:
        raise UserError(
            f"{path}: no model.safetensors here; pytorch_model.bin, a pickle, can run code "
            "when read and is refused: load and save such a model with transformers first"
        )
    stored, tensors = {}, {}
    for file_path in files:
        file = SafetensorsFile(file_path)
        for name, tensor in file.entries.items():
            # Files converted from TensorFlow keep its names of a norm's parameters.
            present = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            present = present.replace("LayerNorm.beta", "LayerNorm.bias")
            if present in stored:
                raise UserError(f"{file_path}: tensor {shown(name)} is there twice")
            stored[present], tensors[present] = (file, name), tensor
        listed = {name for name, place in places.items() if place == file_path}
        if missing := sorted(listed - file.entries.keys()):
            raise UserError(
                f"{file_path}: {len(missing)} tensors are missing that the index places here: "
                + shown(", ".join(missing))
            )
    # config.json's type, or that of a family which only its tensors tell from another.
    told = (kind for kind, family in BY_TYPE.items() if family.marker in stored)
    model_type = next(told, config.values.get("model_type"))

    def read(name: str, rows: slice) -> np.ndarray:
        file, key = stored[name]
        return file.read(key, rows)

    def tokenizer() -> PreTrainedTokenizerFast | FairseqTokenizer:
        own = find_family(config.where, model_type).tokenizer
        return read_tokenizer(path, model_type) if own is None else own(path)

    return ModelFiles(
        where=str(where),
        files=files,
        config=config,
        generation_config=generation_config,
        model_type=model_type,
        tensors=tensors,
        read=read,
        tokenizer=tokenizer,
    )


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
