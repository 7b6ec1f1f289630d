"""Live documents: at every moment they are those of an index built anew, whatever was killed."""

import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from expandr_jax.errors import UserError
from expandr_jax.search import build_index, scann
from expandr_jax.serving.documents import LiveDocuments
from expandr_jax.serving.log import Log
from expandr_jax.serving.snapshots import Base, read_current
from expandr_jax.serving.state import take
from expandr_jax.vectors.stored import from_storage, to_storage
from tests.commands import ROOT
from tests.serving_writer import encode, open_state

RUN = {f"run-{i}": f"document {i} of the run" for i in range(50)}


def live(state, dtype="float32", **options) -> LiveDocuments:
    vectors = from_storage(to_storage(encode(list(RUN.values())), dtype))
    return LiveDocuments(state, "key", Base.of(RUN, vectors), encode, dtype, **options)


def check(documents: LiveDocuments, expected: dict[str, str], dtype: str = "float32") -> None:
    """Compares with an index built anew of what there should be, in its order."""
    assert len(documents) == len(expected)
    queries = encode(["document 3", "something else", "new 7"])
    ids, k = list(expected), 7
    if not expected:
        assert documents.search(queries, k) == [[], [], []]
        return
    vectors = np.asarray(from_storage(to_storage(encode(list(expected.values())), dtype)))
    products = queries.astype(np.float64) @ vectors.T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(products, rows, axis=1)
    for hits, values, places in zip(documents.search(queries, k), scores, rows, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], values, rtol=1e-5, atol=1e-6)
        # Those that tie to rounding may stand in either order.
        gaps = np.abs(np.diff(values, append=-9)) > 1e-5
        for hit, place, gap in zip(hits, places, gaps, strict=True):
            if gap and len({h.id for h in hits if abs(h.score - hit.score) < 1e-5}) == 1:
                assert hit.id == ids[place]
        assert all(expected[hit.id] == hit.text for hit in hits)
        assert len({hit.id for hit in hits}) == len(hits)


def change(documents: LiveDocuments, expected: dict[str, str], drawn: random.Random) -> None:
    """One write, to both."""
    if drawn.random() < 0.3 and expected:
        names = drawn.sample(list(expected), min(3, len(expected)))
        there = documents.remove([*names, "absent"])
        assert there == len(names)
        for name in names:
            del expected[name]
        return
    names = {drawn.choice([f"run-{drawn.randrange(50)}", f"new-{drawn.randrange(40)}"])
             for _ in range(drawn.randrange(1, 5))}  # fmt: skip
    new = {name: f"text {drawn.randrange(1000)} of {name}" for name in names}
    assert documents.put(list(new.items())) == len(names & expected.keys())
    for name in names:  # What is replaced counts as new.
        expected.pop(name, None)
    expected.update(new)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_they_are_those_of_an_index_built_anew_at_every_moment(tmp_path, dtype):
    drawn, expected = random.Random(0), dict(RUN)
    documents = live(tmp_path, dtype, merge_from=10**9)
    for step in range(40):
        change(documents, expected, drawn)
        if step % 16 == 9:
            documents.merge()
        if step % 16 == 13:  # Another start finds the same.
            documents.close()
            documents = live(tmp_path, dtype, merge_from=10**9)
        check(documents, expected, dtype)
    for name in expected:
        assert documents.get(name) == expected[name]
    assert documents.get("absent") is None


def test_writes_during_a_merge_count(tmp_path, monkeypatch):
    drawn, expected = random.Random(1), dict(RUN)
    documents = live(tmp_path, merge_from=10**9)
    for _ in range(10):
        change(documents, expected, drawn)
    began, goes_on = threading.Event(), threading.Event()
    opened = documents._open_base

    def slow(number):
        began.set()
        assert goes_on.wait(10)
        return opened(number)

    monkeypatch.setattr(documents, "_open_base", slow)
    merge = threading.Thread(target=documents.merge)
    merge.start()
    assert began.wait(10)
    for _ in range(20):
        change(documents, expected, drawn)
        check(documents, expected)
    goes_on.set()
    merge.join()
    check(documents, expected)
    documents.close()
    check(live(tmp_path), expected)
    # All that is old is gone.
    assert sorted(path.name for path in tmp_path.glob("snapshot-*")) == ["snapshot-1"]


def test_many_writes_are_merged_in_the_background(tmp_path):
    documents, expected = live(tmp_path, merge_from=20), dict(RUN)
    for number in range(60):
        documents.put([(f"new-{number}", f"text {number}")])
        expected[f"new-{number}"] = f"text {number}"
    documents.close()
    assert (tmp_path / "current.json").read_text().count('"snapshot": 0') == 0
    check(live(tmp_path), expected)


def test_all_may_be_removed_and_others_added(tmp_path):
    documents = live(tmp_path, merge_from=3)
    documents.remove(list(RUN))
    check(documents, {})
    documents.put([("a", "text")])
    documents.close()
    check(live(tmp_path), {"a": "text"})


