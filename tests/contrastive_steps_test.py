"""Step A's batches: few shapes, drawn as ever, and each process makes its own rows."""

import dataclasses
import hashlib
import pickle
import threading
import tracemalloc
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from absl import flags

from expandr_jax.data.triples import MadeTriples, Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.losses.contrastive import same_text
from expandr_jax.objectives import contrastive_steps, packed_examples, stored_examples
from expandr_jax.objectives.contrastive_batches import (
    ContrastiveExample,
    Passage,
    make_batch,
    triple_examples,
)
from expandr_jax.objectives.contrastive_steps import (
    MOST_SIZES,
    ContrastiveBatches,
    draw_passages,
    stays_plain,
)
from expandr_jax.objectives.packed_examples import (
    ExampleHashes,
    pack_examples,
    triple_blocks,
    triples_key,
)
from expandr_jax.objectives.stored_examples import made_ahead, store_examples
from expandr_jax.runtime.processes import Processes
from tests.processes_test import Beside

SIZE, LONGEST = 4, 200
KINDS = ("query", "positive", "negative", "expansion")


def examples(count, spread, seed=0):
    """Queries with one or two expansions and up to three documents of both kinds."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(3, 99, rng.integers(1, spread)).astype(np.int32)

    def passages(most):
        return [Passage(ids(), f"text {rng.integers(count)}") for _ in range(rng.integers(most))]

    return [
        ContrastiveExample(
            query=ids(),
            expansions=[ids() for _ in range(rng.integers(3))],
            positive=Passage(ids(), f"text {i}"),
            negatives=passages(4),
            other_positives=passages(3) if i % 3 == 0 else [],
            known=[f"text {i + 1}"] if i % 5 == 0 else [],
        )
        for i in range(count)
    ]


def batches_of(given, steps=None, **settings):
    settings = {"batch_size": SIZE, "negatives": 2, "plain_share": 0.3, "length_window": 0,
                "curriculum": False, **settings}  # fmt: skip
    return ContrastiveBatches(
        examples=given,
        settings=types.SimpleNamespace(**settings),
        samples=2,
        seed=3,
        pad_id=0,
        longest=LONGEST,
        steps=range(3 * (len(given) // SIZE)) if steps is None else steps,
    )


def shapes(batch):
    return tuple(batch[f"{kind}_ids"].shape[1] for kind in KINDS)


def as_it_needs(batches, number):
    """The batch of a step, padded as it needs by itself."""
    settings = batches.settings
    drawn = [*batches.draw(number).values()]
    return make_batch(drawn, 0, batches.samples, settings.negatives, LONGEST)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_training_has_few_programs_and_rows_as_they_were(share):
    """Each length of each kind of text was a shape of its own."""
    batches = batches_of(examples(80, 150), plain_share=share)
    alone = [as_it_needs(batches, number) for number in batches.steps]
    assert len({shapes(batch) for batch in alone}) > MOST_SIZES
    found = [batches.batch(number)[0] for number in batches.steps]
    every = {tuple((name, x.shape) for name, x in batch.items()) for batch in found}
    assert 1 < len(every) <= MOST_SIZES
    for ours, own in zip(found, alone, strict=True):
        assert all(a >= b for a, b in zip(shapes(ours), shapes(own), strict=True))
        for kind in KINDS:
            width = own[f"{kind}_ids"].shape[1]
            for name in (f"{kind}_ids", f"{kind}_mask"):
                np.testing.assert_array_equal(ours[name][:, :width], own[name])
                assert not ours[name][:, width:].any()


@pytest.mark.parametrize("window", [0, 3])
def test_few_shapes_stay_what_batches_need(window):
    """Else the rounding of a run that goes on would change, however little."""
    batches = batches_of(examples(60, 40), range(20, 26), plain_share=0.5, length_window=window)
    alone = [shapes(as_it_needs(batches, number)) for number in batches.steps]
    assert 1 < len({*alone}) <= MOST_SIZES
    found = [shapes(batches.batch(number)[0]) for number in batches.steps]
    assert found == alone


def test_a_process_makes_its_rows_alone(monkeypatch):
    batches = batches_of(examples(80, 150))
    names = [f"q{i}" for i in range(80)]
    expected = {number: batches.batch(number) for number in (0, 17, 41)}
    drawn, draw = [], contrastive_steps.draw_passages

    def counted(example, *args, **options):
        drawn.append(options["query"])
        return draw(example, *args, **options)

    monkeypatch.setattr(contrastive_steps, "draw_passages", counted)
    for number, (whole, tokens) in expected.items():
        contents = batches.contents(number, SIZE, tokens, names, lambda length: length**2)
        assert (contents.tokens, contents.flops) == (tokens.sum(), np.square(tokens).sum())
        made = []
        for rows in ([0, 1], [2], [3]):
            drawn.clear()
            part, own = batches.batch(number, np.array(rows))
            assert [f"q{i}" for i in drawn] == [contents.ids[row] for row in rows]
            counts = batches.contents(number, len(rows), own, names, lambda _: 1)
            assert counts.ids == contents.ids
            assert counts.tokens == round(own.sum() * SIZE / len(rows))
            made.append(own)
            for name, array in part.items():
                each = len(whole[name]) // SIZE
                taken = whole[name].reshape(SIZE, each, *array.shape[1:])[rows]
                np.testing.assert_array_equal(array, taken.reshape(array.shape), err_msg=name)
        np.testing.assert_array_equal(np.concatenate(made), tokens)


def same_batch(ours, theirs):
    """Equal arrays; what is relevant may come in another order."""
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        if name == "relevant":
            sets = ([{*map(tuple, row.tolist())} for row in x] for x in (ours[name], array))
            assert next(sets) == next(sets)
            assert ours[name].shape == array.shape
        else:
            np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_stored_examples_make_the_same_batches():
    given = examples(40, 150)
    given[3] = dataclasses.replace(given[3], positive=Passage(given[3].positive.ids, "text", 0.5))
    whole = store_examples([pack_examples(given[:17]), pack_examples(given[17:])])
    stored = pickle.loads(pickle.dumps(whole))
    assert len(stored) == 40
    assert stored[3].positive.score == 0.5
    assert stored[4].positive.score is None
    ours, theirs = batches_of(stored), batches_of(given)
    for number in (0, 9, 25):
        (arrays, tokens), (expected, expected_tokens) = ours.batch(number), theirs.batch(number)
        same_batch(arrays, expected)
        np.testing.assert_array_equal(tokens, expected_tokens)


@pytest.mark.parametrize("system", ["with /proc", "without"])
def test_stored_examples_have_no_names_where_that_can_be(tmp_path, monkeypatch, system):
    """A kill would leave them behind; with workers, which open them, they had names."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if system == "without":
        monkeypatch.setattr(stored_examples, "_opens_unnamed", lambda: False)
    given, seen = examples(20, 50), []

    def blocks():
        for first in range(0, 20, 10):
            yield pack_examples(given[first : first + 10])
            seen.append(len([*tmp_path.iterdir()]))

    stored = store_examples(blocks())
    assert seen == ([0, 0] if system == "with /proc" else [7, 7])
    read = pickle.loads(pickle.dumps(stored))
    same_batch(batches_of(read).batch(2)[0], batches_of(given).batch(2)[0])
    del stored
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"absent: cannot write step A's examples: No such file"):
        store_examples(blocks())


