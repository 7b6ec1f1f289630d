"""Vectors in a file: those of `encode`, whatever interrupts it, with one block in memory."""

import contextlib
import copy
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.normalizers import Lowercase

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, hash_json
from expandr_jax.search import build_index, fingerprint
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.file import check_whole, count_cut, encode_to_file
from expandr_jax.vectors.stored import from_storage, to_storage
from expandr_jax.weights.hf import load_retriever
from expandr_jax.weights.trees import hash_tree

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
TEXTS = [f"the {a} of {b}" for a in ("norm", "loss", "step") for b in ("shape", "array", "count")]


@pytest.fixture(scope="module")
def tiny():
    retriever, params = load_retriever(TINY, max_length=16)
    mesh = make_mesh(devices=jax.devices()[:1])
    return TextEncoder(retriever, mesh, tokens_per_batch=64), params


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny[0].encode(tiny[1], TEXTS, "document")


def write(tiny, path, texts=TEXTS, **settings):
    return encode_to_file(path, *tiny, texts, "document", block=4, **settings)


def test_it_holds_the_vectors_of_encode(tiny, expected, tmp_path):
    found = write(tiny, tmp_path / "v.npy")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)
    half = write(tiny, tmp_path / "half.npy", dtype="float16")
    np.testing.assert_array_equal(half, expected.astype(np.float16))


def test_smaller_types_keep_cosines_and_space(tiny, expected, tmp_path):
    queries = np.random.default_rng(0).normal(size=(20, expected.shape[1])).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = queries.astype(np.float64) @ expected.T.astype(np.float64)
    greatest = np.abs(expected).max(axis=1)
    errors = {
        # Half a unit in the last of 8 binary digits, of every product.
        "bfloat16": 2.0**-9 * (np.abs(queries) @ np.abs(expected).T),
        # Half a step, which is the greatest component over 127, of every component.
        "int8": np.abs(queries).sum(axis=1)[:, None] * greatest / 127 / 2,
    }
    sizes = {}
    for dtype, bound in errors.items():
        found = write(tiny, tmp_path / f"{dtype}.npy", dtype=dtype)
        assert found.shape == expected.shape
        scores, indices = build_index(found, "exact").search(queries, len(TEXTS))
        assert scores.dtype == np.float32
        wanted = np.take_along_axis(exact, indices.astype(np.int64), axis=1)
        limit = np.take_along_axis(bound, indices.astype(np.int64), axis=1)
        assert (np.abs(scores - wanted) <= limit + 1e-6).all()
        assert (np.abs(scores - wanted) > 1e-6).any()
        assert limit.max() < 0.03
        sizes[dtype] = (tmp_path / f"{dtype}.npy").stat().st_size - 128
    width = expected.shape[1]
    assert sizes == {"bfloat16": 2 * width * len(TEXTS), "int8": (4 + width) * len(TEXTS)}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_stored_vectors_are_indexed_like_an_array(expected, dtype):
    stored = from_storage(to_storage(expected, dtype))
    whole = np.asarray(stored)
    assert whole.dtype == np.float32
    if dtype == "bfloat16":
        np.testing.assert_array_equal(whole, expected.astype(jnp.bfloat16).astype(np.float32))
    else:  # A row at a time, by the definition.
        for row, vector in zip(whole, expected, strict=True):
            step = np.abs(vector).max() / np.float32(127)
            np.testing.assert_allclose(row, np.round(vector / step) * step, rtol=1e-6)
    for rows in (3, slice(2, 5), np.array([4, 0]), np.array([[1, 2], [3, 0]]), [2, 1]):
        np.testing.assert_array_equal(stored[rows], whole[rows])
    assert len(stored) == len(expected)
    assert fingerprint(stored) == fingerprint(whole)
    zero = to_storage(np.zeros((1, 4), np.float32), dtype)
    np.testing.assert_array_equal(from_storage(zero)[:], np.zeros((1, 4)))


