"""Decoders that are read without their causal mask, and layers after pooling, beside the peers."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from eval import tiny_models
from expandr_jax.data.batches import pad
from expandr_jax.errors import UserError
from expandr_jax.models.pooling import dense_name
from expandr_jax.weights.export import export_retriever
from expandr_jax.weights.hf import load_generator, load_retriever

UNMASKED = {
    family: {"use_bidirectional_attention": True} if "gemma" in family else {"is_causal": False}
    for family in ("llama", "mistral-window", "qwen2-window", "qwen3", "gemma3")
}
TEXTS = ("pad an array", "sort", "the inverse of a matrix, and its rank", "")


def quick(names, one):
    """All names, of which one is tested with the quick tests."""
    return [name if name == one else pytest.param(name, marks=pytest.mark.slow) for name in names]


def vectors(retriever, params, texts, kind):
    ids, mask = pad(retriever.token_ids(texts, kind), retriever.tokenizer.pad_token_id)
    return np.asarray(jax.jit(retriever.embed)(params, ids, mask))


@pytest.mark.parametrize("family", quick(UNMASKED, "gemma3"))
def test_hidden_states_without_the_mask_are_those_of_transformers(tmp_path, family):
    """Windows of local layers lie within the rows."""
    reference = tiny_models.save(tmp_path, family, **UNMASKED[family])
    retriever, params = load_retriever(str(tmp_path), pooling="mean", normalize=True)
    module = retriever.module
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side)
        found = jax.jit(module.apply)({"params": params}, *module.inputs(ids, mask))
        rows = tiny_models.unpadded(ids, mask)
        for ours, row in zip(tiny_models.unpadded(found, mask), rows, strict=True):
            with torch.no_grad():
                theirs = reference(torch.tensor(row[None])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    masked = module.clone(config=type(module.config)(**{**vars(module.config), "causal": True}))
    other = jax.jit(masked.apply)({"params": params}, *masked.inputs(ids, mask))
    assert np.abs(np.asarray(other - found))[0].max() > 0.1


def test_a_plain_decoder_is_read_without_its_mask_where_the_settings_say_so(tmp_path):
    """Its export says so itself; and an encoder has no such mask."""
    tiny_models.save(tmp_path / "plain", "qwen3")
    options = {"pooling": "mean", "normalize": True, "bidirectional": True}
    retriever, params = load_retriever(str(tmp_path / "plain"), **options)
    export_retriever(tmp_path / "out", retriever, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["is_causal"] is False
    peer = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    again, params = load_retriever(str(tmp_path / "out"))
    assert again.identity == retriever.identity
    causal, _ = load_retriever(str(tmp_path / "plain"), pooling="mean", normalize=True)
    assert causal.identity != retriever.identity
    found = vectors(again, params, TEXTS, "query")
    np.testing.assert_allclose(found, peer.encode_query(list(TEXTS)), atol=2e-4)
    assert np.abs(found - vectors(causal, params, TEXTS, "query")).max() > 1e-2
    tiny_models.save(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="bidirectional is for decoders; a bert model has no causa"):
        load_retriever(str(tmp_path / "bert"), **options)


def test_what_is_read_without_a_mask_writes_nothing(tmp_path):
    tiny_models.save(tmp_path, "llama", head=True, is_causal=False)
    with pytest.raises(UserError, match="read without a causal mask, and so cannot generate text"):
        load_generator(str(tmp_path))


@pytest.mark.parametrize("name", quick(tiny_models.SENTENCES, "embedding-gemma"))
def test_vectors_of_published_forms_are_those_of_sentence_transformers(tmp_path, name):
    """EmbeddingGemma has two layers after pooling; all come back as they were."""
    peer = tiny_models.save_sentences(tmp_path / "in", name)
    retriever, params = load_retriever(str(tmp_path / "in"))
    for kind, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
        found = vectors(retriever, params, TEXTS, kind)
        np.testing.assert_allclose(found, encode(list(TEXTS)), atol=2e-4)
        assert np.ptp(found, axis=0).max() > 0.01
    export_retriever(tmp_path / "out", retriever, params)
    back = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in back] == [type(m).__name__ for m in peer]
    np.testing.assert_array_equal(back.encode_query(list(TEXTS)), peer.encode_query(list(TEXTS)))


def test_layers_after_pooling_must_fit_each_other(tmp_path):
    tiny_models.save_sentences(tmp_path / "in", "embedding-gemma")
    retriever, params = load_retriever(str(tmp_path / "in"))
    kernels = [params[dense_name(number)]["kernel"].shape for number in (0, 1)]
    assert kernels == [(32, 80), (80, 24)]
    assert retriever.dense == ("identity", "identity")
    folders = sorted((tmp_path / "in").glob("*_Dense"))
    first, second = (folder / "model.safetensors" for folder in folders)
    assert load_file(second)["linear.weight"].shape == (24, 80)
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"expected linear.weight of width 80 and perhaps"):
        load_retriever(str(tmp_path / "in"))
