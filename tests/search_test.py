"""Search backends against numpy; what they refuse; saving and loading."""

import json
import shutil

import jax
import numpy as np
import pytest

from expandr_jax import search
from expandr_jax.errors import UserError
from expandr_jax.search import exact, scann

needs_scann = pytest.mark.skipif(not scann.installed(), reason="scann is not installed")
BACKENDS = ["exact", pytest.param("scann", marks=needs_scann)]


def _vectors(rows, width=8, seed=0):
    """Small whole numbers: products are exact and ties are many."""
    random = np.random.default_rng(seed)
    return random.integers(-2, 3, (rows, width)).astype(np.float32)


def _clustered(rows, width=32, seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(rows // 20, width))
    vectors = centres[random.integers(0, len(centres), rows)]
    vectors = vectors + 0.5 * random.normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _by_numpy(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, axis=1), indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40, 301])
@pytest.mark.parametrize("k", [1, 7, 50, 1000])
def test_neighbours_equal_numpys_with_ties_by_lower_index(backend, rows, k):
    vectors, queries = _vectors(rows), _vectors(5, seed=1)
    scores, indices = search.build_index(vectors, backend).search(queries, k)
    expected_scores, expected_indices = _by_numpy(vectors, queries, k)
    assert scores.shape == indices.shape == (5, min(k, rows))
    assert scores.dtype == np.float32
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 300, 1000])
@pytest.mark.parametrize("query_rows", [1, 3, 8])
def test_exact_results_do_not_depend_on_blocks(block_rows, query_rows):
    vectors, queries = _vectors(300), _vectors(7, seed=1)
    index = search.build_index(vectors, "exact", block_rows=block_rows, query_rows=query_rows)
    np.testing.assert_array_equal(index.search(queries, 20)[1], _by_numpy(vectors, queries, 20)[1])


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_exact_results_do_not_depend_on_the_number_of_devices(devices):
    vectors, queries = _clustered(500), _clustered(40, seed=1)
    vectors[300:400] = vectors[100:200]  # Ties between blocks of different devices.
    options = search.ExactOptions(block_rows=37, query_rows=16)
    alone = search.ExactIndex(vectors, options, jax.devices()[:1]).search(queries, 60)
    shared = search.ExactIndex(vectors, options, jax.devices()[:devices]).search(queries, 60)
    np.testing.assert_array_equal(shared[0], alone[0])
    np.testing.assert_array_equal(shared[1], alone[1])
    assert (np.diff(alone[0], axis=1) == 0).any()


def test_exact_spreads_the_corpus_over_all_devices(monkeypatch):
    used = []
    real = exact.merge_block

    def noted(scores, *rest):
        used.extend(scores.devices())
        return real(scores, *rest)

    monkeypatch.setattr(exact, "merge_block", noted)
    search.build_index(_vectors(100), "exact", block_rows=10).search(_vectors(3, seed=1), 5)
    assert {used.count(device) for device in jax.devices()} == {1, 2}  # Ten blocks, eight devices.


def test_exact_reads_a_memory_map_of_another_type(tmp_path):
    vectors = _vectors(100)
    np.save(tmp_path / "half.npy", vectors.astype(np.float16))
    mapped = np.load(tmp_path / "half.npy", mmap_mode="r")
    index = search.build_index(mapped, "exact", block_rows=16)
    np.testing.assert_array_equal(
        index.search(vectors[:3], 9)[1], _by_numpy(vectors, vectors[:3], 9)[1]
    )


def test_zeros_of_both_signs_are_equal():
    vectors = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-0.0, 0.0]], np.float32)
    queries = np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)
    _, indices = search.build_index(vectors, "exact").search(queries, 4)
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3]] * 2)


@needs_scann
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["brute", "ah", "tree"])
def test_scann_methods_find_most_neighbours(method, storage):
    vectors, queries = _clustered(2000), _clustered(2000)[:50]
    index = search.build_index(
        vectors, "scann", method=method, storage=storage, leaves=20, leaves_to_search=10
    )
    scores, indices = index.search(queries, 10)
    expected_scores, expected = _by_numpy(vectors, queries, 10)
    found = [len(set(a) & set(b)) / 10 for a, b in zip(indices, expected, strict=True)]
    assert np.mean(found) > 0.9
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}[storage]
    np.testing.assert_allclose(scores[:, 0], expected_scores[:, 0], atol=tolerance)
    assert (np.diff(scores, axis=1) <= 0).all()


