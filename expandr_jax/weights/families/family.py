"""The record of a family of models: the meaning of its files, and how its module is run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import Pooling
from expandr_jax.models.rope import RopeScaling
from expandr_jax.weights.fields import Fields, shown
from expandr_jax.weights.names import Weight

# The activations of transformers by the names that our modules know them by.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "llama3")
MOST_LAYERS = 10_000  # The tensors of a layer are listed one by one.


def attention_flops(config: Any, length: int, keys: int) -> int:
    """Every layer's scores, and its sums of values."""
    return 4 * config.num_heads * config.head_dim * config.num_layers * length * keys


@dataclasses.dataclass(frozen=True)
class PairHead:
    """The head with which a family's models score pairs, and how files have it.

    Attributes:
        module: (configuration of the model, config.json) -> the module with the head.
        weights: (configuration, config.json, its model_type) -> where the head's tensors belong.
        prefixes: model_type -> what stands before the names of the other tensors.
    """

    module: Callable[[Any, Fields], nn.Module]
    weights: Callable[[Any, Fields, str], Sequence[Weight]]
    prefixes: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class MaskedHead:
    """The head of a family's masked language models, by which they make sparse vectors.

    Attributes:
        module: (configuration of the model, type of the computation) -> the module with the head,
            whose encoder is called "encoder".
        weights: (configuration, config.json, its model_type) -> where all tensors belong, those of
            the head last, and its bias as the last of them; raises UserError for another head.
        prefixes: model_type -> what stands before the names of the encoder's tensors.
    """

    module: Callable[[Any, Any], nn.Module]
    weights: Callable[[Any, Fields, str], Sequence[Weight]]
    prefixes: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class GgufForm:
    """How llama.cpp has a kind of decoders; without options as most of them.

    Attributes:
        architecture: Its name, general.architecture in a GGUF file.
        activation: The only one of the feed-forwards that llama.cpp computes there.
        tensors: Names of a layer's tensors that most kinds lack or have elsewhere: llama.cpp's ->
            those of Hugging Face.
        interleaved: Whether the halves of a head that rotate together are stored interleaved.
        norm_plus_one: Whether of norms 1 + w is stored where Hugging Face stores w.
        stretches: Whether positions can be stretched as Llama 3.1 does it.
        keys: The architecture's keys as other converters write them -> as llama.cpp's own does.
        read: (those keys, config.json without what they say) -> what they say.
        write: The module's configuration -> keys that no other kind has; raises UserError where
            llama.cpp computes otherwise. Without these two no layer sees a window alone.
    """

    architecture: str
    activation: str = "silu"
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    norm_plus_one: bool = False
    stretches: bool = False
    keys: Callable[[Fields], Fields] = lambda own: own
    read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]] | None = None
    write: Callable[[Any], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that one module computes.

    Attributes:
        classes: model_type in config.json -> the classes of transformers without a head and with
            the language model's; both empty where transformers has none.
        defaults: model_type -> values that transformers assumes where config.json leaves them out.
        read_config: (config.json, its model_type) -> the module's configuration.
        config: The class of that configuration.
        module: Builds the module from a configuration.
        weights: (configuration, whether the output head is wanted) -> where each tensor belongs.
        attention_flops: (configuration, length, keys) -> floating-point operations of attention in
            one text of `length` tokens that each attend to `keys`.
        kernel_tokens: (path of a kernel, length of a text) -> tokens that the kernel is applied to:
            each, if nothing else is said.
        pooling: What makes a text's vector where no file says so.
        generates: Whether it writes texts, takes adapters, and may be kept in int8.
        prefixes: What may stand before the tensors' names in its files, but for those of a head.
        ignored: Patterns of tensors that its files may hold and the module does not use: buffers,
            heads of pre-training, a head that is not wanted.
        marker: A tensor by which the family is told where config.json has another's model_type.
        tokenizer: Reads a directory's tokenizer; None where it is one of transformers.
        tokenizer_classes: model_type -> transformers' class of its tokenizer where no file names
            one; one that is not listed takes tokenizer.json as it is.
        misnamed: Each model_type whose files are known to name another class than they are of.
        unmasked: model_type -> what config.json says where the model is read without its causal
            mask; None where it has none.
        pair_head: With the head of a sequence classification it scores pairs; None where it cannot.
        masked_head: With that of a masked language model it makes sparse vectors; None likewise.
        gguf: model_type -> how llama.cpp has it; one that is not listed cannot be read or written.
    """

    classes: Mapping[str, tuple[str, str]]
    read_config: Callable[[Fields, str], Any]
    config: type
    module: Callable[..., nn.Module]
    weights: Callable[[Any, bool], Sequence[Weight]]
    defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    attention_flops: Callable[[Any, int, int], int] = attention_flops
    kernel_tokens: Callable[[tuple[str, ...], int], int] = lambda _, length: length
    pooling: Pooling = "mean"
    generates: bool = False
    prefixes: tuple[str, ...] = ("", "model.")
    ignored: tuple[str, ...] = ()
    marker: str | None = None
    tokenizer: Callable[[Path], Any] | None = None
    tokenizer_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    misnamed: tuple[str, ...] = ()
    unmasked: Callable[[str], Mapping[str, bool]] | None = None
    pair_head: PairHead | None = None
    masked_head: MaskedHead | None = None
    gguf: Mapping[str, GgufForm] = dataclasses.field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether transformers, and so sentence-transformers, can load what is exported."""
        return all(any(names) for names in self.classes.values())


def layer_types(hf: Fields, layers: int) -> list[str] | None:
    """What each layer attends to, by config.json: LAYER_TYPES; None where it does not say."""
    types = hf.items("layer_types", str, None)
    if types is not None and len(types) != layers:
        raise UserError(f"{hf.where}: layer_types has {len(types)} entries for {layers} layers")
    unknown = sorted({*(types or ())} - {*LAYER_TYPES})
    if unknown:
        raise UserError(
            f"{hf.where}: layer_types {shown(', '.join(unknown))} not supported; supported: "
            + ", ".join(LAYER_TYPES)
        )
    return types


def rope_scaling(rope: Fields) -> RopeScaling | None:
    """How rotary frequencies are stretched, by an object of config.json; None: they are not."""
    kind = rope.choice("rope_type" if "rope_type" in rope else "type", ROPE_TYPES, "default")
    if kind == "default":
        return None
    factor = rope.number("factor", above=0)
    if kind == "linear":
        return RopeScaling("linear", factor)
    low = rope.number("low_freq_factor", above=0)
    high = rope.number("high_freq_factor", above=low)
    return RopeScaling("llama3", factor, low, high, rope.count("original_max_position_embeddings"))


def rope_theta(rope: Fields, hf: Fields, older: str, *default: float) -> float:
    """The base of rotary frequencies: such an object's, or that of an `older` field of the file."""
    if "rope_theta" in rope:
        return float(rope.number("rope_theta", above=0))
    return float(hf.number(older, *default, above=0))
