"""A random AnchorDR as its authors publish theirs, and what it computes, in PyTorch."""

import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.numpy import save_file

WIDTH, HEADS, INNER, LAYERS, DECODER_LAYERS, BUCKETS, PAD = 32, 4, 48, 3, 2, 32, 1
PIECES = 36
SCALE = 0.3  # The random weights' standard deviation.


def twin_bucket(r):
    half = BUCKETS // 2
    exact = half // 2
    n = abs(r)
    if n >= exact:
        wide = math.log(n / exact) / math.log(127 / exact) * (half - 1 - exact)
        n = min(half - 1, exact + math.ceil(wide))
    return int(math.copysign(n, r))


class Twin:
    """What AnchorDR computes, a text at a time, without padding."""

    def __init__(self, tensors, gated):
        self.w = {name: torch.tensor(value) for name, value in tensors.items()}
        self.gated = gated

    def linear(self, x, name):
        return torch.nn.functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias, 1e-5)

    def attention(self, x, memory, name, bias=None):
        def heads(y):
            return y.view(len(y), HEADS, WIDTH // HEADS).transpose(0, 1)

        q = heads(self.linear(x, f"{name}.q"))
        k, v = (heads(self.linear(memory, f"{name}.{letter}")) for letter in "kv")
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return self.linear(found.transpose(0, 1).reshape(x.shape), f"{name}.o")

    def stack(self, ids, name, layers, memory=None):
        positions = torch.arange(1, len(ids) + 1) + PAD
        x = self.w["shared.weight"][ids] + self.w[f"{name}.pos_embed.weight"][positions]
        x = self.norm(x, f"{name}.first_layer_norm")
        for i in range(layers):
            layer, bias = f"{name}.block.{i}.layer.", None
            if memory is None:
                table = self.w[layer + "0.SelfAttention.relative_attention_bias.weight"]
                least = min(twin_bucket(-n) for n in range(1024))
                t = range(len(ids))
                buckets = torch.tensor([[twin_bucket(j - i) - least for j in t] for i in t])
                bias = table[buckets].permute(2, 0, 1)
            y = self.attention(x, x, layer + "0.SelfAttention", bias)
            x = self.norm(x + y, layer + "0.layer_norm")
            last = 1
            if memory is not None:
                y = self.attention(x, memory, layer + "1.EncDecAttention")
                x = self.norm(x + y, layer + "1.layer_norm")
                last = 2
            mlp = f"{layer}{last}.DenseReluDense."
            if self.gated:
                gate = torch.nn.functional.gelu(self.linear(x, mlp + "wi_0"), approximate="tanh")
                y = gate * self.linear(x, mlp + "wi_1")
            else:
                y = torch.relu(self.linear(x, mlp + "wi"))
            x = self.norm(x + self.linear(y, mlp + "wo"), f"{layer}{last}.layer_norm")
        return x

    def vector(self, ids):
        memory = self.stack(torch.tensor(ids), "encoder", LAYERS)
        return self.stack(torch.tensor([0]), "decoder", DECODER_LAYERS, memory)[0].numpy()


def random_tensors(gated):
    rng = np.random.default_rng(0)
    tensors = {}

    def add(name, *shape):
        tensors[name] = rng.normal(size=shape, scale=SCALE).astype(np.float32)

    def linear(name, width_in, width_out, bias=True):
        add(f"{name}.weight", width_out, width_in)
        if bias:
            add(f"{name}.bias", width_out)

    def norm(name):
        add(f"{name}.weight", WIDTH)
        add(f"{name}.bias", WIDTH)

    add("shared.weight", PIECES + 4, WIDTH)
    for name, layers in (("encoder", LAYERS), ("decoder", DECODER_LAYERS)):
        tensors[f"{name}.embed_tokens.weight"] = tensors["shared.weight"]
        add(f"{name}.pos_embed.weight", 1024 + PAD + 1, WIDTH)
        norm(f"{name}.first_layer_norm")
        for i in range(layers):
            layer = f"{name}.block.{i}.layer."
            parts = ["SelfAttention"] + ["EncDecAttention"] * (name == "decoder")
            for j, part in enumerate(parts):
                for letter in "qkvo":
                    linear(f"{layer}{j}.{part}.{letter}", WIDTH, WIDTH)
                norm(f"{layer}{j}.layer_norm")
            if name == "encoder":
                bias = f"{layer}0.SelfAttention.relative_attention_bias.weight"
                add(bias, BUCKETS, HEADS)
            last = f"{layer}{len(parts)}."
            for wi in ("wi_0", "wi_1") if gated else ("wi",):
                linear(f"{last}DenseReluDense.{wi}", WIDTH, INNER, not gated)
            linear(f"{last}DenseReluDense.wo", INNER, WIDTH, not gated)
            norm(f"{last}layer_norm")
    return tensors


def train_pieces(directory: Path) -> bytes:
    """A tiny SentencePiece model."""
    words = "the anchor text of a web page leads to the page that it's about don't we'll"
    text = directory / "text"
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words.split(), 8)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "sp"), vocab_size=PIECES, minloglevel=2
    )
    return (directory / "sp.model").read_bytes()


def save(directory: Path, pieces_model: bytes, gated: bool = False) -> dict[str, np.ndarray]:
    """Writes a random model and its tokenizer; gives the tensors."""
    directory.mkdir()
    tensors = random_tensors(gated)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "t5",
        "vocab_size": PIECES + 4,
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_decoder_layers": DECODER_LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": BUCKETS,
        "layer_norm_epsilon": 1e-5,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "pad_token_id": PAD,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "sp.model").write_bytes(pieces_model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=pieces_model)
    listed = [pieces.id_to_piece(i) for i in reversed(range(3, PIECES))]
    text = "".join(f"{piece} {100 - i}\n" for i, piece in enumerate(listed))
    (directory / "dict.txt").write_text(text)
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return tensors
