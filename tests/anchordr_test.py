"""AnchorDR against a PyTorch twin, its tokenizer, and the way in and back of its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

from eval import tiny_anchordr, tiny_models
from expandr_jax.errors import UserError
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.file import count_cut, encode_to_file
from expandr_jax.weights.export import export_encoder, export_retriever
from expandr_jax.weights.fairseq import FairseqTokenizer, clean
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.export_test import embed

PIECES, PAD = tiny_anchordr.PIECES, tiny_anchordr.PAD


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    return tiny_anchordr.train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def write(tmp_path, sentencepiece_model):
    """Writes a random model as the authors publish theirs; gives its directory and tensors."""

    def write(gated=False):
        directory = tmp_path / "anchordr"
        return directory, tiny_anchordr.save(directory, sentencepiece_model, gated)

    return write


@pytest.mark.parametrize("gated", [False, True])
def test_vectors_equal_the_twin(write, gated):
    directory, tensors = write(gated)
    retriever, params = load_retriever(str(directory))
    assert (retriever.pooling, retriever.normalize, retriever.max_length) == (
        "decoder",
        False,
        1024,
    )
    twin = tiny_anchordr.Twin(tensors, gated)
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side, lengths=(200, 17, 9, 1))
        ids = np.where(mask, ids % (PIECES + 4), PAD)
        found = jax.jit(retriever.embed)(params, ids, mask)
        for row, vector in zip(tiny_models.unpadded(ids, mask), found, strict=True):
            np.testing.assert_allclose(vector, twin.vector(row), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_vectors_equal_the_twin_at_the_published_size(write, monkeypatch):
    """T5's base size, which AnchorDR has: 12 blocks in each stack, 768 wide."""
    size = {"WIDTH": 768, "HEADS": 12, "INNER": 3072, "LAYERS": 12, "DECODER_LAYERS": 12}
    for name, value in {**size, "SCALE": 0.05}.items():
        monkeypatch.setattr(tiny_anchordr, name, value)
    directory, tensors = write()
    retriever, params = load_retriever(str(directory))
    texts = ["The anchor text of a web page", "web"]
    expected = [tiny_anchordr.Twin(tensors, False).vector(r) for r in retriever.token_ids(texts)]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 190e6
    np.testing.assert_allclose(embed(retriever, params, texts), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_it_trains_with_dropout_and_remat_changes_nothing(write):
    directory, _ = write()
    retriever, params = load_retriever(str(directory))
    ids, mask = tiny_models.ragged_batch("right")
    ids = ids % (PIECES + 4)

    def loss(params, module):
        replaced = type(retriever)(**{**vars(retriever), "module": module})
        key = jax.random.key(0)
        return jnp.square(replaced.embed(params, ids, mask, dropout_key=key)).sum()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = step(params, retriever.module)
    again = step(params, retriever.module.clone(remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, again)
    assert float(plain[0]) != float(jnp.square(retriever.embed(params, ids, mask)).sum())


def test_files_return_bit_equal(write, tmp_path):
    directory, tensors = write()
    retriever, params = load_retriever(str(directory), max_length=100, mesh=make_mesh(2, 2, 2))
    export_encoder(tmp_path / "out", retriever, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    for name in ("sp.model", "dict.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    again, same = load_retriever(str(tmp_path / "out"))
    assert (again.module, again.max_length) == (retriever.module, 100)
    texts = ["The anchor text", "web: it's a page, isn't it?"]
    assert again.token_ids(texts) == retriever.token_ids(texts)
    np.testing.assert_allclose(
        embed(again, same, texts), embed(retriever, params, texts), atol=1e-5
    )
    with pytest.raises(UserError, match="no such model and cannot load it; export it in its"):
        export_retriever(tmp_path / "other", retriever, params)
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused(write):
    directory, tensors = write()
    with pytest.raises(UserError, match=r"pooling 'mean' and a anchordr model do not fit"):
        load_retriever(str(directory), pooling="mean")
    with pytest.raises(UserError, match=r"a anchordr model cannot generate text"):
        load_generator(str(directory))
    changed = {**tensors, "decoder.embed_tokens.weight": tensors["shared.weight"] + 1}
    save_file(changed, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"should equal shared.weight, .* do not: decoder.embed"):
        load_retriever(str(directory))
    (directory / "dict.txt").write_text("a 3\nb\n")
    with pytest.raises(UserError, match=r"dict.txt:2: expected a piece, a space and its count"):
        load_retriever(str(directory))
    (directory / "sp.model").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"sp.model: not a SentencePiece model"):
        load_retriever(str(directory))
    (directory / "sp.model").unlink()
    with pytest.raises(UserError, match=r"sp.model: AnchorDR's tokenizer needs it"):
        load_retriever(str(directory))


def test_ids_follow_the_dictionary(write, sentencepiece_model):
    directory, _ = write()
    tokenizer = FairseqTokenizer(directory)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    # The dictionary lists the pieces backwards, after four special tokens.
    expected = [PIECES - 1 - i + 4 for i in pieces.encode("the web page")]
    ids = tokenizer(["The web  page", "the Ω", ""])["input_ids"]
    assert ids[0] == [0, *expected, 2]
    assert ids[1][-2:] == [3, 2]
    assert ids[2] == [0, 2]
    cut = tokenizer(["The web page"], truncation=True, max_length=4)
    assert cut["input_ids"] == [[0, *expected[:2], 2]]
    assert cut["num_truncated_tokens"] == [len(expected) - 2]


def test_a_corpus_is_encoded_and_what_it_lost_is_counted(write, tmp_path):
    directory, _ = write()
    retriever, params = load_retriever(str(directory), max_length=4)
    encoder = TextEncoder(retriever, make_mesh())
    texts = ["the", "the web page and many other words"]
    path = tmp_path / "vectors.npy"
    vectors = encode_to_file(path, encoder, params, texts, "document")
    assert (len(vectors), count_cut(path)) == (2, 1)
    (directory / "dict.txt").write_text((directory / "dict.txt").read_text() + "another 3\n")
    other, _ = load_retriever(str(directory), max_length=4)
    assert other.identity != retriever.identity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,  world! ", "Hello , world !"),
        ("``quoted'' “text” it’s 1990–91", '" quoted " " text " it\'s 1990-91'),
        ("(see Fig. 3)...", "( see Fig . 3 )..."),
        ("'don't' e.g. a-b ...", "' don't ' e.g . a-b ..."),
        ("it ' s we ' ll THEY ' RE here", "it 's we 'll THEY 'RE here"),
        ("it ' sky ' LL", "it ' sky ' LL"),
        ("100% «oui»", "100 % « oui »"),
        ("", ""),
    ],
)
def test_the_cleaner_on_worked_examples(text, expected):
    assert clean(text, lower_case=False) == expected
    assert clean(text, lower_case=True) == expected.lower()
