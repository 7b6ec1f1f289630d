"""Writes models in the formats of the PyTorch world: transformers and sentence-transformers.

A directory appears whole or not at all.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.models.generator import Generator
from expandr_jax.models.pooling import dense_name
from expandr_jax.models.retriever import Retriever
from expandr_jax.weights.families import family_of
from expandr_jax.weights.names import Weight
from expandr_jax.weights.sentence_transformers import write_dense, write_settings
from expandr_jax.weights.store import named_tensors, write_model_files

# A directory with one of these is a model, and may be replaced by another.
_WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}

# The model card of a query tower.
PAIR = """# Query encoder

It encodes queries alone. Documents are encoded by the retriever beside it, `../retriever`, with the
same vectors as before: an index of them stays as it is.

    from sentence_transformers import SentenceTransformer

    queries = SentenceTransformer("export/query-encoder").encode_query(["how to pad an array"])
    documents = SentenceTransformer("export/retriever").encode_document(["pad(array, width)"])
    scores = queries @ documents.T

As one model, with sentence-transformers 6 (5 has Router in `sentence_transformers.models`):

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Router

    pair = Router.for_query_document(
        query_modules=[*SentenceTransformer("export/query-encoder")],
        document_modules=[*SentenceTransformer("export/retriever")],
    )
    model = SentenceTransformer(modules=[pair])
    scores = model.encode_query(["how to pad an array"]) @ model.encode_document(["pad()"]).T

Such a model has no prompts of its own: where the two have any, give them as `prompts`. It learned
the vectors that queries have with a generated passage; it takes no passage itself.
"""

MAX_SHARD_BYTES = 5 * 10**9  # Above it transformers, too, writes several files.


def export_retriever(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a directory that sentence-transformers loads, and `load_retriever` too.

    Args:
        directory: Replaced if it is there.
        retriever: The encoder and its settings.
        params: Its parameters, adapters merged.
        dtype: Type of the tensors; None keeps that of `params`, "source" takes each tensor's own
            where the model came from.

    Raises:
        UserError: If the directory cannot be written, or sentence-transformers has no such model.
    """
    if not family_of(retriever.module).is_stock:
        raise UserError(
            f"{directory}: transformers, and so sentence-transformers, has no such model and "
            "cannot load it; export it in its own layout (train.export --format=encoder)"
        )
    with new_directory(directory) as new:
        write_model(new, retriever, params, dtype, retriever.max_length)
        folders = write_settings(new, retriever)
        for number, (folder, activation) in enumerate(zip(folders, retriever.dense, strict=True)):
            write_dense(folder, params[dense_name(number)], activation)


def export_encoder(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes the encoder and its tokenizer alone, in the layout that it came in.

    Pooling, normalisation and prompts are not part of it. transformers loads it, but for AnchorDR,
    which its authors' code loads. Arguments are those of `export_retriever`.

    Raises:
        UserError: If the directory cannot be written.
    """
    with new_directory(directory) as new:
        write_model(new, retriever, params, dtype, retriever.max_length)


def export_trained(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any
) -> None:
    """Writes a retriever for sentence-transformers, or the encoder alone where that has no such."""
    write = export_retriever if family_of(retriever.module).is_stock else export_encoder
    write(directory, retriever, params, dtype)


def export_query_encoder(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any
) -> None:
    """`export_trained` of a query tower, with a README that says how the pair is used."""
    export_trained(directory, retriever, params, dtype)
    if family_of(retriever.module).is_stock:
        Path(directory, "README.md").write_text(PAIR, encoding="utf-8")


def export_generator(
    directory: str | os.PathLike, generator: Generator, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a directory that transformers loads as a causal language model that can chat.

    Arguments are those of `export_retriever`.

    Raises:
        UserError: If the directory cannot be written.
    """
    eos = list(generator.eos_ids)
    generation = {
        "bos_token_id": generator.tokenizer.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": generator.pad_id,
        **generator.files.generation_config.values,
    }
    with new_directory(directory) as new:
        length = generator.tokenizer.model_max_length
        write_model(new, generator, params, dtype, length, with_head=True)
        _write_json(new / "generation_config.json", generation)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new directory beside `path` that takes its place if the block ends well.

    Raises:
        UserError: If it cannot be written, or if what is there is no model, but a run, say.
    """
    path = Path(path).absolute()
    try:
        if path.exists() and not _is_replaceable(path):
            raise UserError(f"{path}: it is there and holds no model, so it is kept: name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
        ) as name:
            new = Path(name)
            new.chmod(0o755)
            yield new
            if path.exists():
                old = new.with_name(new.name + ".old")
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old)
            else:
                new.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def _is_replaceable(path: Path) -> bool:
    """Whether it is an empty directory or holds a model's weights."""
    if not path.is_dir():
        return False
    names = set(os.listdir(path))
    return not names or not names.isdisjoint(_WEIGHTS)


def write_model(
    directory: Path,
    model: Any,
    params: Mapping[str, Any],
    dtype: Any,
    max_length: int,
    *,
    with_head: bool = False,
    weights: Sequence[Weight] | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
) -> None:
    """Writes the weights, config.json, and the tokenizer with the longest input it says.

    Args:
        directory: It is there.
        model: A `Retriever`, a `Generator` or a `CrossEncoder`.
        params: Its parameters, adapters merged.
        dtype: As of `export_retriever`.
        max_length: Most tokens of a text.
        with_head: A language model is written with its head.
        weights: Where the tensors belong, of a model with another head.
        prefix: What stands before its names, but for the head's.
        architecture: transformers' class of it.
    """
    from transformers import PreTrainedTokenizerFast

    shape, family = model.module.config, family_of(model.module)
    if form := getattr(shape, "quantized", ""):
        raise UserError(f"weights in {form} are not exported: load the model in float32 for that")

    def dtype_of(name: str, present: np.dtype) -> np.dtype:
        if dtype == "source":
            found = (model.files.tensors.get(prefix + name) for prefix in family.prefixes)
            return next((tensor.dtype for tensor in found if tensor is not None), present)
        return present if dtype is None else np.dtype(dtype)

    # transformers keeps a bare model's names without a prefix.
    tensors = named_tensors(
        params,
        family.weights(shape, with_head) if weights is None else weights,
        ("model." if with_head else "") if prefix is None else prefix,
        dtype_of,
        with_copies=not family.is_stock,
    )
    write_model_files(directory, tensors, MAX_SHARD_BYTES)
    config = {key: value for key, value in model.files.config.values.items() if key != "dtype"}
    if family.is_stock:
        config["architectures"] = [architecture or family.classes[config["model_type"]][with_head]]
    config["torch_dtype"] = next(iter(tensors.values())).dtype.name
    _write_json(directory / "config.json", config)
    model.tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(model.tokenizer, PreTrainedTokenizerFast):
        # The class that versions 4 and 5 both know; the present name is not known to 4.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = max_length
    _write_json(path, settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
