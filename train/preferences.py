"""From sampled candidates to preference pairs: self-answers, rewards, the filter, the pairs."""

import collections
import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled, requests_of
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.expansion.sampled import MadeWhenAsked, SampledTexts, sample_texts
from expandr_jax.files.records import open_jsonl
from expandr_jax.generation.sampler import Sampler
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.reward_sft import read_groups
from expandr_jax.rewards.evidence import evidence_of
from expandr_jax.rewards.functions import RewardFunction, load_functions
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import RewardSettings, needs, reward_groups
from expandr_jax.rewards.search import queries_at_once
from expandr_jax.rewards.selection import REASONS, best_alone, select_pairs
from expandr_jax.rewards.settings import AnswerSettings, CandidatesSettings
from expandr_jax.runtime.code import keep_code
from expandr_jax.runtime.host_memory import trim_memory
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.encoder import Kind, Progress
from train.scores import RewardTools, reward_context

CANDIDATES = "candidates.jsonl"  # A round's texts with their rewards.
ANSWER = -1  # Stands for a query's answer, where its candidates count from 0.


def run_functions(run: Run, used: bool) -> tuple[RewardFunction, ...]:
    """The functions of `reward.functions`, imported, whose code config.json tells ever after.

    Those of a run that has `used` them stay as they were; others may be mended after they failed.
    All processes call it together.
    """
    functions = load_functions(run.config.reward.functions)
    hashes = {function.module: function.sha256 for function in functions}
    replace = run.processes.is_main and not used
    run.processes.main_first(lambda: keep_code(run.path("config.json"), hashes, replace))
    return functions


def best_groups(
    run: Run,
    generator: Generator,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    place: str,
    tools: RewardTools,
) -> tuple[list[Group], int]:
    """The groups of `make_preferences` that have a text worth more than 0, with their best alone.

    Returns:
        They, and how many groups there are.
    """
    make_preferences(run, generator, expander, None, retriever, data, place, tools)
    path, config = run.path(place, CANDIDATES), run.config
    groups, _ = read_groups(path, generator, config.dpo, config.expansion, own=True)
    return [group for group in map(best_alone, groups) if group], len(groups)


def make_preferences(
    run: Run,
    generator: Generator,
    expander: Expander,
    adapter: Any | None,
    retriever: CorpusRetriever,
    data: TrainingData,
    place: str,
    tools: RewardTools,
) -> None:
    """Writes candidates.jsonl and preferences.jsonl to a place in the workdir, as "round-0"."""
    what, files = _named(place), [f"{place}/{name}" for name in (CANDIDATES, "preferences.jsonl")]
    candidates_path, path = (run.path(name) for name in files)
    if run.checksums.intact(*files):
        return
    corpus = retriever.corpus  # All processes encode it, as a phase of its own.
    with run.phase(f"candidates, {what}"):
        own, directory = run.config.candidates, run.path("work", place)
        prompts, candidates = _sample_candidates(expander, adapter, data, own, directory)
    with run.phase(f"self-answers, {what}"):
        answers = self_answers(expander.sampler, adapter, data, run.config.answer, directory)
    with run.phase(f"rewards, {what}"):
        temperatures = run.config.candidates.all_temperatures

        def group(query: str) -> Group:
            return Group(
                query,
                data.collection.queries[query],
                data.positive(query),
                answers[query],
                sampled_candidates(candidates, query, temperatures, run.config.reward),
                generator.chat_text(prompts[query]),
            )

        def read(key: tuple[str, int]) -> str:
            return answers[key[0]] if key[1] == ANSWER else candidates[key]

        ids, kind = [q for q in data.generator_train if q in answers], run.config.expansion.kind
        size = queries_at_once(len(temperatures))
        most = run.config.candidates.max_new_tokens
        context = reward_context(run.config, tools, data, corpus, ids, size, most)
        # Others' prompts are given by the query alone.
        shows_more = not expander.strategy.asks[-1].prompt.of_query_alone
        texts, dropped, made = 1 + len(temperatures), collections.Counter(), 0

        def judge(block: Sequence[str], vectors: Any, write_groups: Any, write_pairs: Any) -> int:
            evidence = evidence_of(context, [*map(group, block)], *vectors)
            rewarded = reward_groups(evidence, f"rewards, {what}")
            write_groups(each.to_row(shows_more) for each in rewarded)
            pairs, lacking = select_pairs(rewarded, run.config.reward.threshold)
            write_pairs(pairs)
            dropped.update(lacking)
            return len(pairs)

        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(
                run.reporter.progress("rewards: texts encoded", len(ids) * (1 + texts))
            )
            if run.processes.is_main:
                write_groups = stack.enter_context(open_jsonl(candidates_path))
                write_pairs = stack.enter_context(open_jsonl(path))
            for first in range(0, len(ids), size):
                block = ids[first : first + size]
                vectors = _encode(retriever, data, block, len(temperatures), read, kind, advance)
                if not run.processes.is_main:
                    continue
                made += judge(block, vectors, write_groups, write_pairs)
                del vectors  # The next block's come before these would be let go.
                trim_memory()  # A block's texts leave gaps, of which another one fills a part.
        counts = ", ".join(f"{dropped[reason]} {reason}" for reason in REASONS)
        said = f"{made} pairs of {len(ids)} queries; dropped: {counts}"
        run.processes.once(lambda: run.reporter.say(said))
        retriever.release()
        run.checksums.record(*files)


