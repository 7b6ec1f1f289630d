"""Measures every model family against PyTorch and writes the table of docs/models.md.

    python -m eval.models --out=docs/models.md

Needs what requirements-test.txt lists. Models are tiny and random, but for the quick start's two.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from flax import linen as nn
from rich.console import Console
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from eval import tiny_anchordr, tiny_models
from eval.benchmarks import minilm, smollm2
from eval.precision import measure_precision, precision_table
from expandr_jax.data.records import write_text
from expandr_jax.models.decoder import KVCache, token_positions, unstack_layers
from expandr_jax.models.mask import causal_mask
from expandr_jax.weights.export import export_encoder, export_generator
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.source import locate
from train.launch import launch

NAMES = {
    "bert": "BERT (Contriever, coCondenser, BGE, E5, MiniLM)",
    "camembert": "CamemBERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "modernbert": "ModernBERT",
    "modernbert-biases": "ModernBERT with biases, linear rope",
    "t5": "T5 encoder, ReLU (GTR, sentence-T5)",
    "t5-gated": "T5 1.1 encoder, gated GELU",
    "llama": "Llama 3, untied",
    "llama-3.1": "Llama 3.1, scaled rope",
    "llama-3.2": "Llama 3.2, scaled rope, tied",
    "llama-linear": "Llama, linear rope",
    "mistral": "Mistral",
    "mistral-window": "Mistral, sliding window",
    "qwen2": "Qwen 2 and 2.5",
    "qwen2-window": "Qwen 2, sliding window",
    "qwen3": "Qwen 3",
    "gemma3": "Gemma 3 text",
    "gemma3-linear": "Gemma 3 text, linear rope",
}
GGUF = ("llama", "llama-3.1", "llama-3.2", "qwen2", "qwen3", "gemma3", "gemma3-linear")
INTRO = """# Model families

`python -m eval.models --out=docs/models.md` wrote this table: it measures each row as it writes it.

Weights come as safetensors (one file or shards) in a directory of transformers or
sentence-transformers, by hub id, and where it says so as GGUF; the directory of a decoder's PEFT
adapter loads as its base with the adapter merged. A decoder serves as a generator or, with
last-token or mean pooling, as a retriever. Random models are tiny, float32, written by PyTorch.
"Difference" is the largest between our hidden states (encoders) or logits (decoders) and PyTorch's,
on ragged batches padded on either side; "cached" is token-by-token decoding against our full pass.
"Back" says whether an export's tensors equal the files that were loaded, bit by bit.

| family | loads from | largest value | difference | cached | back |
|---|---|---|---|---|---|
"""
OUTRO = """
Refused, each with its reason: pickles (`pytorch_model.bin`), tensors that are missing, unknown,
wrongly shaped or not finite, files that are cut short or damaged, fields of theirs that cannot be
and options that are not implemented (each by its name), and an export of AnchorDR for
sentence-transformers, which cannot hold it: it returns to its own layout. AnchorDR is compared with
a twin written from its description, not with published weights.

Attention is one function for all of them. On TPUs it takes jax's splash attention from 128 tokens
on, where there is no bias and no dropout on its weights; on NVIDIA GPUs cuDNN's in half precision;
else a plain form. The tests compare splash attention's program, interpreted, with the plain form,
values and gradients, and lower cuDNN's for CUDA. cuDNN's was also compared on an H100
(`tests/gpu_test.py`); splash attention has not run on a TPU.

Loading puts each tensor where it belongs on the mesh as it is read: `pytest -m slow -s
tests/streaming_test.py` prints the memory that this takes beyond 4.3 GB of parameters.

To add a family, write its module in `expandr_jax/models/` and a `Family` record in
`expandr_jax/weights/families/`: what its config.json means, where each tensor belongs, and, where
they differ from an encoder's, the module's inputs, pooling and operations; then name the record in
`families/__init__.py`. Loading, sharding, training, plans and exports ask nothing else. ModernBERT
is one such commit; `eval/tiny_models.py` gives it its row here and the tests that all share.