@needs_scann
@needs_scann
def test_of_many_queries_those_that_tie_at_the_cut_are_searched_again(monkeypatch):
    corpus = np.concatenate([np.eye(8), np.tile(np.full(8, 8**-0.5), (40, 1))]).astype(np.float32)
    queries = np.concatenate([np.eye(8) * [8, 7, 6, 5, 4, 3, 2, 1] + 0.01, np.ones((1, 8))])
    queries = queries.astype(np.float32)
    index = search.build_index(corpus, "scann")
    rows, real = [], index._neighbours
    monkeypatch.setattr(index, "_neighbours", lambda q, k: rows.append((len(q), k)) or real(q, k))
    scores, indices = index.search(queries, 1)
    assert rows == [(9, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 48)]
    expected_scores, expected_indices = _by_numpy(corpus, queries, 1)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_the_method_follows_the_size():
    options = {"ah_from": 50, "tree_from": 100}
    for rows, method in ((10, "brute"), (49, "brute"), (50, "ah"), (99, "ah"), (100, "tree")):
        index = search.build_index(_clustered(100)[:rows], "scann", **options)
        assert index.method == method
    assert index.leaves == 10
    tiny = search.build_index(_vectors(8), "scann", method="tree")  # too few to train on
    assert tiny.method == "brute"


