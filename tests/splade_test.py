"""SPLADE's encoder, its files, losses and index, against sentence-transformers and NumPy."""

import json
import logging
import types

import jax
import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from transformers import AutoModel, AutoModelForMaskedLM

from eval import tiny_models
from expandr_jax.data.batches import pad
from expandr_jax.errors import UserError
from expandr_jax.losses.contrastive import flops
from expandr_jax.ranking.settings import SpladeSettings
from expandr_jax.ranking.systems import parse_systems, stage_hashes
from expandr_jax.search import SparseIndex, load_index
from expandr_jax.weights.hf import load_retriever
from expandr_jax.weights.sparse_encoder import export_sparse_encoder, load_sparse_encoder
from tests.file_options import edit
from tests.mutations_test import refused_mutations

TEXTS = ["pad an array", "sort", "the inverse of a matrix, and its rank", ""]


def save(directory, family, form):
    """A random model with the head of a masked language model, in one of the published forms."""
    plain = directory.with_name(f"{directory.name}-plain") if form != "bare" else directory
    tiny_models.save_random(plain, family, AutoModelForMaskedLM)
    if form == "older":
        modules = [MLMTransformer(str(plain), max_seq_length=48), SpladePooling()]
        peer = SparseEncoder(modules=modules, prompts={"query": "q: "}, device="cpu")
    else:
        # Without a list of modules these files are not read.
        edit(plain / "config_sentence_transformers.json", prompts={"query": "q: "})
        edit(plain / "sentence_bert_config.json", max_seq_length=9)
        peer = SparseEncoder(str(plain), device="cpu")
    if form != "bare":
        peer.save_pretrained(str(directory))
    return peer


def vectors(retriever, params, kind):
    ids, mask = pad(retriever.token_ids(TEXTS, kind), retriever.tokenizer.pad_token_id)
    return np.asarray(jax.jit(retriever.embed)(params, ids, mask))


@pytest.mark.parametrize(
    ("family", "form"), [("bert", "older"), ("bert", "bare"), ("roberta", "present")]
)
def test_vectors_are_those_of_sparse_encoder_and_come_back(tmp_path, family, form):
    peer = save(tmp_path / "in", family, form)
    retriever, params = load_sparse_encoder(str(tmp_path / "in"))
    most, prompt = {"older": (48, "q: "), "bare": (64, ""), "present": (62, "")}[form]
    assert (retriever.max_length, retriever.query_prompt) == (most, prompt)
    export_sparse_encoder(tmp_path / "out", retriever, params)
    back = SparseEncoder(str(tmp_path / "out"), device="cpu")
    for kind in ("query", "document"):
        found = vectors(retriever, params, kind)
        assert 0.1 < np.mean(found > 0) < 0.95
        for other in (peer, back):
            encode = other.encode_query if kind == "query" else other.encode_document
            np.testing.assert_allclose(found, encode(TEXTS).to_dense().numpy(), atol=2e-4)
    again = load_sparse_encoder(str(tmp_path / "out"))[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_without_a_head_the_embeddings_alone_say_which_words_count(tmp_path, caplog):
    tiny_models.save(tmp_path / "in", "bert")
    with caplog.at_level(logging.WARNING):
        retriever, params = load_sparse_encoder(str(tmp_path / "in"))
    assert "no head of a masked language model" in caplog.text
    bert = AutoModel.from_pretrained(tmp_path / "in").eval()
    for text, found in zip(TEXTS, vectors(retriever, params, None), strict=True):
        with torch.no_grad():
            hidden = bert(torch.tensor(retriever.token_ids([text]))).last_hidden_state[0]
            hidden = torch.nn.functional.layer_norm(
                torch.nn.functional.gelu(hidden), hidden.shape[1:], eps=1e-12
            )
            scores = hidden @ bert.embeddings.word_embeddings.weight.T
        expected = np.log1p(np.maximum(scores.numpy(), 0)).max(axis=0)
        np.testing.assert_allclose(found, expected, atol=2e-4)
    export_sparse_encoder(tmp_path / "out", retriever, params)
    peer = SparseEncoder(str(tmp_path / "out"), device="cpu")
    found = peer.encode_query(TEXTS).to_dense().numpy()
    np.testing.assert_allclose(found, vectors(retriever, params, "query"), atol=2e-4)


def test_other_heads_and_poolings_are_refused(tmp_path):
    save(tmp_path / "in", "bert", "older")
    where = str(tmp_path / "in")
    with pytest.raises(
        UserError, match="modules are 'MLMTransformer, SpladePooling'; supported: T"
    ):
        load_retriever(where)
    pooling = tmp_path / "in" / "1_SpladePooling" / "config.json"
    fields = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(fields | {"pooling_strategy": "sum"}))
    with pytest.raises(UserError, match="pooling_strategy='sum' is not supported; only 'max' is"):
        load_sparse_encoder(where)
    pooling.write_text(json.dumps(fields))
    weights = tmp_path / "in" / "model.safetensors"
    tensors = load_file(weights)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": table + 1}, weights)
    with pytest.raises(UserError, match=r"decoder\.weight"):
        load_sparse_encoder(where)
    tiny_models.save(tmp_path / "t5", "t5")
    with pytest.raises(UserError, match="a sparse encoder is a whole model of type bert, "):
        load_sparse_encoder(str(tmp_path / "t5"))


