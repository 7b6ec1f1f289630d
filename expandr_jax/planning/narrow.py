"""Random models for a rehearsal: few, narrow layers, but the vocabulary and vectors of a config's.

What a stage holds of texts, tokens and vectors is then as in the run; what it computes is not, and
takes little time. The generator writes a passage as one token, and then ends: 512 turns a text,
over the whole vocabulary, would take days on a processor.
"""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from expandr_jax.config import Config
from expandr_jax.models.generator import Generator
from expandr_jax.models.retriever import Retriever
from expandr_jax.planning.planned import shape_module
from expandr_jax.planning.synthetic import SEED, draw_words, passage, word
from expandr_jax.weights.export import export_generator, export_retriever
from expandr_jax.weights.families import find_family, model_config
from expandr_jax.weights.families.family import Family
from expandr_jax.weights.fields import Fields

WIDTH, LAYERS = 32, 1
MOST_PASSAGES = 256  # Different ones that the generator can write.
SHARPNESS = 20.0  # Logits of what the generator is made to say, above all others.
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
PAD_ID, UNKNOWN_ID, BEGIN_ID, END_ID = range(len(SPECIAL))
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} [EOS] "
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class MadeFiles:
    """What an export asks of the `ModelFiles` that a model is from."""

    config: Fields
    generation_config: Fields


def count_words(config: Config) -> int:
    """Different words of the texts that a config's retriever has tokens for."""
    return _vocabulary(config, "retriever") - len(SPECIAL)


def write_narrow_retriever(directory: pathlib.Path, config: Config) -> None:
    """Writes the config's retriever, narrowed: a BERT, then a layer that widens its vectors."""
    shape = shape_module(config.retriever, "retriever", "float32").config
    longest = config.retriever.max_length
    values = {
        "model_type": "bert",
        "vocab_size": shape.vocab_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "intermediate_size": WIDTH,
        "max_position_embeddings": longest,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    family, files, module = _made(values)
    words = {word(i): i + len(SPECIAL) for i in range(count_words(config))}
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.CharDelimiterSplit("-")]
    )
    tokenizer = _tokenizer(words, splitter, longest)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A [EOS]", special_tokens=[("[BOS]", BEGIN_ID), ("[EOS]", END_ID)]
    )
    params = _init(module, family)
    kernel = np.random.default_rng(SEED).normal(size=(WIDTH, shape.hidden_size))
    params["dense"] = {"kernel": kernel.astype(np.float32)}
    retriever = Retriever(
        module=module,
        pooling="mean",
        normalize=bool(config.retriever.normalize in (None, True)),
        max_length=longest,
        query_prompt="",
        document_prompt="",
        tokenizer=tokenizer,
        files=files,
        dense=("identity",),
    )
    export_retriever(directory, retriever, params)


def write_narrow_generator(directory: pathlib.Path, config: Config) -> None:
    """Writes the config's generator, narrowed: a Llama that writes a passage, and then ends."""
    vocabulary = _vocabulary(config, "generator")
    heads = 4
    values = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": WIDTH,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_ID,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
    }
    family, files, module = _made(values)
    count = min(MOST_PASSAGES, vocabulary // 4)
    first = vocabulary - count
    words = {word(i): i + len(SPECIAL) for i in range(first - len(SPECIAL))}
    rng = np.random.default_rng(SEED)
    longest = max(config.expansion.max_new_tokens, config.rewarded.max_new_tokens)
    known = count_words(config)
    for i in range(count):
        # Short ones, too: the number before them tells all of them apart.
        numbers = draw_words(rng, known, max(2, longest - i % (longest // 4 + 1)))
        words[f"{word(i)}-{passage(numbers)}"] = first + i
    tokenizer = _tokenizer(words, pre_tokenizers.WhitespaceSplit(), 8192)
    tokenizer.chat_template = _TEMPLATE
    params = _init(module, family)
    # The width's first number tells what is no passage, and asks for one; its second the passages,
    # and asks for the end. A norm makes it the root of the width.
    table, head = params["embedding"], np.zeros_like(params["lm_head"])
    table[:first, 0] = table[first:, 1] = 10.0
    head[0, first:] = head[1, END_ID] = SHARPNESS / WIDTH**0.5
    params["lm_head"] = head
    generator = Generator(module, tokenizer, (END_ID,), PAD_ID, files)
    export_generator(directory, generator, params)


def _vocabulary(config: Config, name: str) -> int:
    return shape_module(getattr(config, name), name, "float32").config.vocab_size


def _made(values: dict[str, Any]) -> tuple[Family, MadeFiles, nn.Module]:
    fields, kind = Fields(values, "a rehearsal's model"), values["model_type"]
    family = find_family(fields.where, kind)
    module = family.module(model_config(fields, kind), dtype=jnp.float32)
    return family, MadeFiles(fields, Fields({}, fields.where)), module


def _init(module: nn.Module, family: Family) -> dict[str, Any]:
    """Random parameters, as arrays of the host."""
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = module.init(jax.random.key(SEED), *module.inputs(tokens, tokens))
    return jax.tree.map(np.array, nn.unbox(variables["params"]))


def _tokenizer(words: dict[str, int], splitter: Any, longest: int) -> PreTrainedTokenizerFast:
    special = {token: i for i, token in enumerate(SPECIAL)}
    backend = Tokenizer(models.WordLevel({**special, **words}, unk_token="[UNK]"))
    backend.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=longest,
    )
