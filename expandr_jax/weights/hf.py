"""Loads models: Hugging Face and sentence-transformers directories, hub ids, and GGUF files."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import merge_lora
from expandr_jax.models.pooling import Pooling, dense_name
from expandr_jax.models.quantized import kept_in
from expandr_jax.models.retriever import Retriever
from expandr_jax.models.token_ids import check_ids
from expandr_jax.sharding import device_put, replicated
from expandr_jax.weights.adapter import adapter_base, load_adapter
from expandr_jax.weights.blocks import BLOCK_PROMPTS, suffix_ids, with_blocks
from expandr_jax.weights.fairseq import FairseqTokenizer
from expandr_jax.weights.families import find_family, model_config
from expandr_jax.weights.families.family import Family
from expandr_jax.weights.fields import Fields, is_count, one_line, shown
from expandr_jax.weights.files import ModelFiles, open_directory
from expandr_jax.weights.gguf import open_gguf
from expandr_jax.weights.load import load_params
from expandr_jax.weights.sentence_transformers import ModuleSettings, read_dense, read_settings
from expandr_jax.weights.source import check_hash, locate
from expandr_jax.weights.store import merge_stored, stored_params
from expandr_jax.weights.tokenizer import (
    ANY_LENGTH,
    TOKENIZER_FILES,
    end_texts,
    read_tokenizer,
)
from expandr_jax.weights.trees import module_shardings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Params = dict[str, Any]
# What generation_config.json can forbid, force or end a text by, beside eos_token_id.
_CHOOSING = (
    "bad_words_ids", "begin_suppress_tokens", "constraints", "exponential_decay_length_penalty",
    "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "max_time", "sequence_bias",
    "stop_strings", "suppress_tokens", "watermarking_config",
)  # fmt: skip


def load_retriever(
    source: str,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    query_length: int = 0,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    compute_dtype: Any = jnp.float32,
    sha256: str | None = None,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    in_files: bool = False,
    bidirectional: bool = False,
    end_token: bool = False,
    with_head: bool = False,
) -> tuple[Retriever, Params]:
    """Loads a text encoder; what is not given is read from a sentence-transformers directory.

    Args:
        source: A directory, a .gguf file, "package:NAME/PATH", or a hub id. A PEFT adapter is
            merged into the base that it names.
        pooling: From token vectors to the text's.
        normalize: Whether vectors are scaled to length one.
        max_length: Longest input in tokens.
        query_length: Longest query in tokens; 0: as `max_length` has it.
        query_prompt: Put before queries.
        document_prompt: Put before documents.
        compute_dtype: Type of the module's computations.
        sha256: Pinned hash of the weights file.
        mesh: Devices to spread the parameters over by `sharding.RULES`; None means the default one.
        dtype: Type of the parameters, as in `load_generator`.
        in_files: Parameters stay in the files, as `stored_params` has them: for an export.
        bidirectional: A decoder is read without its causal mask, whatever its files say.
        end_token: The tokenizer puts its end token behind each text, whatever its files say.
        with_head: A decoder's output head is loaded, too, which makes no vectors.

    Returns:
        The retriever and its parameters.

    Raises:
        UserError: If the source is not there or is not a model that is supported and complete; if
            nothing says how to pool, or no text fits `max_length`.
    """
    path = locate(source)
    settings = read_settings(path, document_prompt) if path.is_dir() else None
    has_blocks = settings is not None and settings.pooling == "block"
    files = open_model(source, sha256)
    family = find_family(files.config.where, files.model_type)
    if bidirectional:
        files = _unmasked(files, family)
    if settings is None:
        if not family.is_stock:  # No library writes a modules.json for it.
            settings = ModuleSettings(family.pooling, False)
        elif (pooling := pooling or files.pooling) is None or normalize is None:
            raise UserError(f"{path}: no modules.json here: pooling and normalize must be given")
        else:
            settings = ModuleSettings(pooling, normalize)
    pooling = pooling or settings.pooling
    if (pooling == "decoder") != (family.pooling == "decoder"):
        raise UserError(f"{path}: pooling {pooling!r} and a {files.model_type} model do not fit")
    files = with_blocks(files, has_blocks) if pooling == "block" else files
    config = model_config(files.config, files.model_type)
    tokenizer = open_tokenizer(files, config)
    if end_token:
        end_texts(tokenizer, files.config.where)
    suffixes: dict[str, tuple[int, ...]] = {}
    if pooling == "block":
        suffixes = {f"{kind}_suffix": suffix_ids(tokenizer, kind) for kind in BLOCK_PROMPTS}
    behind = max(map(len, suffixes.values()), default=0)
    check_length(str(path), tokenizer, config, max_length, query_length, behind)
    if tokenizer.pad_token is None:
        # Padding is always masked, so any token will do; sentence-transformers wants one named.
        tokenizer.pad_token = tokenizer.eos_token
    options = mesh, in_files
    module, params = load_module(files, config, with_head, dtype, compute_dtype, *options)
    width = module.config.hidden_size
    for number, (_, folder) in enumerate(settings.dense):
        dense = read_dense(folder, width)
        width = dense["kernel"].shape[1]
        if not in_files:
            dense = jax.device_put(dense) if mesh is None else device_put(dense, replicated(mesh))
        params[dense_name(number)] = dense
    # What sentence-transformers' own file says is in the place of the tokenizer's.
    said = settings.max_length or tokenizer.model_max_length
    positions = module.config.max_positions
    if hasattr(module.config, "rope_theta"):  # It has no table of positions, which would end.
        positions = max(positions, settings.max_length or 0)
    limits = positions, max_length or said, ANY_LENGTH
    length = min(limit for limit in limits if limit)
    if said and length > said:
        message = "%s: texts of up to %d tokens are read, as max_length says; its files say %d"
        logger.warning(message, path, length, said)
    retriever = Retriever(
        module=module,
        pooling=pooling,
        normalize=settings.normalize if normalize is None else normalize,
        max_length=length,
        query_prompt=settings.query_prompt if query_prompt is None else query_prompt,
        document_prompt=settings.document_prompt if document_prompt is None else document_prompt,
        tokenizer=tokenizer,
        files=files,
        dense=tuple(activation for activation, _ in settings.dense),
        query_length=query_length,
        **suffixes,
    )
    return retriever, params


def load_generator(
    source: str,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    sha256: str | None = None,
    mesh: Mesh | None = None,
    in_files: bool = False,
) -> tuple[Generator, Params]:
    """Loads a chat model.

    Args:
        source: As in `load_retriever`, as are the arguments below.
        dtype: Type of the parameters, but for those of norms: float32. If it is one of
            `QUANTIZED_TYPES`, projections are rounded to it, and the rest is in `compute_dtype`.

    Returns:
        The generator and its parameters.

    Raises:
        UserError: As there; if the model is an encoder, or has no chat template or end.
    """
    files = open_model(source, sha256)
    config = model_config(files.config, files.model_type)
    family = find_family(files.config.where, files.model_type)
    if not family.generates:
        raise UserError(f"{source}: a {files.model_type} model cannot generate text")
    tokenizer = open_tokenizer(files, config)
    if tokenizer.chat_template is None:
        hint = " or remove the adapter's tokenizer files, and its base's are taken" * (
            files.adapter is not None
        )
        raise UserError(
            f"{source}: the tokenizer has no chat template; take an instruct model{hint}"
        )
    # An empty value of these is none. All other settings of sampling are the config's.
    given = files.generation_config.values.items()
    given = {name: value for name, value in given if value not in ([], {})}
    Fields(given, files.generation_config.where).only(
        guidance_scale=1.0, no_repeat_ngram_size=0, token_healing=False, **dict.fromkeys(_CHOOSING)
    )
    if not config.causal:
        raise UserError(f"{source}: it is read without a causal mask, and so cannot generate text")
    eos_ids = _eos_ids(files, tokenizer, config.vocab_size)
    if not eos_ids:
        raise UserError(f"{source}: neither the model nor its tokenizer names an eos token")
    pad = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generator = Generator(family.module(config), tokenizer, eos_ids, pad, files)
    _check_template(generator, source)
    module, params = load_module(files, config, True, dtype, compute_dtype, mesh, in_files)
    return dataclasses.replace(generator, module=module), params


def _unmasked(files: ModelFiles, family: Family) -> ModelFiles:
    """The files with a config.json that asks for no causal mask."""
    if family.unmasked is None:
        raise UserError(
            f"{files.config.where}: retriever.bidirectional is for decoders; a {files.model_type} "
            "model has no causal mask"
        )
    values = {**files.config.values, **family.unmasked(files.model_type)}
    return dataclasses.replace(files, config=Fields(values, files.config.where))


def check_length(
    where: str,
    tokenizer: Any,
    config: Any,
    max_length: int | None,
    query_length: int,
    behind: int = 0,
) -> None:
    """Refuses lengths that no text fits into, and a tokenizer of other tokens than the model's.

    `behind`: tokens of a text beside those that the tokenizer adds.
    """
    check_ids(tokenizer, (specials := tokenizer([""])["input_ids"]), config.vocab_size)
    added = len(specials[0]) + behind
    for name, most in (("max_length", max_length), ("query_length", query_length)):
        if most and most <= added:
            # The tokenizer would cut nothing.
            raise UserError(
                f"{where}: {name} is {most}; expected more than the {added} tokens that stand "
                "beside each text"
            )


def open_tokenizer(files: ModelFiles, config: Any) -> PreTrainedTokenizerFast | FairseqTokenizer:
    """A model's tokenizer; UserError where it has more tokens than the model."""
    tokenizer = files.tokenizer()
    # Added tokens may lie beyond the table, such as Gemma's for images; `check_ids` finds them in
    # what the tokenizer adds to each text and in texts.
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{files.config.where}: vocab_size is {config.vocab_size}, but the tokenizer here has "
            f"{tokenizer.vocab_size} tokens: it is another model's"
        )
    return tokenizer