def test_200_mutations_of_its_files_end_in_one_line_or_load(tmp_path):
    save(tmp_path / "in", "bert", "older")
    path = tmp_path / "in"
    names = ["modules.json", "1_SpladePooling/config.json", "sentence_bert_config.json",
             "config_sentence_transformers.json", "config.json", "model.safetensors"]  # fmt: skip
    assert refused_mutations(path, names, load_sparse_encoder) > 100


def test_another_encoder_is_told_by_its_hashes(tmp_path):
    systems, found = parse_systems(["bm25", "exp4fuse:splade:bm25"]), []
    for form in ("older", "bare"):
        save(tmp_path / form, "bert", form)
        settings = types.SimpleNamespace(splade=SpladeSettings(str(tmp_path / form), 32))
        found.append(stage_hashes(systems, settings))
        assert not stage_hashes(systems[:1], settings)
    # The weights are the same, and one has a prompt.
    weights, said = (
        f"evaluation.splade.source, {of}" for of in ("its weights", "what its files say")
    )
    assert {*found[0]} == {*found[1]} == {weights, said}
    assert found[0][weights] == found[1][weights]
    assert found[0][said] != found[1][said]


def test_flops_are_those_of_sentence_transformers_and_by_hand():
    rng = np.random.default_rng(0)
    values = np.maximum(rng.normal(size=(5, 7)), 0).astype(np.float32)
    peer = FlopsLoss(None).compute_loss_from_embeddings(torch.tensor(values)).item()
    assert float(flops(values)) == pytest.approx(peer, abs=1e-6)
    given = np.array([True, False, True, True, False])
    assert float(flops(values, given)) == pytest.approx(float(flops(values[given])), abs=1e-6)
    assert float(flops(np.array([[1.0, 0.0], [3.0, 2.0]]))) == 5.0  # 2^2 + 1^2


def test_an_index_finds_what_a_dense_product_does(tmp_path):
    rng = np.random.default_rng(0)
    dense = np.round(np.maximum(rng.normal(size=(60, 20)) - 1, 0), 1).astype(np.float32)
    dense[7], dense[:, 3] = 0, 0  # A document without components, a component without documents.
    blocks = [scipy.sparse.csr_array(dense[i : i + 25]) for i in range(0, 60, 25)]
    index = SparseIndex(iter(blocks), 20, "key")
    queries = np.round(np.maximum(rng.normal(size=(9, 20)), 0), 1).astype(np.float32)
    queries[2] = 0
    scores, rows = index.search(scipy.sparse.csr_array(queries), 12)
    product = queries.astype(np.float64) @ dense.T.astype(np.float64)
    expected = np.argsort(-np.round(product, 4), axis=1, kind="stable")[:, :12]
    np.testing.assert_allclose(scores, np.take_along_axis(product, rows, 1), atol=1e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(product, expected, 1), atol=1e-5)
    np.testing.assert_array_equal(rows[2], np.arange(12))
    index.save(tmp_path / "index")
    again = load_index(tmp_path / "index")
    assert again.fingerprint == "key"
    for a, b in zip(again.search(scipy.sparse.csr_array(queries), 12), (scores, rows), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="queries have 19 components, not 20"):
        index.search(scipy.sparse.csr_array(queries[:, 1:]), 3)
    with pytest.raises(UserError, match="a sparse index of no documents"):
        SparseIndex(iter(()), 20, "key")
