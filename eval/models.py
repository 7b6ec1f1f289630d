"""Measures every model family against PyTorch and writes the tables of docs/models.md.

    python -m eval.models --out=docs/models.md

A page that is there keeps its text: only its tables change. Needs what requirements-test.txt lists.
Models are tiny and random, but for the quick start's two.
"""

import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from flax import linen as nn
from safetensors.numpy import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from eval import precision, tiny_anchordr, tiny_models
from eval.benchmarks import minilm, smollm2
from expandr_jax.data.batches import pad
from expandr_jax.files.records import write_text
from expandr_jax.models.decoder import KVCache, unstack_layers
from expandr_jax.report.tables import render
from expandr_jax.runtime.progress import plain_console
from expandr_jax.weights.cross_encoder import export_cross_encoder, load_cross_encoder
from expandr_jax.weights.export import export_encoder, export_generator, export_retriever
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.source import locate
from expandr_jax.weights.sparse_encoder import export_sparse_encoder, load_sparse_encoder
from train.launch import launch

FAMILY_ROWS = {
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
# Published forms, with their modules, prompts and pooling.
SENTENCE_ROWS = {
    "e5": "E5 (its vectors)",
    "xlm-e5": "multilingual E5, XLM-RoBERTa (its vectors)",
    "qwen3-embedding": "Qwen3-Embedding (its vectors)",
    "embedding-gemma": "EmbeddingGemma, no causal mask, two layers (its vectors)",
    "unmasked": "Llama without its causal mask, LLM2Vec (its vectors)",
}
# With the head of a masked language model, and with one that scores pairs.
SPARSE_NAMES = {"bert": "SPLADE, BERT (its vectors)", "roberta": "SPLADE, RoBERTa (its vectors)"}
PAIR_NAMES = {
    "bert": "cross-encoder, BERT (its logits)",
    "modernbert": "cross-encoder, ModernBERT (its logits)",
}
GGUF = ("llama", "llama-3.1", "llama-3.2", "qwen2", "qwen3", "gemma3", "gemma3-linear")
HEADER = ("family", "loads from", "largest value", "difference", "cached", "back")
COMPARED_TEXTS = ["pad an array", "sort", "rank and inverse of a matrix"]
Pairs = Sequence[tuple[np.ndarray, np.ndarray]]  # Our values and PyTorch's.


def measure(directory: pathlib.Path) -> Iterator[list[str]]:
    """Rows of every family, below HEADER, with `directory` for the models written meanwhile."""
    for family in tiny_models.ENCODERS:
        yield _encoder(family, directory / family)
    yield from (_anchordr(directory, gated) for gated in (False, True))
    for family in tiny_models.DECODERS:
        yield _decoder(family, directory / family)
    for name in tiny_models.SENTENCES:
        yield _sentences(name, directory)
    yield from (_sparse(family, directory) for family in SPARSE_NAMES)
    yield from (_pairs(family, directory) for family in PAIR_NAMES)
    yield _minilm()
    yield _smollm2()


def _row(
    family: str, loads: str, pairs: Pairs, cached: float | None = None, back: bool | None = None
) -> list[str]:
    """Cells of a row, empty where nothing was measured."""
    largest = max(float(np.abs(theirs).max()) for _, theirs in pairs)
    difference = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
    exported = {None: "", True: "bit-equal", False: "DIFFERS"}[back]
    decoded = "" if cached is None else f"{cached:.0e}"
    return [family, loads, f"{largest:.1f}", f"{difference:.0e}", decoded, exported]


def _encoder(family: str, directory: pathlib.Path) -> list[str]:
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
    return _row(FAMILY_ROWS[family], "safetensors", pairs, back=_same(directory, out))


def _anchordr(directory: pathlib.Path, gated: bool) -> list[str]:
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
    return _row(name, "safetensors", pairs, back=_same(place / "in", place / "out"))


def _decoder(family: str, directory: pathlib.Path) -> list[str]:
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
        ours = precision.logits(generator.module, params, ids, mask)
        pairs += zip(*(tiny_models.unpadded(x, mask) for x in (ours, theirs)), strict=True)
    export_generator(directory / "out", generator, params)
    loads = "safetensors, GGUF" if family in GGUF else "safetensors"
    cached = _cached(generator.module, params)
    return _row(FAMILY_ROWS[family], loads, pairs, cached, _same(directory, directory / "out"))


def _cached(module: nn.Module, params) -> float:
    """The largest difference between decoding token by token and the full pass."""
    ids, mask = tiny_models.ragged_batch("right", lengths=(17, 17))
    expected = np.asarray(precision.logits(module, params, ids, mask))
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


def _sentences(name: str, directory: pathlib.Path) -> list[str]:
    peer = tiny_models.save_sentences(directory / name, name)
    retriever, params = load_retriever(str(directory / name))
    pairs = []
    for kind, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
        ids, mask = pad(retriever.token_ids(COMPARED_TEXTS, kind), retriever.tokenizer.pad_token_id)
        pairs.append(
            (np.asarray(jax.jit(retriever.embed)(params, ids, mask)), encode(COMPARED_TEXTS))
        )
    out = directory / f"{name}-out"
    export_retriever(out, retriever, params)
    return _row(SENTENCE_ROWS[name], "safetensors", pairs, back=_same(directory / name, out))


def _sparse(family: str, directory: pathlib.Path) -> list[str]:
    place, out = directory / f"splade-{family}", directory / f"splade-{family}-out"
    tiny_models.save_random(place, family, transformers.AutoModelForMaskedLM)
    retriever, params = load_sparse_encoder(str(place))
    ids, mask = pad(retriever.token_ids(COMPARED_TEXTS), retriever.tokenizer.pad_token_id)
    ours = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
    theirs = SparseEncoder(str(place), device="cpu").encode(COMPARED_TEXTS).to_dense().numpy()
    export_sparse_encoder(out, retriever, params)
    return _row(SPARSE_NAMES[family], "safetensors", [(ours, theirs)], back=_same(place, out))


def _pairs(family: str, directory: pathlib.Path) -> list[str]:
    place, out = directory / f"pairs-{family}", directory / f"pairs-{family}-out"
    tiny_models.save_random(
        place, family, transformers.AutoModelForSequenceClassification, num_labels=1
    )
    peer = CrossEncoder(str(place), device="cpu", activation_fn=torch.nn.Identity())
    peer.save_pretrained(str(place))
    encoder, params = load_cross_encoder(str(place))
    ours = encoder.scores(params, COMPARED_TEXTS[0], COMPARED_TEXTS[1:])
    theirs = peer.predict([(COMPARED_TEXTS[0], text) for text in COMPARED_TEXTS[1:]])
    export_cross_encoder(out, encoder, params)
    return _row(PAIR_NAMES[family], "safetensors", [(ours, theirs)], back=_same(place, out))


def _minilm() -> list[str]:
    retriever, params = load_retriever(minilm.SOURCE, sha256=minilm.SHA256)
    texts = [f"{'how do I pad an array with zeros in numpy'[i % 9 : i + 9]} {i}" for i in range(50)]
    theirs = SentenceTransformer(str(locate(minilm.SOURCE)), device="cpu").encode(texts)
    ids, mask = pad(retriever.token_ids(texts), pad_id=0)
    ours = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
    return _row("all-MiniLM-L6-v2 (its vectors)", "safetensors", [(ours, theirs)])


def _smollm2() -> list[str]:
    generator, params = load_generator(smollm2.SOURCE, sha256=smollm2.SHA256)
    path = locate(smollm2.SOURCE)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(path.parent, gguf_file=path.name).eval()
    texts = ("Hi", "Write about Paris and Rome, please.", "Define numpy.pad in one line.")
    ids, mask = pad([generator.chat_ids(text, 100)[0] for text in texts], pad_id=0)
    with torch.no_grad():
        theirs = reference(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    ours = precision.logits(generator.module, params, ids, mask)
    pairs = zip(*(tiny_models.unpadded(x, mask) for x in (ours, theirs)), strict=True)
    return _row("SmolLM2-135M-Instruct", "GGUF", list(pairs))


def _same(before: pathlib.Path, after: pathlib.Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (before, after))
    # The pooler is the one part of a file that nothing here computes.
    first = {name: value for name, value in first.items() if not name.startswith("pooler.")}
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name])
        for name in first
    )


def with_table(page: str, table: str) -> str:
    """A page with its table of the same header replaced, or with the table at its end."""
    header = re.escape(table.splitlines()[0])
    page, found = re.subn(rf"^{header}\n(\|.*\n)*", lambda _: table, page, flags=re.MULTILINE)
    return page if found else f"{page}\n{table}".lstrip()


def main(_: Sequence[str]) -> None:
    console = plain_console(soft_wrap=True)
    transformers.utils.logging.disable_progress_bar()
    out = pathlib.Path(flags.FLAGS.out)
    page = out.read_text(encoding="utf-8") if out.exists() else ""
    with tempfile.TemporaryDirectory() as directory:
        for header, rows in (
            (HEADER, measure(pathlib.Path(directory))),
            (precision.HEADER, precision.measure(smollm2.SOURCE, smollm2.SHA256)),
        ):
            kept = []
            for row in rows:
                console.print(", ".join(filter(None, row)), markup=False)
                kept.append(row)
            page = with_table(page, render("", header, kept, "markdown").lstrip())
    write_text(out, page)
    console.print(f"written to {out}")


def define_flags() -> None:
    flags.DEFINE_string("out", "docs/models.md", "The page whose tables to write.")


if __name__ == "__main__":
    launch(main, define_flags)
