"""What a run says of the texts that it has sampled."""

import dataclasses
import io
import json
import types

import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion import sampled as expansion
from expandr_jax.expansion.expand import make_expander, requests_of
from expandr_jax.expansion.sampled import MadeWhenAsked
from expandr_jax.files.records import Journal
from expandr_jax.generation.requests import Completion, Extent, Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.loading import load_generator_model, make_sampler
from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import QUIET
from expandr_jax.runtime.run import Run
from train.expansions import training_expansions

# (query, sample): (text, tokens, how it ended, draws near a boundary).
TEXTS = {
    ("q0", 0): ("Returns the sum of the elements over the given axis.", 3, "eos", 0),
    ("q0", 1): ("the array is the array is " * 6, 50, "length", 2),
    ("q1", 0): ("", 1, "eos", 1),
    ("q1", 1): (" \n", 2, "stop", 0),
    ("q2", 0): ("A norm", 7, "length", 4),
    ("q2", 1): ("", 0, "refused", 0),
}
LINE = (
    "6 texts, 63 tokens; 2 cut by length, 3 empty (1 of them refused), 1 repetitive; 7 draws near "
    "a decision boundary"
)


def sampler_of(run, models):
    return make_sampler(models, run.config, run.processes, run.reporter, run.path("work"))


class Engine:
    """Has its texts already."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            text, tokens, finished, near = TEXTS[request.id.removeprefix("test/"), request.sample]
            first = 0 if near else None
            yield Completion(request.id, request.sample, (9,) * tokens, finished, near, first, text)


def test_filters_and_penalty_of_a_prompt_reach_the_engine(tmp_path):
    config = read_config(smoke.get_config())
    models = load_generator_model(config)
    run = Run(tmp_path / "run", config, Console(quiet=True))
    sampler = sampler_of(run, models)

    def texts(name, **settings):
        settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 16, **settings}
        requests = [Request(f"q{i}", 0, f"shape {i}?", **settings) for i in range(6)]
        path = run.path("work", f"{name}.jsonl")
        return expansion.sample_texts(sampler, None, requests, path=path, purpose="test")

    greedy = texts("greedy", temperature=0.0)
    assert texts("plain") != greedy
    assert texts("top k", top_k=1) == texts("min p", min_p=1.0) == greedy
    assert texts("penalty", temperature=0.0, repetition_penalty=3.0) != greedy
    run.close()


@pytest.mark.parametrize(("new", "said"), [(246, False), (247, True)])
def test_texts_longer_than_the_model_was_made_for_are_said(tmp_path, new, said):
    config = read_config(smoke.get_config())
    models = load_generator_model(config)
    assert models.generator.module.config.max_positions == 256
    output = io.StringIO()
    run = Run(tmp_path / "run", config, Console(file=output, width=200))
    prompts = [(5, 6, i, *(7,) * 7) for i in range(2)]
    extent = Extent.of(Request("q", 0, p, 1.0, 1.0, new) for p in prompts)
    sampler_of(run, models).engine(None, extent)
    line = "prompts and texts may have 257 tokens together; the generator was made for 256"
    assert (line in output.getvalue()) == said
    run.close()


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Samples TEXTS, and returns them with what was printed and how many the engine was asked."""
    engine = Engine()
    monkeypatch.setattr(Sampler, "engine", lambda *_: engine)
    models = types.SimpleNamespace(
        generator=types.SimpleNamespace(
            chat_ids=lambda text, limit: ([1, 2], False), opens_thought=False
        ),
        sampling_params=None,
        generator_hash="",
        generator_params=None,
        sampling_mesh=None,
    )
    output = io.StringIO()
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=output, width=200))

    def sample():
        requests = [Request(*key, "text", 1.0, 1.0, 50) for key in TEXTS]
        path = run.path("work", "texts.jsonl")
        sampler = sampler_of(run, models)
        texts = expansion.sample_texts(sampler, None, requests, path=path, purpose="test")
        return texts, output.getvalue(), len(engine.asked)

    yield sample
    run.close()


