"""`train.reranker`: losses against PyTorch, exports against sentence-transformers, runs, rows."""

import io
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import torch
from rich.console import Console
from sentence_transformers import CrossEncoder as Peer
from transformers import AutoModelForSequenceClassification, ModernBertConfig

from configs import base
from eval import tiny_models
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.losses.reranking import RERANKING_LOSSES
from expandr_jax.models.cross_encoder import say_cut
from expandr_jax.objectives.reranking import RerankingBatches
from expandr_jax.weights.cross_encoder import export_cross_encoder, load_cross_encoder
from tests.cross_encoder_test import DOCUMENTS, QUERY, save
from tests.mutations_test import refused_mutations
from train.reranker import train_reranker

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
# The model that its runs begin as, and their rate and passages: it learns in seconds.
DEVIATION, RATE, EPOCHS = 0.2, 0.001, 40.0
WORDS = ["array", "gradient", "loss", "norm", "scale", "shape", "step", "count"]
OTHER = dict(zip(WORDS, WORDS[3:] + WORDS[:3], strict=True))
# All documents have the word "note", by which BM25 finds them; what they say else tells them apart.
PAIRS = [(f"note {a} {b}", f"note {OTHER[b]} {OTHER[a]}") for a in WORDS for b in WORDS if a != b]


def test_losses_are_those_of_torch_and_leave_out_what_is_not_given():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 4)).astype(np.float32)
    labels = torch.tensor(np.eye(4, dtype=np.float32)[np.zeros(6, int)])
    both = {
        "binary": torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(scores), labels, reduction="none"
        ).mean(1),
        "listwise": torch.nn.functional.cross_entropy(
            torch.tensor(scores), torch.zeros(6, dtype=torch.long), reduction="none"
        ),
    }
    for name, loss in RERANKING_LOSSES.items():
        whole = loss(scores, np.ones((6, 4), bool))
        np.testing.assert_allclose(whole, both[name], atol=1e-6)
        given = np.arange(4) < 3
        part = loss(scores, np.broadcast_to(given, (6, 4)))
        np.testing.assert_allclose(part, loss(scores[:, :3], np.ones((6, 3), bool)), atol=1e-6)
        slope = jax.grad(lambda s, loss=loss, given=given: loss(s, given[None]).sum())(scores[:1])
        assert float(slope[0, 3]) == 0
        assert float(slope[0, 0]) < 0 < float(slope[0, 1])


def test_a_batch_depends_on_step_and_query_alone():
    encoder, _ = load_cross_encoder(TINY, max_length=32, seed=0)
    triples = [Triple(q, (d,), tuple(DOCUMENTS[: 1 + i % 3])) for i, (q, d) in enumerate(PAIRS)]
    names = [str(number) for number in range(len(triples))]
    batches = RerankingBatches(triples, encoder, 8, 2, 5, names)
    arrays, contents = batches.batch(3, slice(None), lambda length: 1)
    assert arrays["ids"].shape == (8, 3, arrays["ids"].shape[2])
    for row, name in enumerate(contents.ids):
        triple, given = triples[int(name)], arrays["given"][row]
        assert given.sum() == 1 + min(2, len(triple.negatives))
        pairs = [encoder.token_ids(triple.query, [text])[0][0]
                 for text in (*triple.positives, *triple.negatives)]  # fmt: skip
        found = [ids[mask > 0].tolist() for ids, mask in
                 zip(arrays["ids"][row], arrays["mask"][row], strict=True)]  # fmt: skip
        assert found[0] == pairs[0]
        assert all(ids in pairs[1:] for ids in np.array(found, object)[given][1:])
    half, _ = batches.batch(3, slice(4, 8), lambda length: 1)
    jax.tree.map(np.testing.assert_array_equal, half, {n: a[4:] for n, a in arrays.items()})


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_pairs_that_are_cut_are_counted(tmp_path, kind):
    """Whichever of the two loses its end; what only fills a batch does not count."""
    if kind == "bert":
        save(tmp_path, "bert")
    else:
        save_modern(tmp_path, "cls")
    texts = ["norm", "norm of an array " * 2, "state of the optimizer " * 9]
    short, whole = (load_cross_encoder(str(tmp_path), max_length=n)[0] for n in (12, None))
    pairs = [(query, document) for query in texts for document in texts]
    expected = [len(whole.token_ids(q, [d])[0][0]) > 12 for q, d in pairs]
    assert 0 < sum(expected) < len(pairs)
    found = []
    for query in texts:
        short.token_ids(query, texts, found.extend)
    assert found == expected
    triples = [Triple(query, texts[:1], texts[1:2]) for query in texts]
    batches = RerankingBatches(triples, short, 3, 4, 0, texts)
    said = []
    for step in range(2):
        batches.batch(step, slice(0, 1), lambda length: 1)
    cut = 2 * sum(expected[3 * i + j] for i in range(3) for j in range(2))
    say_cut(said.append, "training", batches.cut)
    say_cut(said.append, "nothing", batches.cut)
    assert said == [
        f"training: {cut} of 12 pairs of a query and a document ({100 * cut / 12:.1f} %) are "
        "longer than is read, and lost the rest"
    ]


