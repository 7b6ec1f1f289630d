"""The generator as a listwise re-ranker: it is shown some passages at once and writes their order.

A window slides from the end of a query's first documents to their top, and overlaps the one before,
so that the best move up (RankGPT, arXiv 2304.09542). It is what is left of LLM4PR's post-ranking
(arXiv 2411.01178) where passages have no features but their text.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from expandr_jax.errors import UserError
from expandr_jax.expansion.cache import kept_texts
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.metrics import RunScores, rank_documents
from expandr_jax.models.generator import Generator
from expandr_jax.settings import count, several

LISTWISE = "listwise"  # The stage, and its section of `evaluation`.
FAULTS = {  # What may be wrong with an answer, in words; the first excludes the others.
    "none": "named no passage (the order given stood)",
    "missing": "lacked some",
    "repeated": "named some twice",
    "unknown": "named some that there are not",
}
LEAST_TOKENS = 8  # Tokens of each passage that a prompt must have room for.
_LEAD_TOKENS = 8  # What an answer may say before its order.
_CHARACTERS = 16  # A token's, at most, where a text is cut before it is tokenised.
_INSIDE, _NUMBER = re.compile(r"\[([^\[\]]*)\]"), re.compile(r"[0-9]+")


@dataclasses.dataclass(frozen=True)
class ListwiseSettings:
    """The section `evaluation.listwise`; configs/base.py says what each setting means."""

    depth: Annotated[int, count(1)]
    depths: Annotated[tuple[int, ...], several(count(1), least=0)]
    window: Annotated[int, count(2)]
    stride: Annotated[int, count(1)]
    passage_tokens: Annotated[int, count(1)]


def check_listwise(settings: ListwiseSettings) -> None:
    """Refuses, by a UserError, windows that would not overlap."""
    if settings.stride >= settings.window:
        raise UserError(
            f"evaluation.listwise.stride is {settings.stride}; expected less than "
            f"evaluation.listwise.window, {settings.window}, so that the best of each move on"
        )


def windows(documents: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Where windows over so many documents begin and end, from the last to the first.

    The last ends with the documents, the first begins with them. A generator that never errs leaves
    the best `window - stride` documents at the top, in their order.
    """
    if documents < 2:
        return []
    starts = [*range(max(0, documents - window), 0, -stride), 0]
    return [(start, min(start + window, documents)) for start in starts]


def written(order: Sequence[int]) -> str:
    """An order of passages, which count from 0, as the generator writes it: "[2] > [1]"."""
    return " > ".join(f"[{place + 1}]" for place in order)


def order_of(answer: str, passages: int) -> tuple[list[int], frozenset[str]]:
    """The order that an answer gives so many passages, repaired, and what was wrong with it.

    Numbers are those in brackets or, where there are none, all. Those of no passage are left out,
    of repeated ones the first stands, and passages that are missing follow in the order given. An
    answer that names none leaves that order as it is.

    Returns:
        A permutation of range(passages), and those of `FAULTS` that apply.
    """
    numbers = _NUMBER.findall(" ".join(_INSIDE.findall(answer))) or _NUMBER.findall(answer)
    known = {str(place + 1): place for place in range(passages)}
    places = [known.get(number.lstrip("0")) for number in numbers]
    order = list(dict.fromkeys(place for place in places if place is not None))
    if not order:
        return list(range(passages)), frozenset({"none"})
    wrong = {
        "missing": len(order) < passages,
        "repeated": len(order) < len(places) - places.count(None),
        "unknown": None in places,
    }
    missing = [place for place in range(passages) if place not in set(order)]
    return order + missing, frozenset(kind for kind, applies in wrong.items() if applies)


def numbered_passages(query: str, passages: Sequence[str]) -> str:
    """What every message begins with: numbered passages, with the query before and after them."""
    numbered = "\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    return f"Rank passages for a query.\nQuery: {query}\n{numbered}\nQuery: {query}\n"


def ask_for_order(query: str, passages: Sequence[str]) -> str:
    """The message that asks for the order of passages."""
    return (
        f"{numbered_passages(query, passages)}Write the numbers of all {len(passages)} passages, "
        "the most relevant first, as [1] > [2]."
    )