@pytest.mark.skipif(not scann.installed(), reason="ScaNN is not installed")
def test_what_an_approximate_index_finds_is_alive_before_and_after_a_merge(tmp_path):
    corpus = {f"run-{i}": f"document {i}" for i in range(300)}

    def index(vectors, _=None):
        return build_index(np.asarray(vectors), "scann", method="ah", ah_iterations=2)

    vectors = encode(list(corpus.values()))
    base = Base.of(corpus, vectors, index(vectors))
    documents = LiveDocuments(tmp_path, "key", base, encode, index=index)
    gone = random.Random(0).sample(list(corpus), 200)
    documents.remove(gone)
    documents.put([("new", "document 7")])
    for _ in range(2):
        (hits,) = documents.search(encode(["document 7"]), 40)
        found = [hit.id for hit in hits]
        assert len(set(found)) == 40
        assert not set(found) & set(gone)
        assert "new" in found[:2]
        left = {name: text for name, text in corpus.items() if name not in gone}
        scores = encode(list(left.values())) @ encode(["document 7"])[0]
        best = {list(left)[i] for i in np.argsort(-scores)[:39]}
        assert len(best & set(found)) > 35
        documents.merge()
        assert documents.view.base.index is not None


def test_results_can_be_limited_to_ids(tmp_path):
    documents = live(tmp_path)
    documents.put([("new", "document 3 anew"), ("run-4", "replaced")])
    documents.remove(["run-5"])
    query = encode(["document 3", "document 3"])
    limited, every = documents.search(query, 50, [("run-5", "new", "run-4", "run-9", "no"), None])
    assert len(every) == 50
    ranks = [hit for hit in every if hit.id in ("new", "run-4", "run-9")]
    assert [hit.id for hit in limited] == [hit.id for hit in ranks]


def test_a_write_with_an_id_twice_changes_nothing(tmp_path):
    documents = live(tmp_path)
    with pytest.raises(UserError, match="twice"):
        documents.put([("a", "x"), ("a", "y")])
    check(documents, RUN)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    documents = live(tmp_path)
    documents.put([("a", "x")])
    sync = os.fsync

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        documents.put([("b", "y")])
    monkeypatch.setattr(os, "fsync", sync)
    documents.put([("c", "z")])
    documents.close()
    check(live(tmp_path), RUN | {"a": "x", "c": "z"})


def test_a_torn_end_is_cut_off_wherever_it_is_torn(tmp_path):
    log = Log(tmp_path)
    for number in range(3):
        log.append(b"content %d" % number)
    log.close()
    path = log.path(1)
    whole = path.read_bytes()
    record = (len(whole) - 14) // 3
    for size in range(len(whole) - record, len(whole)):
        for tail in (b"", bytes(30)):  # Cut, or empty where it should be.
            path.write_bytes(whole[:size] + tail)
            if tail and whole[size:].strip(b"\0") and size > len(whole) - record:
                continue  # Half a header before zeros is damage that no kill leaves.
            again = Log(tmp_path)
            assert list(again) == [b"content 0", b"content 1"]
            again.append(b"another")
            again.close()
            assert list(Log(tmp_path))[-1] == b"another"


def test_other_damage_is_told_and_nothing_is_cut(tmp_path):
    log = Log(tmp_path)
    for number in range(3):
        log.append(b"content %d" % number)
    log.close()
    whole = log.path(1).read_bytes()
    for place in range(len(whole) - 2 * ((len(whole) - 14) // 3)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        log.path(1).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged at byte"):
            Log(tmp_path)
        assert log.path(1).read_bytes() == damaged


def test_two_servers_on_one_state_are_refused(tmp_path):
    with take(tmp_path), pytest.raises(UserError, match="another server has this state"):
        take(tmp_path)
    take(tmp_path).close()


def test_a_state_of_another_run_is_refused(tmp_path):
    live(tmp_path).close()
    with pytest.raises(UserError, match="of another run"):
        LiveDocuments(tmp_path, "other", Base.of(RUN, encode(list(RUN.values()))), encode)
    (tmp_path / "current.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        live(tmp_path)


def kill_while_writing(state, seed: int, known: dict[str, str]) -> None:
    """Kills a writer at a random instant, and checks what it acknowledged."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.serving_writer", str(state), str(seed)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert writer.stdout.readline() == "begins\n"
    timer = threading.Timer(
        random.Random(seed).uniform(0.0, 0.25), writer.send_signal, [signal.SIGKILL]
    )
    timer.start()
    told = writer.stdout.read().split("\n")[:-1]  # The last line may be half.
    writer.wait()
    documents = open_state(state)
    present = dict(documents.view.alive())
    assert len(present) == len(documents) == len(list(documents.view.alive()))  # None twice.
    done = [line.split() for line in told]
    for name in dict.fromkeys(name for name, _ in done):
        known[name] = [what for other, what in done if other == name][-1]
    # Of the write that was under way, all or nothing; it is not known which.
    unsure = {name for name in known if known[name] != present.get(name, "-")}
    assert len({name.split(":")[0] for name in unsure}) <= 1, unsure
    for batch in range(20):
        texts = {present.get(f"b{batch}:{i}", "-") for i in range(3)}
        assert len(texts) == 1, texts  # None half.
    known.update({name: present.get(name, "-") for name in unsure})
    hits = documents.search(encode(["x"]), len(present) + 1)[0]
    assert {hit.id: hit.text for hit in hits} == present
    documents.close()


def test_no_acknowledged_write_is_lost_by_kills(tmp_path):
    known: dict[str, str] = {}
    for seed in range(2):
        kill_while_writing(tmp_path, seed, known)
    assert known


@pytest.mark.slow
def test_no_acknowledged_write_is_lost_by_fifty_kills(tmp_path):
    known: dict[str, str] = {}
    for seed in range(50):
        kill_while_writing(tmp_path, 100 + seed, known)
    assert len(known) == 60  # Each document was written, and acknowledged, before some kill.
    now = read_current(tmp_path, "key")
    assert 0 < now.snapshot < now.segment - 1  # Merges ended, and others were begun and killed.
