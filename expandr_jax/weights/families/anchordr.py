"""AnchorDR, the paper's retriever: its config.json says T5, and its tensors say otherwise."""

from expandr_jax.models.anchordr import AnchorDr, AnchorDrConfig
from expandr_jax.weights.fairseq import FairseqTokenizer
from expandr_jax.weights.families.family import MOST_LAYERS, Family
from expandr_jax.weights.families.t5 import DEFAULTS, feed_forward_names, read_encoder
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.names import Weight, layer_norm, linear


def _read(hf: Fields, kind: str) -> AnchorDrConfig:
    width = hf.quotient("d_model", "num_heads")
    hf.only(d_kv=width, pad_token_id=1)
    encoder, farthest = read_encoder(hf), AnchorDrConfig.max_distance
    layers = hf.count("num_decoder_layers", encoder["num_layers"], most=MOST_LAYERS)
    buckets = hf.count("relative_attention_num_buckets", least=4, most=4 * farthest - 1)
    return AnchorDrConfig(head_dim=width, num_buckets=buckets, num_decoder_layers=layers, **encoder)


def _weights(config: AnchorDrConfig, with_head: bool) -> list[Weight]:
    """The tensors of AnchorDR's encoder and decoder."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    weights = [Weight("embedding", "shared.weight", copies=copies)]
    encoder_blocks = [("self_attn", "attention_norm", "SelfAttention")]
    decoder_blocks = [*encoder_blocks, ("cross_attn", "cross_norm", "EncDecAttention")]
    for stack, blocks in (("encoder", encoder_blocks), ("decoder", decoder_blocks)):
        layer, ours = f"{stack}.block.{{}}.layer.", f"{stack}/layers/"
        weights.append(Weight(f"{stack}/position_embedding", f"{stack}.pos_embed.weight"))
        weights += layer_norm(f"{stack}/embedding_norm", f"{stack}.first_layer_norm")
        if stack == "encoder":
            bias = layer + "0.SelfAttention.relative_attention_bias.weight"
            weights.append(Weight(ours + "relative_bias", bias))
        for index, (module, norm, name) in enumerate(blocks):
            for letter in "qkvo":
                path = f"{ours}{module}/{letter}_proj"
                weights += linear(path, f"{layer}{index}.{name}.{letter}", True)
            weights += layer_norm(ours + norm, f"{layer}{index}.layer_norm")
        last = f"{layer}{len(blocks)}."
        for path, name in feed_forward_names(config.gated):
            weights += linear(ours + path, f"{last}DenseReluDense.{name}", not config.gated)
        weights += layer_norm(ours + "mlp_norm", last + "layer_norm")
    return weights


def _attention_flops(config: AnchorDrConfig, length: int, keys: int) -> int:
    # The decoder's one position attends to itself and to the text.
    pairs = config.num_layers * length * length + config.num_decoder_layers * (1 + length)
    return 4 * config.hidden_size * pairs


def _kernel_tokens(path: tuple[str, ...], length: int) -> int:
    """The decoder takes one step, but for the keys and values of the text."""
    if path[0] != "decoder":
        return length
    return length if "cross_attn" in path and path[-2] in ("k_proj", "v_proj") else 1


FAMILY = Family(
    classes={"anchordr": ("", "")},
    defaults={"anchordr": DEFAULTS},
    read_config=_read,
    config=AnchorDrConfig,
    module=AnchorDr,
    weights=_weights,
    attention_flops=_attention_flops,
    kernel_tokens=_kernel_tokens,
    pooling="decoder",
    ignored=(r"lm_head\..*",),
    marker="encoder.pos_embed.weight",
    tokenizer=FairseqTokenizer,
)