def test_texts_are_read_a_block_at_a_time(tiny, expected, tmp_path):
    path, seen = tmp_path / "v.npy", []

    def stream():
        for i, text in enumerate(TEXTS):
            part = tmp_path / "v.npy.jsonl.part"
            assert i < 4 or len(part.read_text().splitlines()) == i // 4
            yield text

    np.testing.assert_array_equal(write(tiny, path, stream(), progress=seen.append), expected)
    assert sum(seen) == len(TEXTS)


def test_texts_that_are_longer_than_the_retriever_reads_are_counted(tiny, tmp_path):
    """By the tokenizer's one pass: 14 words fill what it reads, 15 are too many."""
    encoder, params = tiny
    texts = [*TEXTS, " ".join(["the"] * 14), *(" ".join(["the"] * n) for n in (15, 16, 40))]
    path, calls, tokenizer = tmp_path / "v.npy", [], encoder.retriever.tokenizer

    def counted(some, **options):
        calls.extend(some)
        return tokenizer(some, **options)

    counted.pad_token_id = tokenizer.pad_token_id
    counted.get_vocab, counted.truncation_side = tokenizer.get_vocab, tokenizer.truncation_side
    other = dataclasses.replace(encoder.retriever, tokenizer=counted)
    vars(other)["identity"] = encoder.retriever.identity
    encode_to_file(
        path, TextEncoder(other, encoder.mesh, tokens_per_batch=64), params, texts, "document",
        block=4,
    )  # fmt: skip
    assert calls == texts
    assert count_cut(path) == 3
    journal = Journal(tmp_path / "v.npy.jsonl")
    rows = [{name: row[name] for name in row if name != "cut"} for row in journal.rows]
    journal.keep(0)
    journal.finish(rows)
    assert count_cut(path) == 0  # An older version's.
    write(tiny, path, texts)
    assert count_cut(tmp_path / "nothing.npy") == 0


def never():
    raise AssertionError("the texts are read again")
    yield


class Killed(Exception):
    pass


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("half_written", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_killed_in_a_block_it_goes_on(
    tiny, expected, tmp_path, monkeypatch, block, half_written, dtype
):
    expected = np.asarray(from_storage(to_storage(expected, dtype)))
    path, encoder, calls = tmp_path / "v.npy", tiny[0], []
    encode = encoder.encode

    def until_killed(*arguments):
        calls.append(arguments)
        if len(calls) > block:
            raise Killed
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", until_killed)
        with pytest.raises(Killed):
            write(tiny, path, dtype=dtype)
    assert not path.exists()
    if half_written:
        with open(tmp_path / "v.npy.part", "ab") as file:
            file.write(b"\xff" * 77)
    np.testing.assert_array_equal(write(tiny, path, dtype=dtype), expected)
    np.testing.assert_array_equal(write(tiny, path, never(), dtype=dtype), expected)
    Journal(tmp_path / "v.npy.jsonl").keep(3)  # As if killed at the very end.
    np.testing.assert_array_equal(write(tiny, path, never(), dtype=dtype), expected)
    with pytest.raises(UserError, match="other weights or settings"):
        write(tiny, path, dtype="float16")


def test_what_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    path, (encoder, params) = tmp_path / "v.npy", tiny
    with pytest.raises(UserError, match="no texts"):
        write(tiny, path, [])
    with pytest.raises(UserError, match="float32, float16, bfloat16, int8"):
        write(tiny, path, dtype="int4")

    def stream():
        yield from TEXTS[:5]
        raise Killed

    with pytest.raises(Killed):
        write(tiny, path, stream())
    other = {**params, "embedding": params["embedding"] + 1}
    with pytest.raises(UserError, match="other weights or settings"):
        write((encoder, other), path)
    with pytest.raises(UserError, match="texts from 0 are others"):
        write(tiny, path, ["x", *TEXTS[1:]])
    with pytest.raises(UserError, match="fewer texts"):
        write(tiny, path, [])


def test_a_retriever_that_makes_others_of_the_same_weights_is_refused(tiny, expected, tmp_path):
    """What parameters and text do not say: the module's options and type, tokenizer, prompts."""
    (encoder, params), path = tiny, tmp_path / "v.npy"
    write(tiny, path)
    own = encoder.retriever
    module, tokenizer = own.module, copy.deepcopy(own.tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    options = dataclasses.replace(module.config, activation="relu")
    for change in (
        {"module": module.clone(config=options)},
        {"module": module.clone(dtype=jnp.bfloat16)},
        {"tokenizer": tokenizer},
        {"max_length": 15}, {"normalize": not own.normalize}, {"pooling": "cls"},
        {"document_prompt": "passage: "}, {"dense": "tanh"},
    ):  # fmt: skip
        other = dataclasses.replace(own, **change)
        with pytest.raises(UserError, match="other weights or settings"):
            write((TextEncoder(other, encoder.mesh, tokens_per_batch=64), params), path)
    np.testing.assert_array_equal(write(tiny, path, never()), expected)


def test_a_file_that_an_older_version_began_goes_on(tiny, expected, tmp_path, monkeypatch):
    """Its rows have what was told apart then."""
    encoder, params = tiny
    own = encoder.retriever
    settings = [own.pooling, own.normalize, own.max_length, "float32", 4]
    older = hash_json([hash_tree(params), encoder.prompt("document"), *settings])
    write(tiny, tmp_path / "v.npy")
    journal = Journal(tmp_path / "v.npy.jsonl")
    rows = [{**row, "identity": older} for row in journal.rows]
    journal.keep(0)
    journal.append(rows[:2])
    calls, encode = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *args: calls.append(args) or encode(*args))
    np.testing.assert_array_equal(write(tiny, tmp_path / "v.npy"), expected)
    assert len(calls) == 1  # The third block.
    found = {row["identity"] for row in Journal(tmp_path / "v.npy.jsonl").rows}
    assert older in found
    assert len(found) == 2


def damaged(content: bytes, how: str) -> bytes | None:
    """What is left of a file; None: nothing at all."""
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"truncate": content[:middle], "flip": flipped, "empty": b"", "delete": None}[how]