def test_a_training_says_what_its_pairs_lose(data, tmp_path):
    output, config = io.StringIO(), config_of(data, epochs=1 / 7, max_length=6, negatives=1)
    train_reranker(config, tmp_path / "run", Console(file=output, width=200))
    lost = r"pairs of a query and a document \(100.0 %\) are longer than is read, and lost the rest"
    assert len(re.findall(rf"reranker, on dev: 672 of 672 {lost}", output.getvalue())) == 1
    assert len(re.findall(rf"reranker, in training: 16 of 16 {lost}", output.getvalue())) == 1


def save_modern(directory, pooling):
    torch.manual_seed(0)
    config = ModernBertConfig(
        **tiny_models._MODERN, local_attention=9, num_labels=1, classifier_pooling=pooling,
        classifier_bias=True, norm_bias=True, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(directory)
    tiny_models.save_tokenizer(directory, chat=False, pad_id=0)
    return directory


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert-cls", "modernbert-mean"])
def test_scores_of_what_is_exported_are_those_of_sentence_transformers(tmp_path, kind):
    if kind.startswith("modern"):
        save_modern(tmp_path / "in", kind.partition("-")[2])
    else:
        save(tmp_path / "in", kind)
    peer = Peer(str(tmp_path / "in"), device="cpu")
    encoder, params = load_cross_encoder(str(tmp_path / "in"))
    export_cross_encoder(tmp_path / "out", encoder, params)
    back = Peer(str(tmp_path / "out"), device="cpu")
    again, same = load_cross_encoder(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    pairs = [(QUERY, document) for document in DOCUMENTS]
    for found in (encoder.scores(params, QUERY, DOCUMENTS), again.scores(same, QUERY, DOCUMENTS)):
        for other in (peer, back):
            np.testing.assert_allclose(found, other.predict(pairs), atol=2e-4)
    assert np.ptp(found) > 1e-2


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_model_without_a_head_is_given_one_by_the_seed(tmp_path, family):
    tiny_models.save(tmp_path / "in", family)
    with pytest.raises(UserError, match="tensors are missing: classifier"):
        load_cross_encoder(str(tmp_path / "in"))
    encoder, params = load_cross_encoder(str(tmp_path / "in"), seed=0)
    other, same = (load_cross_encoder(str(tmp_path / "in"), seed=s)[1] for s in (1, 0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert not np.array_equal(params["classifier"]["kernel"], other["classifier"]["kernel"])
    # BERT's pooler is in its files.
    pooled = np.array_equal(params["pooler"]["kernel"], other["pooler"]["kernel"])
    assert pooled == (family == "bert")
    assert encoder.activation == "identity"
    export_cross_encoder(tmp_path / "out", encoder, params)
    peer = Peer(str(tmp_path / "out"), device="cpu")
    pairs = [(QUERY, document) for document in DOCUMENTS]
    expected = peer.predict(pairs)
    np.testing.assert_allclose(encoder.scores(params, QUERY, DOCUMENTS), expected, atol=2e-4)


@pytest.mark.slow
def test_200_mutations_of_its_files_end_in_one_line_or_load(tmp_path):
    path = tmp_path / "out"
    encoder, params = load_cross_encoder(str(save_modern(tmp_path / "in", "cls")))
    export_cross_encoder(path, encoder, params)
    names = ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert refused_mutations(path, names, load_cross_encoder) > 100


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Triples of a run's form, and a collection in which query i's document is document i."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {"query_id": f"q{i}", "query": query, "pos": [document],
         "neg": [PAIRS[(i + n) % len(PAIRS)][1] for n in (1, 9, 17, 30)]}
        for i, (query, document) in enumerate(PAIRS)
    ]  # fmt: skip
    write_jsonl(directory / "triples.jsonl", rows)
    corpus = {f"d{i}": document for i, (_, document) in enumerate(PAIRS)}
    queries = {f"q{i}": query for i, (query, _) in enumerate(PAIRS)}
    judged = {f"q{i}": {f"d{i}": 1} for i in range(len(PAIRS))}
    splits = {"dev": dict([*judged.items()][:12]), "test": dict([*judged.items()][12:])}
    write_beir(directory / "set", Collection("set", corpus, queries, splits))
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    save(directory / "model", "bert", initializer_range=DEVIATION, sentence_transformers=identity)
    return directory


def config_of(data, **settings):
    config = base.get_config()
    config.data.kind, config.data.path = "triples", str(data / "triples.jsonl")
    config.data.dev = str(data / "set")
    config.retriever.source, config.reranker.source = TINY, str(data / "model")
    config.evaluation.rerank.update(depth=56, max_length=32, rows=56)
    config.reranker.update(
        {"max_length": 32, "batch_size": 8, "epochs": EPOCHS, "learning_rate": RATE, "negatives": 3,
         "eval_every": 60, "save_every": 20, **settings}
    )  # fmt: skip
    return config


def test_files_without_negatives_and_too_few_queries_are_refused(data, tmp_path):
    write_jsonl(tmp_path / "triples.jsonl", [{"query": "a", "pos": ["b"]}])
    config = config_of(data)
    config.data.path = str(tmp_path / "triples.jsonl")
    with pytest.raises(UserError, match="no training query has a negative; those that a run mined"):
        train_reranker(config, tmp_path / "one", Console(quiet=True))
    with pytest.raises(UserError, match="56 training queries do not fill one batch of 64; low"):
        train_reranker(config_of(data, batch_size=64), tmp_path / "two", Console(quiet=True))
    config = config_of(data)
    config.reranker.source = ""
    with pytest.raises(UserError, match=r"reranker\.source is ''; expected the model that"):
        train_reranker(config, tmp_path / "three", Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("loss", RERANKING_LOSSES)
def test_it_learns_what_words_do_not_say_and_its_rows_rank_by_it(data, tmp_path, loss):
    """The same settings give the same weights."""
    run, again = tmp_path / "run", tmp_path / "again"
    train_reranker(config_of(data, loss=loss), run, Console(quiet=True))
    rows = [json.loads(line) for line in
            (run / "work/round-0/reranker-dev.jsonl").read_text().splitlines()]  # fmt: skip
    values = [row["ndcg@10"] for row in rows]
    assert max(values) > values[0] + 0.2, values
    if loss == "listwise":
        train_reranker(config_of(data, loss=loss), again, Console(quiet=True))
        both = [place / "export/reranker/model.safetensors" for place in (run, again)]
        assert both[0].read_bytes() == both[1].read_bytes()
    config = config_of(data)
    config.evaluation.rerank.update(source=str(run / "export/reranker"), depths=(5, 56))
    names = ["bm25", "rerank:bm25", "interpolation:bm25:rerank:bm25"]
    found = evaluate_beir(
        config, tmp_path / "out", [str(data / "set")], names, "test", Console(quiet=True)
    )["set"]
    assert found["chosen"]["rerank:bm25"]["depth"] in (5, 56)
    assert len(found["chosen"]["interpolation:bm25:rerank:bm25"]["weights"]) == 2
    by_name = {row["system"]: row["ndcg@10"] for row in found["rows"]}
    assert by_name["rerank:bm25"] > by_name["bm25"] + 0.1, by_name
    peer = Peer(str(run / "export/reranker"), device="cpu")
    before, after = (metrics.read_trec(tmp_path / f"out/runs/{n}.trec") for n in names[:2])
    depth, texts = found["chosen"]["rerank:bm25"]["depth"], dict(PAIRS)
    for query, (text, _) in list(zip(before, PAIRS[12:], strict=True))[:5]:
        first = list(before[query])[:depth]
        expected = peer.predict([(text, list(texts.values())[int(d[1:])]) for d in first])
        found = [after[query][document] for document in first]
        assert found == pytest.approx(expected.tolist(), abs=2e-4)