def sampled_candidates(
    texts: SampledTexts, query: str, temperatures: Sequence[float], reward: RewardSettings
) -> list[Candidate]:
    """A query's texts, one sampled at each temperature."""
    made, lengths = [], needs(reward, "lengths")
    for i, temperature in enumerate(temperatures):
        # A row is read once more for what few rewards look at.
        row = texts.row((query, i)) if lengths else {}
        known = {"length": row["tokens"], "finished": row["finished"]} if row else {}
        made.append(Candidate(texts[query, i], temperature, **known))
    return made


def _sample_candidates(
    expander: Expander,
    adapter: Any,
    data: TrainingData,
    settings: CandidatesSettings,
    directory: pathlib.Path,
) -> tuple[Mapping[str, str], SampledTexts]:
    """Query id -> the message that it asks, and (query id, candidate) -> text.

    Where prompts with examples ask for the texts, the message is still the one without. The texts
    are kept in a directory that is called as the round is.
    """
    queries = {query: data.collection.queries[query] for query in data.generator_train}
    path, purpose = directory / "candidates.jsonl", f"candidates, {_named(directory.name)}"
    messages = expander.messages(queries, journaled(expander, adapter, path, purpose))
    requests = requests_of(settings, messages, settings.all_temperatures)
    requests = expander.shown(queries, requests)
    texts = sample_texts(expander.sampler, adapter, requests, path=path, purpose=purpose)
    return messages, texts


def _named(place: str) -> str:
    """A place in the workdir, as "round-0", in words."""
    return place.replace("-", " ")


def self_answers(
    sampler: Sampler,
    adapter: Any,
    data: TrainingData,
    settings: AnswerSettings,
    directory: pathlib.Path,
) -> Mapping[str, str]:
    """Query id -> answer; an empty one is tried once more, then its query is left out.

    The texts are kept in a directory that is called as the round is.

    Raises:
        UserError: All are empty.
    """
    what, tries = _named(directory.name), []
    answered: dict[str, int] = {}  # Query id -> the try.

    def message(query: str) -> str:
        document = data.collection.corpus[data.positive(query)][: settings.max_characters]
        return PROMPTS["q2a"].message(data.collection.queries[query], document=document)

    for attempt in range(2):
        missing = {query: None for query in data.generator_train if query not in answered}
        if not missing:
            break
        asked = MadeWhenAsked(missing, message)
        requests = requests_of(settings, asked, [settings.temperature], first=attempt)
        path, purpose = directory / f"answers-{attempt}.jsonl", f"answers, {what}, try {attempt}"
        tries.append(sample_texts(sampler, adapter, requests, path=path, purpose=purpose))
        answered |= {query: attempt for (query, _), text in tries[-1].items() if text}
    if not answered:
        raise UserError(
            f"{what}: the generator left every self-answer empty, twice; no query is left "
            "to learn from. Look at the model and at the section answer of the config"
        )
    return MadeWhenAsked(answered, lambda query: tries[answered[query]][query, answered[query]])


def _encode(
    retriever: CorpusRetriever,
    data: TrainingData,
    queries: Sequence[str],
    candidates: int,
    read: Callable[[tuple[str, int]], str],
    kind: Kind,
    advance: Progress,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of some queries, of their candidates and of their answers, these two of a kind.

    All processes call it together, each of which reads the texts that it encodes.
    """
    keys = [(query, i) for query in queries for i in range(candidates)]
    keys += [(query, ANSWER) for query in queries]
    names = [f"{'answer to' if i == ANSWER else 'candidates of'} {query}" for query, i in keys]
    documents = retriever.encode(ReadWhenSliced(keys, read), kind, names, advance)
    names = [f"query {query}" for query in queries]
    encoded = retriever.encode(data.queries(queries), "query", names, advance)
    return encoded, documents[: -len(queries)], documents[-len(queries) :]


class ReadWhenSliced(Sequence):
    """Texts by their keys, of which those are read that a slice of them has."""

    def __init__(self, keys: Sequence[Any], read: Callable[[Any], str]):
        self._keys, self._read = keys, read

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._read(key) for key in self._keys[place]]
        return self._read(self._keys[place])