def test_cut_empty_and_repetitive_texts_and_near_ties_are_counted(sample, monkeypatch):
    texts, output, asked = sample()
    assert texts == {key: text.strip() for key, (text, *_) in TEXTS.items()}
    assert output.count(LINE) == 1
    assert asked == len(TEXTS)
    # A restart finds the texts and says the same of them, which it does not read for that.
    monkeypatch.setattr(expansion, "is_repetitive", None)
    again, output, asked = sample()
    assert again == texts
    assert output.count(LINE) == 2
    assert asked == len(TEXTS)


def test_what_was_counted_is_of_these_texts(sample, tmp_path, monkeypatch):
    """Other texts, and those of a damaged file, are counted again."""
    texts = dict(sample()[0])
    work = tmp_path / "run" / "work"
    path = work / "texts.jsonl.counts.json"
    before = path.read_text()
    for damaged in (before[:-9], "[]", "{}", before.replace('"key": "', '"key": "0')):
        path.write_text(damaged)
        sample()
        assert path.read_text() == before
    (work / "texts.jsonl").unlink()
    monkeypatch.setitem(TEXTS, ("q0", 0), ("Returns nothing.", 2, "stop", 0))
    assert sample()[0] != texts
    assert path.read_text() != before


def test_expansions_are_written_again_only_of_other_texts(tmp_path, monkeypatch):
    written = {}

    class Writer:
        def generate(self, requests):
            for r in requests:
                text = written.setdefault(r.id, f"of {r.id}")
                yield Completion(r.id, r.sample, (9,), "eos", 0, None, text)

    monkeypatch.setattr(Sampler, "engine", lambda *_: Writer())
    config = read_config(smoke.get_config())
    run = Run(tmp_path / "run", config, Console(file=io.StringIO()))
    generator = types.SimpleNamespace(
        chat_ids=lambda text, limit: ([1, 2], False), opens_thought=False
    )
    names = "sampling_params", "generator_params", "sampling_mesh"
    models = types.SimpleNamespace(generator=generator, generator_hash="", **dict.fromkeys(names))
    expander = make_expander(
        config.expansion, sampler_of(run, models), {}, None, None,
        most_characters=100, drop_identical_ids=False,
    )  # fmt: skip
    queries = {f"q{i}": f"query {i}" for i in range(3)}
    data = TrainingData(Collection("set", {}, queries, {}), [*queries], [])
    path = run.path("round-0", "expansions.jsonl")

    def made():
        texts = training_expansions(run, data, expander, None, 0)
        rows = [json.loads(line)["expansion"] for line in path.read_text().splitlines()]
        assert rows == [text for query in queries for text in texts[query]]
        return path.stat().st_ino, path.stat().st_mtime_ns, {q: texts[q] for q in queries}

    first = made()
    assert made() == first  # The file was not touched.
    path.write_text(path.read_text()[:-9])
    assert made()[2] == first[2]
    run.path("work", "round-0", "expansions.jsonl").unlink()
    written.update((name, f"another {text}") for name, text in [*written.items()])
    assert made()[2] != first[2]
    run.close()


def test_thoughts_that_the_template_begins_are_no_texts(tmp_path, monkeypatch):
    """DeepSeek-R1's template ends with the mark, so that its texts do not have it."""
    models = load_generator_model(read_config(smoke.get_config()))
    tokenizer = models.generator.tokenizer
    assert not models.generator.opens_thought
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "<think>\n")
    models = dataclasses.replace(models, generator=dataclasses.replace(models.generator))
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(quiet=True))
    answers = {"q0": "They ask for tides.", "q1": "Tides?\n</think>\n\nThe Moon."}
    done = [Completion(f"test/{q}", 0, (9,), "length", 0, None, t) for q, t in answers.items()]
    monkeypatch.setattr(
        Sampler, "engine", lambda *_: types.SimpleNamespace(generate=lambda _: iter(done))
    )
    requests = [Request(q, 0, "text", 1.0, 1.0, 50) for q in answers]
    path = run.path("work", "texts.jsonl")
    for marked in (True, False):
        texts = expansion.sample_texts(
            sampler_of(run, models), None, requests, path=path, purpose="test"
        )
        assert texts == {("q0", 0): "", ("q1", 0): "The Moon."}
        rows = [*Journal(path).rows]
        assert all(row["text"].startswith("<think>") == marked for row in rows)
        path.unlink()  # Older versions did not write the mark.
        Journal(path).append([{**r, "text": r["text"].removeprefix("<think>")} for r in rows])
    run.close()