@pytest.mark.parametrize("how", ["truncate", "flip", "empty", "delete"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("which", ["vectors", "journal"])
def test_what_is_damaged_is_made_again(tiny, expected, tmp_path, how, finished, which):
    path = tmp_path / "v.npy"

    def stream():
        for number, text in enumerate(TEXTS):
            if not finished and number == len(TEXTS) - 1:
                raise Killed
            yield text

    with contextlib.suppress(Killed):
        write(tiny, path, stream())
    file = tmp_path / {"vectors": "v.npy", "journal": "v.npy.jsonl"}[which]
    if not finished:
        file = file.with_name(f"{file.name}.part")
    content = damaged(file.read_bytes(), how)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    np.testing.assert_array_equal(write(tiny, path), expected)
    np.testing.assert_array_equal(write(tiny, path, never()), expected)


def test_a_damaged_header_is_made_again(tiny, expected, tmp_path):
    path = tmp_path / "v.npy"
    write(tiny, path)
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"?" + content[21:])
    np.testing.assert_array_equal(write(tiny, path), expected)


def test_a_vector_that_is_not_finite_is_placed(tiny, tmp_path):
    encoder, params = tiny
    broken = {**params, "embedding": params["embedding"].at[:].set(np.nan)}
    with pytest.raises(UserError, match="texts from 0: text 0"):
        write((encoder, broken), tmp_path / "v.npy")


def test_a_share_that_is_damaged_is_named(tiny, tmp_path):
    """Whoever puts shares together took them as they were."""
    path = tmp_path / "v.npy.process-1-of-2"
    journal = tmp_path / f"{path.name}.jsonl"
    write(tiny, path)
    check_whole(path)
    whole = {p: p.read_bytes() for p in (path, journal)}
    middle = len(whole[path]) - 70
    for file, data, named in (
        (path, whole[path][:middle] + b"?" + whole[path][middle + 1 :], path),
        (path, whole[path][:middle], path),
        (path, None, path),
        (journal, whole[journal].replace(b'"rows": 4', b'"rows": 5', 1), f"{journal}:1"),
        (journal, None, journal),
    ):
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(UserError, match=rf"^{named}: .*; the same command makes again"):
            check_whole(path)
        for left in tmp_path.iterdir():
            left.unlink()
        for kept, content in whole.items():
            kept.write_bytes(content)
    check_whole(path)
