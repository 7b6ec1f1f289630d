"""The families of models: one file for each, found by a model's type, tensors or module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.errors import UserError
from expandr_jax.weights.families import anchordr, bert, decoder, modernbert, t5
from expandr_jax.weights.families.family import Family
from expandr_jax.weights.fields import Fields, shown

FAMILIES = (bert.FAMILY, modernbert.FAMILY, t5.FAMILY, anchordr.FAMILY, decoder.FAMILY)
BY_TYPE = {kind: family for family in FAMILIES for kind in family.classes}


def family_of(module: nn.Module) -> Family:
    """The family that computes by this module."""
    return family_of_config(module.config)


def family_of_config(config: Any) -> Family:
    """The family whose module has a configuration of this class."""
    return next(family for family in FAMILIES if type(config) is family.config)


def find_family(where: str, kind: str | None) -> Family:
    """The family of a model_type; UserError, naming the file, where there is none."""
    if kind not in tuple(BY_TYPE):  # It may be anything that JSON can say.
        raise UserError(
            f"{where}: model_type {shown(kind)} is not supported; supported: {', '.join(BY_TYPE)}"
        )
    return BY_TYPE[kind]


def model_config(hf: Fields, kind: str | None) -> Any:
    """Reads a Hugging Face configuration.

    Args:
        hf: config.json.
        kind: Its model_type, or that of the family that its tensors tell.

    Returns:
        The configuration of the module that computes the same function.

    Raises:
        UserError: If the type or an option of the model is not supported, or a field is missing or
            cannot be.
    """
    family = find_family(hf.where, kind)
    if hf.values.get("quantization_config"):
        raise UserError(
            f"{hf.where}: quantization_config says that the weights are quantized; take the model "
            "before that, or a GGUF file"
        )
    own = hf.section("auto_map")
    if classes := [own.values[name] for name in own.values if name.startswith("AutoModel")]:
        raise UserError(
            f"{hf.where}: auto_map names a class of the model's own code, {shown(classes[0])}, "
            f"which is not run here and may compute something else: without auto_map it is "
            f"transformers' {shown(kind)}"
        )
    rope = hf.values.get("rope_scaling"), hf.values.get("rope_parameters")
    if rope[0] != rope[1] and all(rope):
        # transformers 5 drops rope_parameters for rope_scaling, and the base frequency with them.
        raise UserError(
            f"{hf.where}: it has rope_scaling {shown(rope[0])} and rope_parameters "
            f"{shown(rope[1])}; keep one of them, with rope_theta in it"
        )
    # A null means the default, but for the window, where it means none.
    given = {name: hf.values[name] for name in hf.values if name in hf or name == "sliding_window"}
    return family.read_config(Fields({**family.defaults[kind], **given}, hf.where), kind)


def example_inputs(module: nn.Module) -> list[Any]:
    """Shapes of the smallest inputs of a model's `__call__`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return list(jax.eval_shape(module.inputs, tokens, tokens))