class Lazy:
    """An engine of two slots, which reads a request when one of them is free."""

    def generate(self, requests):
        running = []
        for request in requests:
            running.append(request)
            if len(running) == 2:
                yield self.completion(running.pop(0))
        yield from map(self.completion, running)

    def completion(self, request):
        text = f"{request.id} {request.sample} {request.prompt}"
        return Completion(request.id, request.sample, (9,), "eos", 0, None, text)


@pytest.mark.parametrize("count", [1, 3])
def test_a_process_asks_for_its_own_queries_each_prompt_when_its_turn_comes(
    tmp_path, monkeypatch, count
):
    """Once to see how long prompts are, once to run them, whatever number of samples they have."""
    monkeypatch.setattr(Sampler, "engine", lambda self, adapter, extent: Lazy())
    monkeypatch.setattr(expansion, "COMPLETIONS_PER_WRITE", 4)
    texts, written = {}, []
    queries = [f"q{i}" for i in range(9)]
    for index in range(count):
        turned = []

        def chat_ids(text, limit, turned=turned):
            turned.append(text)
            return [ord(c) for c in text], False

        member = Processes(index, count)
        member.gather = lambda value: [value]
        member.barrier = lambda: None
        member.main_first = lambda function: function()
        sampler = dataclasses.replace(
            sampler_of_tiny(tmp_path, chat_ids), processes=member, reporter=QUIET
        )
        requests = requests_of(
            read_config(smoke.get_config()).expansion,
            MadeWhenAsked(dict.fromkeys(queries), lambda query: f"ask {query}"),
            [1.0] * 5,
        )
        real = DividedJournal.append

        def append(self, rows, real=real, turned=turned):
            written.append(len(turned))
            real(self, rows)

        path = tmp_path / str(index) / "texts.jsonl"  # As if it were another machine's.
        with monkeypatch.context() as patch:
            patch.setattr(DividedJournal, "append", append)
            patch.setattr(DividedJournal, "_close", lambda self, counts: self._own)
            patch.setattr(DividedJournal, "_remove_parts", lambda self: None)
            rows = expansion.sample_journal(sampler, None, requests, path=path, purpose="p")
        texts |= expansion.SampledTexts(rows, strip=True)
        own = [f"ask {query}" for query in queries[index::count]]
        assert turned == own + own
    # When the first texts were written, one or two of the prompts had had their turn.
    assert written[0] <= len(queries[::count]) + 2
    assert sorted(texts) == [(query, i) for query in queries for i in range(5)]
    assert texts["q7", 3].startswith("p/q7 3 (97, 115, 107")


def sampler_of_tiny(path, chat_ids):
    generator = types.SimpleNamespace(chat_ids=chat_ids, opens_thought=False)
    settings = read_config(smoke.get_config()).generator
    return Sampler(generator, None, "", None, settings, 0, Processes(), QUIET)


def test_what_is_done_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "engine", lambda self, adapter, extent: Lazy())
    sampler = sampler_of_tiny(tmp_path, lambda text, limit: ([1, 2], False))
    settings = read_config(smoke.get_config()).expansion
    made = []

    def message(query):
        made.append(query)
        return query

    requests = requests_of(
        settings, MadeWhenAsked(dict.fromkeys("abc"), message), [1.0, 1.0], first=3
    )
    journal = DividedJournal(tmp_path / "texts.jsonl", Processes(), lambda row: None)
    row = {"text": "before", "tokens": 1, "finished": "eos", "near_ties": 0}
    done = [("a", 3), ("a", 4), ("b", 4)]
    journal.append({"query_id": query, "sample": sample, **row} for query, sample in done)
    texts = expansion.sample_texts(
        sampler, None, requests, path=tmp_path / "texts.jsonl", purpose="p"
    )
    assert made == ["a", "b", "c", "b", "c"]  # All are measured; what is done is not run.
    assert texts == {
        ("a", 3): "before", ("a", 4): "before", ("b", 3): "p/b 3 (1, 2)", ("b", 4): "before",
        ("c", 3): "p/c 3 (1, 2)", ("c", 4): "p/c 4 (1, 2)",
    }  # fmt: skip