def is_cut(text):
    """Whether `Encoder` says that it cuts a text: some, of all kinds."""
    return int(text.split()[0]) % 4000 == 0


class Encoder:
    """Texts of numbers, as their tokens; counts them."""

    texts = 0

    def tokenize(self, texts, kind, cut=None):
        self.texts += len(texts)
        if cut is not None:
            cut([*map(is_cut, texts)])
        return [[300 + len(kind), *map(int, text.split())] for text in texts]


def triples(count, words=3):
    def text(i):
        return " ".join(str(1000 * i + j) for j in range(words))

    def make(i):
        # Some queries stand twice, far from each other, and so do some documents.
        more = (text(i % 7),) if i % 3 == 0 else ()
        return Triple(queries[i], (text(i), *more), (text(i + 1), text(i % 5)), (text(i + 2),))

    queries = [text(i % (count - 4)) for i in range(count)]
    return MadeTriples(queries, make)


def hashes_of(given):
    """(all, older) over examples, as runs have recorded them: each is hashed behind the other."""
    whole, rows = hashlib.sha256(), []
    for e in given:
        passages = (e.positive, *e.negatives, *e.other_positives)
        counts = [len(e.expansions), len(e.negatives), len(e.other_positives)]
        texts = [[passage.text, passage.score] for passage in passages]
        whole.update(hash_json([counts, texts, sorted(e.known)]).encode())
        for ids in (e.query, *e.expansions, *(passage.ids for passage in passages)):
            whole.update(np.array([len(ids), *ids], np.int32).tobytes())
        rows.append(hash_json([e.positive.text, e.query, [n.text for n in e.negatives]]))
    return whole.hexdigest(), hash_json(rows)


