"""A round's candidates and self-answers: sampled, and rewarded some queries at a time."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled, requests_of
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.expansion.sampled import MadeWhenAsked, SampledTexts, sample_texts
from expandr_jax.generation.sampler import Sampler
from expandr_jax.rewards.evidence import RewardContext, evidence_of
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import RewardSettings, needs, reward_groups
from expandr_jax.rewards.settings import AnswerSettings, CandidatesSettings
from expandr_jax.runtime.host_memory import trim_memory
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.encoder import Kind, Progress

ANSWER = -1  # Stands for a query's answer, where its candidates count from 0.


def sample_candidates(
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
    path, purpose = directory / "candidates.jsonl", f"candidates, {in_words(directory.name)}"
    messages = expander.messages(queries, journaled(expander, adapter, path, purpose))
    requests = requests_of(settings, messages, settings.all_temperatures)
    requests = expander.shown(queries, requests)
    texts = sample_texts(expander.sampler, adapter, requests, path=path, purpose=purpose)
    return messages, texts


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
    what, tries = in_words(directory.name), []
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


def in_words(directory: str) -> str:
    """The name of a round's directory, as "round-0", in words."""
    return directory.replace("-", " ")


def sampled_candidates(
    texts: SampledTexts, query: str, temperatures: Sequence[float], reward: RewardSettings
) -> list[Candidate]:
    """A query's texts, one sampled at each temperature; with their lengths if a reward looks."""
    made, lengths = [], needs(reward, "lengths")
    for i, temperature in enumerate(temperatures):
        # A row is read once more for what few rewards look at.
        row = texts.row((query, i)) if lengths else {}
        known = {"length": row["tokens"], "finished": row["finished"]} if row else {}
        made.append(Candidate(texts[query, i], temperature, **known))
    return made


@dataclasses.dataclass(frozen=True)
class SampledGroups:
    """Queries with their candidates and self-answers, which are read when they are asked for.

    Attributes:
        data: Has the queries of step B.
        messages, candidates: From `sample_candidates`.
        answers: From `self_answers`; a query without one is left out.
        temperatures: That of each of a query's candidates.
        chat_text: A message to the prompt that the generator was given.
    """

    data: TrainingData
    messages: Mapping[str, str]
    candidates: SampledTexts
    answers: Mapping[str, str]
    temperatures: Sequence[float]
    chat_text: Callable[[str], str]

    @property
    def ids(self) -> list[str]:
        """Ids of the queries."""
        return [query for query in self.data.generator_train if query in self.answers]

    def group(self, query: str, reward: RewardSettings) -> Group:
        """A query's group, which is not rewarded yet."""
        return Group(
            query,
            self.data.collection.queries[query],
            self.data.positive(query),
            self.answers[query],
            sampled_candidates(self.candidates, query, self.temperatures, reward),
            self.chat_text(self.messages[query]),
        )

    def encoded(
        self, retriever: CorpusRetriever, queries: Sequence[str], kind: Kind, advance: Progress
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vectors of some queries, of their candidates and of their answers, these two of a kind.

        All processes call it together, each of which reads the texts that it encodes.

        Returns:
            [queries, dim], [queries * candidates, dim] and [queries, dim], in process 0.
        """
        keys = [(query, i) for query in queries for i in range(len(self.temperatures))]
        keys += [(query, ANSWER) for query in queries]
        names = [f"{'answer to' if i == ANSWER else 'candidates of'} {query}" for query, i in keys]
        encode = functools.partial(retriever.encode, progress=advance, main_alone=True)
        documents = encode(ReadWhenSliced(keys, self._text), kind, names)
        names = [f"query {query}" for query in queries]
        encoded = encode(self.data.queries(queries), "query", names)
        return encoded, documents[: -len(queries)], documents[-len(queries) :]

    def _text(self, key: tuple[str, int]) -> str:
        return self.answers[key[0]] if key[1] == ANSWER else self.candidates[key]


def reward_in_blocks(
    sampled: SampledGroups,
    context: RewardContext,
    retriever: CorpusRetriever,
    kind: Kind,
    what: str,
    take: Callable[[list[Group]], None],
) -> None:
    """Rewards the queries of a round, some at a time: their vectors would not fit the memory.

    All processes call it together, and encode together; the first one rewards.

    Args:
        sampled: The queries with their texts.
        context: What they are judged by, and how many together.
        retriever: Encodes queries and texts.
        kind: How texts are read.
        what: What an error says is done.
        take: Is given the rewarded groups of each block, in process 0.

    Raises:
        NotFiniteError: A reward is not finite.
    """
    ids, size = context.queries, context.block
    texts = 2 + len(sampled.temperatures)  # The query's own and its answer are encoded, too.

    def judge(block: Sequence[str], vectors: Sequence[np.ndarray]) -> None:
        groups = [sampled.group(query, context.settings) for query in block]
        take(reward_groups(evidence_of(context, groups, *vectors), what))

    with retriever.reporter.progress("rewards: texts encoded", len(ids) * texts) as advance:
        for first in range(0, len(ids), size):
            block = ids[first : first + size]
            vectors = sampled.encoded(retriever, block, kind, advance)
            if not retriever.processes.is_main:
                continue
            judge(block, vectors)
            del vectors  # The next block's come before these would be let go.
            trim_memory()  # A block's texts leave gaps, of which another one fills a part.


class ReadWhenSliced(Sequence):
    """Texts by their keys, of which those are read that a slice of them has."""

    def __init__(self, keys: Sequence[Any], read: Callable[[Any], str]):
        self._keys, self._read = keys, read

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(key) for key in self._keys[index]]
        return self._read(self._keys[index])