@needs_scann
@pytest.mark.parametrize("soar", [None, 1.5])
def test_a_tree_whose_leaves_run_dry_still_fills_every_result(soar):
    vectors = _clustered(300)
    index = search.build_index(
        vectors, "scann", method="tree", leaves=100, leaves_to_search=1, reorder=10, soar=soar
    )
    for k in (50, 300, 1000):
        scores, indices = index.search(vectors[:4], k)
        assert scores.shape == (4, min(k, 300))
        assert np.isfinite(scores).all()
        assert all(len(set(row)) == min(k, 300) for row in indices)
    more_leaves_than_rows = search.build_index(vectors[:20], "scann", method="tree", leaves=500)
    assert sorted(more_leaves_than_rows.search(vectors[:1], 20)[1][0]) == list(range(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_do_not_depend_on_the_queries_beside(backend):
    vectors = _clustered(300)
    index = search.build_index(vectors, backend)
    scores, indices = index.search(vectors, 10)
    for part in (slice(0, 1), slice(4, 7), slice(255, 257), slice(0, 257)):
        some_scores, some_indices = index.search(vectors[part], 10)
        np.testing.assert_array_equal(some_indices, indices[part])
        if backend == "scann":  # XLA picks its matrix product by shape
            np.testing.assert_array_equal(some_scores, scores[part])
        np.testing.assert_allclose(some_scores, scores[part], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_vectors_are_refused(backend):
    for shape in ((0, 4), (4, 0), (4,)):
        with pytest.raises(UserError, match="corpus vectors"):
            search.build_index(np.zeros(shape, np.float32), backend)
    with pytest.raises(UserError, match="int64"):
        search.build_index(np.zeros((2, 2), np.int64), backend)
    for bad in (np.nan, np.inf):
        vectors = _vectors(30)
        vectors[17, 3] = bad
        with pytest.raises(UserError, match="corpus vector 17"):
            search.build_index(vectors, backend)
    # Their squares are above what float32 holds: hashing them would end the process.
    vectors[17] = 1e20
    with pytest.raises(UserError, match=r"corpus vector 17 is longer than 1e\+15"):
        search.build_index(vectors, backend)


@needs_scann
@pytest.mark.parametrize("method", ["brute", "ah", "tree"])
def test_the_longest_vectors_are_searched(method):
    vectors = _clustered(200) * np.float32(0.99e15)
    index = search.build_index(vectors, "scann", method=method, leaves_to_search=1000)
    scores, indices = index.search(vectors, 5)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(indices[:, 0], range(200))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_queries_are_refused(backend):
    index = search.build_index(_vectors(30), backend)
    queries = _vectors(3)
    queries[2, 0] = np.nan
    with pytest.raises(UserError, match="query vector 2 holds NaN"):
        index.search(queries, 5)
    queries[2, 0] = 1e38  # Its products are infinite.
    with pytest.raises(UserError, match="query vector 2 is longer"):
        index.search(queries, 5)
    with pytest.raises(UserError, match=r"\[Q, 8\]"):
        index.search(_vectors(3, width=7), 5)
    with pytest.raises(UserError, match="k is 0"):
        index.search(_vectors(3), 0)
    scores, indices = index.search(np.zeros((0, 8), np.float32), 5)
    assert scores.shape == indices.shape == (0, 5)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("exact", {}),
        pytest.param("scann", {}, marks=needs_scann),
        pytest.param("scann", {"method": "ah", "storage": "int8"}, marks=needs_scann),
        pytest.param("scann", {"method": "tree", "soar": 1.5}, marks=needs_scann),
        pytest.param("scann", {"method": "tree", "storage": "bfloat16"}, marks=needs_scann),
    ],
)
def test_a_saved_index_moves_and_answers_the_same(tmp_path, backend, options):
    vectors = _clustered(200)
    index = search.build_index(vectors, backend, **options)
    index.save(tmp_path / "old")
    index.save(tmp_path / "old")  # over itself
    shutil.move(tmp_path / "old", tmp_path / "new")
    loaded = search.load_index(tmp_path / "new")
    assert (loaded.size, loaded.dimension) == (200, 32)
    assert loaded.fingerprint == search.fingerprint(vectors)
    (scores, indices), (saved_scores, saved_indices) = (
        each.search(vectors[:9], 20) for each in (index, loaded)
    )
    np.testing.assert_allclose(saved_scores, scores, atol=1e-6)
    if options.get("method") == "tree":  # rounding follows the order inside a leaf
        assert np.mean(saved_indices == indices) > 0.95
    else:
        np.testing.assert_array_equal(saved_scores, scores)
        np.testing.assert_array_equal(saved_indices, indices)
    saved = {path.name for path in (tmp_path / "new").iterdir()} - {"index.json"}
    assert saved == set(json.loads((tmp_path / "new/index.json").read_text())["files"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_index_is_refused(tmp_path, backend):
    search.build_index(_vectors(30), backend).save(tmp_path)
    data = next(path for path in tmp_path.iterdir() if path.suffix == ".npy")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        search.load_index(tmp_path)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        search.load_index(tmp_path)
    with pytest.raises(UserError, match="no saved index"):
        search.load_index(tmp_path / "absent")


@pytest.mark.parametrize(
    ("backend", "options"),
    [("exact", {}), pytest.param("scann", {"method": "tree", "soar": 1.5}, marks=needs_scann)],
)
def test_each_file_of_a_saved_index_is_checked(tmp_path, backend, options):
    search.build_index(_vectors(30), backend, **options).save(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) > (5 if backend == "scann" else 1)
    for path in files:
        content = path.read_bytes()
        # Every byte of the manifest: a digit that changes is still JSON.
        where = range(len(content)) if path.name == "index.json" else (0, len(content) // 2)
        spoilt = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in where]
        for bad in (b"", content[: len(content) // 2], content + b"x", None, *spoilt):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            with pytest.raises(UserError, match=r"build (it|the index) again"):
                search.load_index(tmp_path)
        path.write_bytes(content)
    search.load_index(tmp_path)


def test_fingerprints_tell_type_shape_and_bytes_apart():
    vectors = _vectors(6)
    seen = {
        search.fingerprint(v)
        for v in (vectors, vectors.reshape(12, 4), vectors.astype(np.float64), vectors[::-1])
    }
    assert len(seen) == 4
    assert search.fingerprint(np.asfortranarray(vectors)) == search.fingerprint(vectors)


def test_without_scann_auto_is_exact_and_scann_says_so(monkeypatch):
    monkeypatch.setattr(scann, "installed", lambda: False)
    index = search.build_index(_vectors(30), "auto", reorder=5, block_rows=8)
    assert isinstance(index, search.ExactIndex)
    with pytest.raises(UserError, match="use backend 'exact'"):
        search.build_index(_vectors(30), "scann")


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("faiss", {}, "expected auto, exact, scann or bm25"),
        ("exact", {"leaves": 3}, "'leaves' is unknown"),
        ("auto", {"leafs": 3}, "'leafs' is unknown"),
        pytest.param("scann", {"method": "hnsw"}, "'hnsw'", marks=needs_scann),
        ("exact", {"block_rows": 0}, "block_rows is 0"),
        ("exact", {"query_rows": 2.5}, "query_rows is 2.5"),
        pytest.param("scann", {"leaves": 0}, "leaves is 0", marks=needs_scann),
        pytest.param(
            "scann", {"leaves_to_search": "3"}, "leaves_to_search is '3'", marks=needs_scann
        ),
        pytest.param("scann", {"tree_from": -1}, "tree_from is -1", marks=needs_scann),
        pytest.param("scann", {"reorder": None}, "reorder is None", marks=needs_scann),
        pytest.param("scann", {"soar": np.nan}, "soar is nan", marks=needs_scann),
        pytest.param(
            "scann", {"anisotropic_threshold": "0.2"}, "threshold is '0.2'", marks=needs_scann
        ),
    ],
)
def test_unknown_settings_are_refused(backend, options, message):
    with pytest.raises(UserError, match=message):
        search.build_index(_vectors(30), backend, **options)


METHODS = [pytest.param(m, marks=needs_scann) for m in ("auto", "brute", "ah", "tree")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17])
def test_scann_finds_all_of_a_tiny_corpus(method, rows):
    vectors, queries = _vectors(rows), _vectors(5, seed=1)
    scores, indices = search.build_index(vectors, "scann", method=method).search(queries, 100)
    expected_scores, expected_indices = _by_numpy(vectors, queries, rows)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)


@needs_scann
@pytest.mark.parametrize("method", ["ah", "tree"])
def test_samples_and_blocks_fit_the_vectors(method):
    vectors = _clustered(2000)
    options = {"ah_sample": 1, "tree_sample": 1, "dimensions_per_block": 99, "leaves": 300,
               "leaves_to_search": 300, "reorder": 2000}  # fmt: skip
    index = search.build_index(vectors, "scann", method=method, **options)
    _, indices = index.search(vectors[:50], 1)
    np.testing.assert_array_equal(indices[:, 0], range(50))


@needs_scann
@pytest.mark.parametrize("method", ["auto", "ah", "tree"])
def test_scann_takes_vectors_of_one_dimension(method):
    vectors = _vectors(30, width=1)
    _, indices = search.build_index(vectors, "scann", method=method).search(np.ones((1, 1)), 30)
    np.testing.assert_array_equal(indices[0], np.argsort(-vectors[:, 0], kind="stable"))