def made_of(triples, processes, told=None):
    """(all, older, key, cut) of the examples, their files' bytes, and how many texts were read."""
    encoder, hashes, cut, told = Encoder(), ExampleHashes(), Counter(), [] if told is None else told
    blocks = triple_blocks(triples, encoder, "query", told.append, processes, cut)
    stored = store_examples(hashes.passing(blocks))
    arrays = {name: array.tobytes() for name, array in stored._arrays.items()}
    key = triples_key(triples, "query", processes=processes)
    return (hashes.all, hashes.older, key, cut), arrays, encoder.texts


def test_examples_are_the_same_however_many_are_made_at_once(monkeypatch):
    """Also from triples that are made when they are asked for, and as older runs knew them."""
    made, told = triples(50), []
    whole = [*triple_examples([*made], Encoder(), "query")]
    alone = made_of(made, None)
    monkeypatch.setattr(packed_examples, "TRIPLES_AT_ONCE", 8)
    again = made_of(made, Processes(), told)
    assert told == [8] * 6 + [2]
    assert alone[:2] == again[:2]
    assert alone[0][:2] == hashes_of(whole)
    texts = ([(t.query,) for t in made], [t.passages for t in made], [t.expansions for t in made])
    lost = [sum(is_cut(text) for of in kind for text in of) for kind in texts]
    assert alone[0][3] == dict(zip(("queries", "documents", "expansions"), lost, strict=True))
    assert all(lost)
    assert ExampleHashes().older == hash_json([])
    assert whole[1].known == whole[47].known == {*made[1].positives, *made[47].positives}
    assert whole[9].known == {*made[9].positives}
    assert whole[1].expansions == Encoder().tokenize(made[1].expansions, "query")


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_tokens_and_all_have_what_one_makes(monkeypatch, count):
    """Each tokenized all of them."""
    monkeypatch.setattr(packed_examples, "TRIPLES_AT_ONCE", 8)
    made, given, barrier = triples(50), {}, threading.Barrier(count)
    alone, texts = made_of(made, None)[:2], made_of(made, None)[2]
    with ThreadPoolExecutor(count) as pool:
        members = [Beside(i, count, given, barrier) for i in range(count)]
        told = [[] for _ in members]
        found = [*pool.map(made_of, [made] * count, members, told)]
    assert all(one[:2] == alone for one in found)
    assert all(sum(of) == 50 for of in told)
    # Texts that two parts have are tokenized in both.
    assert max(one[2] for one in found) < 1.5 * texts / count


def test_of_examples_places_alone_are_in_memory(monkeypatch):
    """All of them, with their texts, were in the memory of every process."""
    monkeypatch.setattr(packed_examples, "TRIPLES_AT_ONCE", 100)
    peaks, counts = [], (200, 600)
    for count in counts:
        made = triples(count, words=60)
        tracemalloc.start()
        stored = store_examples(ExampleHashes().passing(triple_blocks(made, Encoder())))
        batches_of(stored).prepare()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(stored) == count
    # Tokens alone are 1,200 bytes an example as they are on disk.
    assert peaks[1] - peaks[0] < 200 * (counts[1] - counts[0])


