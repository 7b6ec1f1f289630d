"""LLaRA: blocks are blind to each other, losses equal a twin's, an export comes back as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.data.batches import pad
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.loading import load_models
from expandr_jax.losses.language import bag_of_words_loss
from expandr_jax.models.mask import Mask
from expandr_jax.models.pooling import BLOCK_TOKENS, pool
from expandr_jax.objectives.llara import LlaraBatches, llara_losses, passage_pairs
from expandr_jax.weights.blocks import BLOCK_PROMPTS, block_tokens
from expandr_jax.weights.export import export_retriever
from expandr_jax.weights.hf import load_retriever
from tests.llm_ql_test import TINY_LLAMA, llama_config
from tests.retriever_training_test import PAIRS, TINY, read_rows, train

ROWS = 400  # Of the model's table, before there are blocks.
PASSAGES = [("the norm of a gradient", "an array of a shape"), ("scale", "count the steps of it")]


@pytest.fixture(scope="module")
def tiny():
    options = {"pooling": "block", "normalize": False, "max_length": 128, "with_head": True}
    return load_retriever(TINY_LLAMA, **options)


@pytest.fixture(scope="module")
def batch(tiny):
    # The order of a step is a shuffle's.
    return LlaraBatches(PASSAGES, tiny[0], 2, seed=0).batch(0)[0]


def test_the_loss_equals_its_twin_and_worked_values():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 8, 11)).astype(np.float32)
    words = rng.integers(11, size=(2, 3, 5))
    given = rng.random((2, 3, 5)) < 0.6
    given[1, 2] = False
    best = logits.astype(np.float64).max(axis=2)
    logs = best - np.log(np.exp(best).sum(axis=-1, keepdims=True))
    expected = np.zeros((2, 3))
    for i, j in np.ndindex(2, 3):
        kept = [logs[i, j, w] for w, there in zip(words[i, j], given[i, j], strict=True) if there]
        expected[i, j] = -np.mean(kept) if kept else 0.0
    np.testing.assert_allclose(bag_of_words_loss(logits, words, given), expected, atol=1e-6)
    assert expected[1, 2] == 0
    # The greatest logits are 0, log 2 and log 5 of three words: shares 1/8, 2/8 and 5/8.
    logits = jnp.log(jnp.array([[1.0, 2.0, 1e-9], [1e-9, 1e-9, 5.0]]))
    found = bag_of_words_loss(logits, jnp.array([0, 1]), jnp.array([True, True]))
    np.testing.assert_allclose(found, 1.7328680, atol=1e-6)  # (log 8 + log 4) / 2
    found = bag_of_words_loss(logits, jnp.array([2, 2]), jnp.array([True, False]))
    np.testing.assert_allclose(found, 0.4700036, atol=1e-6)  # log 8/5


def slopes(tiny, batch, block):
    """How much each token's embedding counts for a block's loss, by ids."""
    retriever, params = tiny
    # The head apart from the embeddings, which are the same parameter: what is read is left.
    fixed = jax.tree.map(jax.lax.stop_gradient, params)
    apart = dataclasses.replace(retriever)
    object.__setattr__(apart, "logits", lambda _, hidden: retriever.logits(fixed, hidden))
    of_block = jax.grad(lambda p: jnp.sum(llara_losses(p, batch, retriever=apart)[:, block]))
    grads = jax.jit(of_block)(params)
    return np.abs(grads["embedding"]).max(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1])
def test_blocks_see_the_text_and_not_each_other(tiny, batch, block):
    tokenizer = tiny[0].tokenizer
    kinds = list(BLOCK_PROMPTS)
    own, other = (
        tokenizer.convert_tokens_to_ids(block_tokens(kinds[i])) for i in (block, 1 - block)
    )
    counts = slopes(tiny, batch, block)
    text = batch["tokens"][batch["segments"] == 1]
    assert (counts[np.unique(text)] > 1e-7).all()
    assert (counts[own] > 1e-7).all()
    assert (counts[other] == 0).all()


@pytest.mark.slow
def test_a_block_has_the_states_that_step_a_reads_it_by(tiny, batch):
    """It stands where it would without the other."""
    retriever, params = tiny
    mask = Mask(batch["segments"], causal=True, responses=2)
    hidden = retriever.states(params, batch["tokens"], batch["positions"], mask)
    states = jnp.take_along_axis(hidden, batch["block_positions"][..., None], axis=1)
    order = LlaraBatches(PASSAGES, retriever, 2, seed=0).indices(0)
    texts = [PASSAGES[i][0] for i in order]
    for place, kind in enumerate(BLOCK_PROMPTS):
        ids, real = pad(retriever.token_ids(texts, kind), 0)
        vectors = retriever.embed(params, ids, real)
        mean = states[:, place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS].mean(axis=1)
        np.testing.assert_allclose(vectors, mean, atol=1e-5)


def test_losses_equal_pytorch(tiny, batch, tmp_path):
    """From the exported model, a mask and positions that are written out."""
    retriever, params = tiny
    export_retriever(tmp_path / "out", retriever, params)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    table = model.get_input_embeddings().weight.detach().double().numpy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = np.asarray(llara_losses(params, batch, retriever=retriever))
    order = LlaraBatches(PASSAGES, retriever, 2, seed=0).indices(0)
    for row, pair in enumerate(PASSAGES[i] for i in order):
        parts = [tokenizer(pair[0])["input_ids"]]
        for kind in BLOCK_PROMPTS:
            asked = tokenizer(BLOCK_PROMPTS[kind], add_special_tokens=False)["input_ids"]
            parts.append(asked + tokenizer.convert_tokens_to_ids(block_tokens(kind)))
        sizes = [*map(len, parts)]
        part = np.repeat([0, 1, 2], sizes)
        sees = np.tril((part[:, None] == part) | (part == 0))
        positions = [*range(sizes[0] + sizes[1]), *range(sizes[0], sizes[0] + sizes[2])]
        mask = torch.where(torch.from_numpy(sees), 0.0, float("-inf"))[None, None]
        with torch.no_grad():
            hidden = model(
                torch.tensor([[token for own in parts for token in own]]),
                attention_mask=mask,
                position_ids=torch.tensor([positions]),
            ).last_hidden_state[0]
        for block in (1, 2):
            end = sum(sizes[: block + 1])
            best = (hidden[end - BLOCK_TOKENS : end].double().numpy() @ table.T).max(axis=0)
            logs = best - np.log(np.exp(best).sum())
            words = {*tokenizer(pair[block - 1], add_special_tokens=False)["input_ids"]}
            expected = -np.mean([logs[word] for word in words])
            np.testing.assert_allclose(found[row, block - 1], expected, atol=1e-5)


def test_new_tokens_have_rows_and_others_keep_theirs(tiny):
    retriever, params = tiny
    before = load_file(f"{TINY_LLAMA}/model.safetensors")
    (table,) = (x for name, x in before.items() if name.endswith("embed_tokens.weight"))
    assert params["embedding"].shape == (ROWS + 2 * BLOCK_TOKENS, 32)
    np.testing.assert_array_equal(params["embedding"][:ROWS], table)
    drawn = np.random.default_rng(0).integers(ROWS, size=(2 * BLOCK_TOKENS, 8))
    np.testing.assert_allclose(params["embedding"][ROWS:], table[drawn].mean(axis=1), atol=1e-6)
    assert retriever.module.config.vocab_size == ROWS + 2 * BLOCK_TOKENS
    assert retriever.document_suffix[-BLOCK_TOKENS:] == (*range(ROWS, ROWS + BLOCK_TOKENS),)
    assert retriever.query_suffix[-BLOCK_TOKENS:] == (
        *range(ROWS + BLOCK_TOKENS, ROWS + 2 * BLOCK_TOKENS),
    )


@pytest.mark.slow
def test_an_export_comes_back_with_equal_vectors(tiny, tmp_path):
    """sentence-transformers puts nothing behind a text, and refuses it."""
    retriever, params = tiny
    moved = {**params, "embedding": params["embedding"] + 0.01}
    export_retriever(tmp_path / "out", retriever, moved)
    again, loaded = load_retriever(str(tmp_path / "out"))
    assert again.pooling == "block"
    assert again.identity == retriever.identity
    for kind in ("query", "document"):
        rows = [r.token_ids(["a norm", "an array of steps"], kind) for r in (retriever, again)]
        assert rows[0] == rows[1]
        arrays = pad(rows[0], 0)
        vectors = retriever.embed(moved, *arrays)
        np.testing.assert_array_equal(vectors, again.embed(loaded, *arrays))
    with pytest.raises(ValueError, match="block"):
        SentenceTransformer(str(tmp_path / "out"), device="cpu")
    # Another export of what was loaded has the same files.
    export_retriever(tmp_path / "twice", again, loaded)
    names = ("model.safetensors", "config.json", "1_Pooling/config.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_suffix_is_not_cut(tiny):
    retriever = dataclasses.replace(tiny[0], max_length=60, query_length=50)
    long = "array " * 100
    for kind, most in (("query", 50), ("document", 60)):
        (ids,) = retriever.token_ids([long], kind)
        suffix = getattr(retriever, f"{kind}_suffix")
        assert len(ids) == most
        assert tuple(ids[-len(suffix) :]) == suffix
    assert retriever.token_ids(["a"]) == [retriever.tokenizer("a")["input_ids"]]


def test_a_block_s_vector_is_the_mean_of_eight_states():
    hidden = np.arange(24, dtype=np.float32).reshape(2, 12, 1)
    mask = np.array([[1] * 10 + [0] * 2, [0] * 7 + [1] * 5])
    found = pool(jnp.asarray(hidden), jnp.asarray(mask), "block")
    np.testing.assert_allclose(found[:, 0], [5.5, 21.0])  # 2 to 9; 19 to 23, which are all


def test_passages_follow_each_other_in_one_text():
    found = [*passage_pairs(["a b c d e", "f", "", "g h i"], 2)]
    assert found == [("a b", "c d"), ("c d", "e"), ("g h", "i")]
    assert [*passage_pairs(["a b c d e"], 9)] == [("a b c", "d e")]


def test_rows_are_those_of_the_whole_batch(tiny):
    pairs = [(f"norm {i}", f"array {i}" + " of steps" * i) for i in range(8)]
    batches = LlaraBatches(pairs, tiny[0], 4, seed=1)
    whole, tokens = batches.batch(3)
    part, _ = batches.batch(3, np.array([2, 3]))
    assert len(tokens) == 4
    for name, array in whole.items():
        each = len(array) // 4
        np.testing.assert_array_equal(part[name], array[2 * each :])
    assert {*map(tuple, (batches.indices(s) for s in (0, 1)))} != {tuple(batches.indices(3))}


def blocks_config(directory, **settings):
    config = llama_config(directory, **settings)
    config.retriever.update({"end_token": False, "pooling": "block", "max_length": 64})
    config.llara.epochs = 8.0
    return config


def write_triples(directory):
    rows = [{"query": q, "pos": [f"{d} {d} {q}"]} for q, d in PAIRS]
    write_jsonl(directory / "triples.jsonl", rows)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_both_stages_and_its_export_loads(tmp_path, rank):
    write_triples(tmp_path)
    config = blocks_config(tmp_path, epochs=1.0, micro_batch=8)
    config.contrastive.lora.rank = rank
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    for name in ("own_words", "next_words"):
        losses = [row[name] for row in rows if row["phase"] == "llara"]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    assert sum(row["phase"] == "retriever" for row in rows) == len(PAIRS) // 16
    export = tmp_path / "run" / "export" / "retriever"
    retriever, params = load_retriever(str(export))
    assert retriever.pooling == "block"
    before = load_retriever(TINY_LLAMA, pooling="block", normalize=True, max_length=64)[1]
    same = jax.tree.map(np.array_equal, before, params)
    assert same["embedding"] == bool(rank)  # Of a frozen base nothing moves but what is adapted.
    assert not same["layers"]["self_attn"]["q_proj"]["kernel"]
    assert same["final_norm"]["scale"] == bool(rank)
    before = (export / "model.safetensors").stat().st_mtime_ns
    train(config, tmp_path / "run")
    assert (export / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"retriever.source": TINY},
            "retriever.pooling 'block' is for decoders with a causal mask",
        ),
        ({"retriever.bidirectional": True}, "is for decoders with a causal mask"),
        (
            {"retriever.pooling": "last"},
            r"llara\.epochs is 8\.0, but the retriever's pooling is 'l",
        ),
        ({"retriever.max_length": 20}, "max_length is 20; expected more than the "),
        ({"llara.pairs": 9}, "9 pairs of passages do not fill one batch of 16; lower"),
        ({"llara.passage_words": 0}, r"llara\.passage_words is 0; expected a whole number"),
        (
            {"contrastive.query_likelihood_weight": 1.0},
            "expected 0, as llara.epochs is above 0",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    write_triples(tmp_path)
    config = blocks_config(tmp_path)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_joint_training_takes_what_the_stage_made():
    config = smoke.get_config()
    config.llara.epochs = 1.0
    with pytest.raises(UserError, match=r"llara\.epochs is above 0, for train\.retriever alone"):
        load_models(read_config(config), lambda _: None)