@dataclasses.dataclass(frozen=True)
class ListPrompts:
    """Makes messages that show several passages, and cuts these until a prompt has room.

    Attributes:
        generator: Its tokenizer counts, its chat template is part of a prompt.
        settings: How many passages there are at once, and how long they may be.
        buckets: The config's `generator.prompt_buckets`.

    Raises:
        UserError: A prompt has no room for so many passages.
    """

    generator: Generator
    settings: ListwiseSettings
    buckets: Sequence[int]

    def __post_init__(self) -> None:
        count = self.settings.window
        taken = self._tokens(ask_for_order("", [""] * count)) + LEAST_TOKENS * (count + 2)
        if taken > self.longest:
            raise self._crowded()

    @functools.cached_property
    def answer_tokens(self) -> int:
        """The most tokens of an answer, its end included."""
        (ids,) = self.generator.token_ids([written(range(self.settings.window))])
        return len(ids) + _LEAD_TOKENS + 1

    @functools.cached_property
    def longest(self) -> int:
        """The most tokens of a prompt; an answer fits behind it."""
        room = self.generator.module.config.max_positions - self.answer_tokens
        return min(max(self.buckets), room)

    def message(
        self,
        query: str,
        passages: Sequence[str],
        ask: Callable[[str, Sequence[str]], str] = ask_for_order,
    ) -> str:
        """A message of the query and the passages, each cut to as many tokens as a prompt fits.

        They are on one line each, and have `passage_tokens` at most; `ask` makes the message.
        """
        most = self.settings.passage_tokens
        lines = [" ".join(text.split())[: most * _CHARACTERS] for text in (query, *passages)]
        spans = self.generator.tokenizer(
            lines, add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        most = min(most, max(map(len, spans)))
        while True:
            first, *rest = (
                line[: span[min(most, len(span)) - 1][1]] if span and most else ""
                for line, span in zip(lines, spans, strict=True)
            )
            message = ask(first, rest)
            over = self._tokens(message) - self.longest
            if over <= 0:
                return message
            if not most:
                raise self._crowded()
            most = max(0, most - max(1, over // (len(lines) + 1)))

    def _tokens(self, message: str) -> int:
        (ids,) = self.generator.token_ids([self.generator.chat_text(message)])
        return len(ids)

    def _crowded(self) -> UserError:
        return UserError(
            f"evaluation.listwise.window is {self.settings.window}: so many passages, each of "
            f"{LEAST_TOKENS} tokens at least, are too many for prompts of {max(0, self.longest)}; "
            "lower it, or raise generator.prompt_buckets as far as the model reads"
        )


@dataclasses.dataclass(frozen=True)
class ListRanker:
    """Ranks the first documents of queries again, by what a generator answers.

    Attributes:
        settings: How many documents it is shown at once, and how windows move.
        message: (query, passages) to what is asked.
        answers: Query id -> message, to query id -> answer; asked for a window of all queries.
    """

    settings: ListwiseSettings
    message: Callable[[str, Sequence[str]], str]
    answers: Callable[[Mapping[str, str]], Mapping[str, str]]

    def rank(
        self, run: RunScores, queries: Mapping[str, str], corpus: Mapping[str, str], depth: int
    ) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """Orders the first `depth` documents of each query; the others follow as before.

        Queries and the corpus are texts by their ids.

        Returns:
            A run whose scores fall by 1 a rank, to 1; and "answers", how many there were, and how
            many of them each of `FAULTS` applies to.
        """
        orders = {query: [d for d, _ in rank_documents(found)] for query, found in run.items()}
        size, stride = self.settings.window, self.settings.stride
        spans = {q: windows(min(depth, len(found)), size, stride) for q, found in orders.items()}
        counted: collections.Counter[str] = collections.Counter()
        for step in range(max(map(len, spans.values()), default=0)):
            here = {query: span[step] for query, span in spans.items() if step < len(span)}
            messages = {
                query: self.message(queries[query], [corpus[d] for d in orders[query][first:last]])
                for query, (first, last) in here.items()
            }
            answers = self.answers(messages)
            for query, (first, last) in here.items():
                seen = orders[query][first:last]
                order, wrong = order_of(answers[query], len(seen))
                orders[query][first:last] = [seen[place] for place in order]
                counted.update(wrong)
            counted["answers"] += len(here)
        again = {
            query: {document: float(len(found) - rank) for rank, document in enumerate(found)}
            for query, found in orders.items()
        }
        return again, {name: counted[name] for name in ("answers", *FAULTS)}


def list_ranker(
    sampler: Sampler, settings: ListwiseSettings, directory: pathlib.Path
) -> ListRanker:
    """A re-ranker by the sampler's base model, which answers greedily, whoever asks.

    Args:
        sampler, directory: As of `kept_texts`: what was answered before is not asked again.
        settings: The config's section `evaluation.listwise`.

    Raises:
        UserError: As of `ListPrompts`.
    """
    prompts = ListPrompts(sampler.generator, settings, sampler.settings.prompt_buckets)

    def answers(messages: Mapping[str, str]) -> Mapping[str, str]:
        requests = [
            Request(query, 0, message, 0.0, 1.0, prompts.answer_tokens)
            for query, message in messages.items()
        ]
        found = kept_texts(directory, sampler, LISTWISE, requests, contextlib.nullcontext())
        return {query: found[query, 0] for query in messages}

    return ListRanker(settings, prompts.message, answers)


def answers_remark(entry: Mapping[str, Any]) -> str:
    """What a reader of a row has to know of an entry {"system", "answers", ...} of its answers."""
    told = (f"{entry[kind]:,} {said}" for kind, said in FAULTS.items())
    return f"{entry['system']}: of {entry['answers']:,} orders that were written {', '.join(told)}"