def _eos_ids(
    files: ModelFiles, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> tuple[int, ...]:
    """The ids that end a text; none where nothing names any."""
    fields = files.generation_config if files.generation_config.values else files.config
    eos = fields.values.get("eos_token_id")
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(is_count(token, 0, vocab_size - 1) for token in ids):
        raise UserError(
            f"{fields.where}: eos_token_id is {shown(eos)}; expected a token's id, from 0 to "
            f"{vocab_size - 1}, or a list of them"
        )
    return ids


def _check_template(generator: Generator, source: str) -> None:
    """Refuses a chat template that cannot be applied, or has tokens that the model lacks."""
    try:
        ids, _ = generator.chat_ids("text", 1)
    except UserError as error:
        raise UserError(f"{source}: its chat template: {error}") from None
    except Exception as error:  # A template may raise anything.
        raise UserError(
            f"{source}: its chat template cannot be applied: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from None
    if not ids:
        raise UserError(f"{source}: its chat template makes nothing of a user's message")


def open_model(source: str, sha256: str | None = None) -> ModelFiles:
    """Opens a source's files, those of its base for a PEFT adapter, and checks its hash.

    Args:
        source: As in `load_retriever`.
        sha256: Pinned hash of the weights file; of the adapter's where it is one.

    Raises:
        UserError: If it is not there, or cannot be read.
    """
    path = locate(source)
    base = adapter_base(path) if path.is_dir() else None
    if base is None:
        files = _open_files(path)
        check_hash(files.files, sha256)
        return files
    check_hash([path / "adapter_model.safetensors"], sha256)
    below = locate(*base)
    if below.is_dir() and adapter_base(below) is not None:
        raise UserError(f"{path}: its base {base[0]} is an adapter, too: merge that one first")
    files = dataclasses.replace(_open_files(below), adapter=path)
    if any((path / name).is_file() for name in TOKENIZER_FILES):  # As transformers finds it.
        files = _with_tokenizer(files, path)
    return files


def _with_tokenizer(files: ModelFiles, directory: Path) -> ModelFiles:
    """A base's files with an adapter's own tokenizer, whose end of text is one more of theirs."""
    try:
        tokenizer = read_tokenizer(directory, files.model_type)
    except UserError as error:
        raise UserError(
            f"{error}; or remove the adapter's tokenizer files, and its base's are taken"
        ) from None
    told = files.generation_config if files.generation_config.values else files.config
    ends = told.values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    values = {**files.generation_config.values, **({"eos_token_id": ends} if ends else {})}
    return dataclasses.replace(
        files,
        tokenizer=lambda: tokenizer,
        generation_config=Fields(values, files.generation_config.where),
    )


def _open_files(path: Path) -> ModelFiles:
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path}: a model is a directory or a .gguf file")
    return open_gguf(path) if path.is_file() else open_directory(path)


def load_module(
    files: ModelFiles,
    config: Any,
    with_head: bool,
    dtype: Any,
    compute_dtype: Any,
    mesh: Mesh | None,
    in_files: bool = False,
) -> tuple[nn.Module, Params]:
    """The module of a model and its parameters, the adapter merged; arguments as there."""
    family = find_family(files.config.where, files.model_type)
    weights = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    module, dtype = kept_in(family.module(config, dtype=compute_dtype), weights, files.where)
    shardings = None if mesh is None else module_shardings(mesh, module)
    table, merge = family.weights(config, with_head), merge_stored if in_files else merge_lora
    if in_files:
        params = stored_params(files, module, table)
    else:
        params = load_params(files, module, table, dtype, shardings)
    if files.adapter is not None:
        lora, update = load_adapter(str(files.adapter), config)
        update = update if mesh is None else device_put(update, replicated(mesh))
        params = merge(params, update, lora)
    return module, params