@pytest.mark.slow
def test_workers_make_the_same_batches_and_a_killed_one_is_told():
    flags.FLAGS.mark_as_parsed()  # As they are in a program; grain has some.
    given = examples(40, 150)
    batches, me = batches_of(store_examples([pack_examples(given)])), psutil.Process()

    def workers():
        return [child for child in me.children() if "spawn_main" in " ".join(child.cmdline())]

    rows, before = np.arange(SIZE), workers()
    with made_ahead(lambda: batches, rows, 2) as make:
        for number in (3, 4, 5, 6, 20, 21, 29):  # As restarts begin: somewhere, and to the end.
            arrays, tokens = make(number)
            expected, expected_tokens = batches.batch(number)
            same_batch(arrays, expected)
            np.testing.assert_array_equal(tokens, expected_tokens)
        make(7)
        for child in {*workers()} - {*before}:
            child.kill()
        with pytest.raises(UserError, match=r"^step \d+: a process that makes batches ended"):
            list(map(make, range(8, 30)))
    assert not {*workers()} - {*before}


def draw(example, epoch, seed=0, query=5):
    return draw_passages(example, 2, seed=seed, epoch=epoch, query=query)


def test_positives_and_negatives_are_drawn_by_seed_epoch_and_query():
    example = ContrastiveExample(
        query=[1],
        expansions=[],
        positive=Passage([0], "0", 0.0),
        negatives=[Passage([i], f"n{i}", float(i)) for i in range(5)],
        other_positives=[Passage([1], "1", 1.0), Passage([2], "2", 2.0)],
    )
    assert draw(example, 3) == draw(example, 3)
    drawn = [draw(example, epoch) for epoch in range(40)]
    assert {d.positive.text for d in drawn} == {"0", "1", "2"}
    assert {n.text for d in drawn for n in d.negatives} == {f"n{i}" for i in range(5)}
    for d in drawn:
        assert str(d.positive.ids[0]) == d.positive.text
        assert d.positive.score == d.positive.ids[0]
        assert {d.positive.text, *(p.text for p in d.other_positives)} == {"0", "1", "2"}
        assert len(d.negatives) == 2
        assert d.negatives[0].score < d.negatives[1].score
    assert drawn != [draw(example, epoch, seed=1) for epoch in range(40)]
    assert drawn != [draw(example, epoch, query=6) for epoch in range(40)]
    few = dataclasses.replace(example, other_positives=[], negatives=example.negatives[:2])
    assert draw(few, 0) is few


def test_a_share_of_queries_stays_plain():
    def plain(share, seed=0):
        grid = [(step, query) for step in range(40) for query in range(25)]
        return np.array([stays_plain(share, seed=seed, step=s, query=q) for s, q in grid])

    assert not plain(0.0).any()
    assert plain(1.0).all()
    some = plain(0.3)
    assert 0.25 < some.mean() < 0.35  # Three standard deviations are 0.043.
    np.testing.assert_array_equal(some, plain(0.3))
    assert (some != plain(0.3, seed=1)).any()
    by_step = some.reshape(40, 25)
    assert (by_step[0] != by_step[1]).any()
    assert not (some & ~plain(0.5)).any()  # A larger share only adds queries.


def test_texts_are_equal_by_all_bits_of_their_hashes():
    relevant = np.array([[[1, 2], [3, 4]], [[5, 6], [5, 6]]], np.int32)
    texts = np.array([[1, 2], [1, 4], [3, 4], [6, 5], [5, 6]], np.int32)
    expected = [[True, False, True, False, False], [False, False, False, False, True]]
    np.testing.assert_array_equal(same_text(texts, relevant), expected)
    many = np.arange(40, dtype=np.int32).reshape(1, 20, 2)  # More than are unrolled.
    np.testing.assert_array_equal(same_text(many[0, ::-1], many), np.ones((1, 20), bool))
    np.testing.assert_array_equal(same_text(many[0] + 1, many), np.zeros((1, 20), bool))
