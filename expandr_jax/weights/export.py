"""Writes models in the formats of the PyTorch world: transformers and sentence-transformers.

A directory appears whole or not at all.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.models.generator import Generator
from expandr_jax.models.retriever import Retriever
from expandr_jax.weights.names import to_hf, weights_of
from expandr_jax.weights.sentence_transformers import Settings, write_settings

# Classes of transformers by model_type: (without a head, with the language model's).
_CLASSES = {
    "bert": ("BertModel", "BertForMaskedLM"),
    "camembert": ("CamembertModel", "CamembertForMaskedLM"),
    "gemma3_text": ("Gemma3TextModel", "Gemma3ForCausalLM"),
    "llama": ("LlamaModel", "LlamaForCausalLM"),
    "mistral": ("MistralModel", "MistralForCausalLM"),
    "qwen2": ("Qwen2Model", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Model", "Qwen3ForCausalLM"),
    "roberta": ("RobertaModel", "RobertaForMaskedLM"),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaForMaskedLM"),
}


def export_retriever(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a directory that sentence-transformers loads, and `load_retriever` too.

    Args:
        directory: Replaced if it is there.
        retriever: The encoder and its settings.
        params: Its parameters, adapters merged.
        dtype: Type of the tensors; None keeps that of `params`.

    Raises:
        UserError: If the directory cannot be written.
    """
    settings = Settings(
        pooling=retriever.pooling,
        normalize=retriever.normalize,
        max_length=retriever.max_length,
        query_prompt=retriever.query_prompt,
        document_prompt=retriever.document_prompt,
    )
    with new_directory(directory) as new:
        # transformers keeps a bare model's names without a prefix.
        _write_model(new, retriever, params, with_head=False, prefix="", dtype=dtype)
        _write_tokenizer(new, retriever.tokenizer, retriever.max_length)
        write_settings(new, settings, retriever.module.config.hidden_size)


def export_generator(
    directory: str | os.PathLike, generator: Generator, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a directory that transformers loads as a causal language model that can chat.

    Args:
        directory: Replaced if it is there.
        generator: The model.
        params: Its parameters, adapters merged (`merge_lora`).
        dtype: Type of the tensors; None keeps that of `params`.

    Raises:
        UserError: If the directory cannot be written.
    """
    eos = list(generator.eos_ids)
    generation = {
        "bos_token_id": generator.tokenizer.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": generator.pad_id,
        **(generator.source.generation_config or {}),
    }
    with new_directory(directory) as new:
        _write_model(new, generator, params, with_head=True, prefix="model.", dtype=dtype)
        _write_json(new / "generation_config.json", generation)
        _write_tokenizer(new, generator.tokenizer, generator.tokenizer.model_max_length)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new directory beside `path` that takes its place if the block ends well.

    Raises:
        UserError: If it cannot be written.
    """
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            new.chmod(0o755)
            yield new
            if path.exists():
                old = new.with_name(new.name + ".old")
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old)
            else:
                new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def _write_model(
    directory: Path,
    model: Retriever | Generator,
    params: Mapping[str, Any],
    *,
    with_head: bool,
    prefix: str,
    dtype: Any,
) -> None:
    """Writes model.safetensors and config.json."""
    module = model.module
    tensors = to_hf(params, weights_of(module.config, with_head), prefix)
    if dtype is not None:
        tensors = {name: np.asarray(value, dtype) for name, value in tensors.items()}
    save_tensors(directory / "model.safetensors", tensors)
    config = {key: value for key, value in model.source.config.items() if key != "dtype"}
    config["architectures"] = [_CLASSES[config["model_type"]][with_head]]
    config["torch_dtype"] = jnp.dtype(next(iter(tensors.values())).dtype).name
    _write_json(directory / "config.json", config)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file that PyTorch's loaders accept."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The class that versions 4 and 5 both know; the present name is not known to 4.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_length
    _write_json(path, settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