The tests behind it: `bert_test`, `modernbert_test`, `t5_test`, `anchordr_test`, `decoder_test`,
`gguf_test`, `weights_test`, `model_configs_test`, `model_files_test`, `export_test`,
`streaming_test`, `splash_test`, `int8_test` and, marked slow, `greedy_test`.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; numbers are absolute, None where there is nothing to measure."""

    family: str
    loads: str
    largest: float
    difference: float
    cached: float | None
    back: bool | None


def measure(directory: pathlib.Path) -> Iterator[Row]:
    """Measures every family, with `directory` for the models written meanwhile."""
    for family in tiny_models.ENCODERS:
        yield _encoder(family, directory / family)
    yield from (_anchordr(directory, gated) for gated in (False, True))
    for family in tiny_models.DECODERS:
        yield _decoder(family, directory / family)
    yield _minilm()
    yield _smollm2()


def _encoder(family: str, directory: pathlib.Path) -> Row:
    reference = tiny_models.save(directory, family)
    retriever, params = load_retriever(str(directory), pooling="mean", normalize=True)
    apply = jax.jit(retriever.module.apply)
    pairs = []
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side)
        found = tiny_models.unpadded(apply({"params": params}, ids, mask), mask)
        for ours, row in zip(found, tiny_models.unpadded(ids, mask), strict=True):
            with torch.no_grad():
                pairs.append(
                    (ours, reference(torch.tensor(row[None])).last_hidden_state[0].numpy())
                )
    out = directory / "out"
    export_encoder(out, retriever, params)
    largest, difference = _compare(pairs)
    return Row(NAMES[family], "safetensors", largest, difference, None, _same(directory, out))


def _anchordr(directory: pathlib.Path, gated: bool) -> Row:
    place = directory / f"anchordr-{gated}"
    place.mkdir()
    tensors = tiny_anchordr.save(place / "in", tiny_anchordr.train_pieces(place), gated)
    retriever, params = load_retriever(str(place / "in"))
    twin, pairs = tiny_anchordr.Twin(tensors, gated), []
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side, lengths=(200, 17, 1))
        ids = ids % (tiny_anchordr.PIECES + 4)
        found = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
        pairs += zip(found, map(twin.vector, tiny_models.unpadded(ids, mask)), strict=True)
    export_encoder(place / "out", retriever, params)
    name = f"AnchorDR, {'gated GELU' if gated else 'ReLU'} (its vector)"
    return Row(name, "safetensors", *_compare(pairs), None, _same(place / "in", place / "out"))


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: nn.Module, params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    return module.apply({"params": params}, hidden, method="logits")


def _decoder(family: str, directory: pathlib.Path) -> Row:
    reference = tiny_models.save(directory, family, head=True)
    generator, params = load_generator(str(directory))
    pairs = []
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side)
        positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            theirs = reference(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=positions,
            ).logits.numpy()
        ours = _logits(generator.module, params, ids, mask)
        pairs += zip(*(tiny_models.unpadded(x, mask) for x in (ours, theirs)), strict=True)
    export_generator(directory / "out", generator, params)
    loads = "safetensors, GGUF" if family in GGUF else "safetensors"
    cached = _cached(generator.module, params)
    same = _same(directory, directory / "out")
    return Row(NAMES[family], loads, *_compare(pairs), cached, same)


def _cached(module: nn.Module, params) -> float:
    """The largest difference between decoding token by token and the full pass."""
    ids, mask = tiny_models.ragged_batch("right", lengths=(17, 17))
    expected = np.asarray(_logits(module, params, ids, mask))
    cache = KVCache.zeros(module.config, *ids.shape, jnp.float32)
    module, params = module.clone(unroll=True), unstack_layers(params)

    @jax.jit
    def step(cache, token):
        hidden, cache = module.apply({"params": params}, token, cache, method="decode")
        return module.apply({"params": params}, hidden, method="logits"), cache

    worst = 0.0
    for t in range(ids.shape[1]):
        found, cache = step(cache, jnp.asarray(ids[:, t]))
        worst = max(worst, float(np.abs(found - expected[:, t]).max()))
    return worst


def _minilm() -> Row:
    retriever, params = load_retriever(minilm.SOURCE, sha256=minilm.SHA256)
    texts = [f"{'how do I pad an array with zeros in numpy'[i % 9 : i + 9]} {i}" for i in range(50)]
    theirs = SentenceTransformer(str(locate(minilm.SOURCE)), device="cpu").encode(texts)
    ids, mask = _padded(retriever.token_ids(texts))
    ours = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
    pair = [(ours, theirs)]
    return Row("all-MiniLM-L6-v2 (its vectors)", "safetensors", *_compare(pair), None, None)


def _smollm2() -> Row:
    generator, params = load_generator(smollm2.SOURCE, sha256=smollm2.SHA256)
    path = locate(smollm2.SOURCE)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(path.parent, gguf_file=path.name).eval()
    texts = ("Hi", "Write about Paris and Rome, please.", "Define numpy.pad in one line.")
    ids, mask = _padded([generator.chat_ids(text, 100)[0] for text in texts])
    with torch.no_grad():
        theirs = reference(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    ours = _logits(generator.module, params, ids, mask)
    pairs = zip(*(tiny_models.unpadded(x, mask) for x in (ours, theirs)), strict=True)
    return Row("SmolLM2-135M-Instruct", "GGUF", *_compare(list(pairs)), None, None)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    return ids, (np.arange(width) < np.array([[len(row)] for row in rows])).astype(int)


def _compare(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The largest of the second values and the largest difference."""
    largest = max(float(np.abs(theirs).max()) for _, theirs in pairs)
    return largest, max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def _same(before: pathlib.Path, after: pathlib.Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (before, after))
    # The pooler is the one part of a file that nothing here computes.
    first = {name: value for name, value in first.items() if not name.startswith("pooler.")}
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name])
        for name in first
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        cached = "" if row.cached is None else f"{row.cached:.0e}"
        back = "" if row.back is None else ("bit-equal" if row.back else "DIFFERS")
        numbers = f"{row.largest:.1f} | {row.difference:.0e}"
        lines.append(f"| {row.family} | {row.loads} | {numbers} | {cached} | {back} |\n")
    return "".join(lines)


def main(_: Sequence[str]) -> None:
    console = Console(highlight=False)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for row in measure(pathlib.Path(directory)):
            console.print(f"{row.family}: {row.difference:.0e}", soft_wrap=True)
            rows.append(row)
    precision = []
    for line in measure_precision(smollm2.SOURCE, smollm2.SHA256):
        console.print(f"{line.weights}, {line.compute}: perplexity {line.perplexity:.3f}")
        precision.append(line)
    out = pathlib.Path(flags.FLAGS.out)
    write_text(out, INTRO + table(rows) + OUTRO + precision_table(precision))
    console.print(f"written to {out}", soft_wrap=True)


def define_flags() -> None:
    flags.DEFINE_string("out", "docs/models.md", "The page to write.")


if __name__ == "__main__":
    launch(main, define_flags)
