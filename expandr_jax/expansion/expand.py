"""Takes the steps of a strategy: what the generator is asked for queries, and when."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.data.documents import ids_of
from expandr_jax.errors import UserError
from expandr_jax.expansion.demonstrations import Demonstration, message_with_examples
from expandr_jax.expansion.sampled import MadeWhenAsked, Texts, sample_texts
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import Ask, Search, Strategy, strategy
from expandr_jax.generation.requests import Request, Requests
from expandr_jax.generation.sampler import Sampler
from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.search import search_named

SEARCHED_AT_ONCE = 1024  # Queries whose results are in memory with all their scores.
LEAST_RANKED = 100  # Results among which those of equal scores are put in order, as in runs/.


def drawing(section: SamplingSettings) -> dict[str, Any]:
    """Arguments of a `Request`, all but the temperature, from a config's section that samples."""
    names = ("top_p", "max_new_tokens", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(section, name) for name in names}


def expansion_text(settings: ExpansionSettings, query: str) -> str:
    """The user's message that asks for a query's expansion as the config's section has it.

    Raises:
        UserError: The strategy's prompt shows passages, or what was written before, which a query
            alone does not have.
    """
    prompt = strategy(settings.strategy, settings.template).asks[-1].prompt
    if not prompt.of_query_alone:
        shown = "passages" if prompt.shows_passages else "what was written before"
        raise UserError(
            f"expansion.strategy {settings.strategy!r} shows {shown} in its prompt; expected a "
            "prompt beside each query"
        )
    return prompt.message(query)


Sample = Callable[[Ask, Requests], Texts]
# Queries and k to scores and rows of the corpus, [queries, k] each.
SearchTexts = Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Expander:
    """Expands queries by one strategy.

    Attributes:
        strategy: What is asked and searched for.
        sampler: The generator.
        settings: How texts are drawn: the config's section `expansion`.
        most_characters: Characters of a passage that a prompt shows, at most.
        search: (step, query id -> what is searched for, n) to query id -> ids of its n best
            passages.
        corpus: Document id -> text, of which passages are shown.
        examples: What prompts show that several texts of a query are asked for by, if they do.
    """

    strategy: Strategy
    sampler: Sampler
    settings: ExpansionSettings
    most_characters: int
    search: Callable[[Search, Mapping[str, str], int], Mapping[str, Sequence[str]]]
    corpus: Mapping[str, str]
    examples: Sequence[Sequence[Demonstration]] = ()

    def texts(
        self, queries: Mapping[str, str], samples: int, sample: Sample
    ) -> Mapping[str, list[list[str]]]:
        """Takes all steps for several queries.

        Args:
            queries: Query id -> query.
            samples: How often each `Ask` is answered.
            sample: (step, requests) to (query id, sample) -> text; as `journaled` returns it.

        Returns:
            Query id -> the texts of each `Ask` that are used, looked up when they are asked for; ""
            where the model said nothing.
        """
        made: list[Texts] = []
        written: Texts = {}
        shown: dict[str, Sequence[str]] = {}
        seen: dict[str, set[int]] = {}
        for step in self.strategy.steps:
            if isinstance(step, Ask):
                messages = self._messages(step, queries, shown, written)
                count = samples if step.used else 1
                written = sample(step, expansion_requests(self.settings, messages, count))
                if step.used:
                    made.append(written)
            else:
                shown = self._found(step, queries, _by_ask(made, queries, samples), seen)
        return _by_ask(made, queries, samples)

    def messages(self, queries: Mapping[str, str], sample: Sample) -> Mapping[str, str]:
        """The message of each query's last `Ask`, after one sample of those before; as `texts`."""
        last: list[Requests] = []

        def before(step: Ask, requests: Requests) -> Texts:
            if step is not self.strategy.asks[-1]:
                return sample(step, requests)
            last.append(requests)
            return {}

        self.texts(queries, 1, before)
        return MadeWhenAsked(queries, lambda query: last[0].make(query)[0].prompt)

    def shown(self, queries: Mapping[str, str], requests: Requests) -> Requests:
        """Requests for texts of queries, their prompts as `examples` has them.

        Those of the first prompt come first, and as many of each as can be.
        """
        prompt = self.strategy.asks[-1].prompt

        def make(query: str) -> list[Request]:
            plain = requests.make(query)
            places = (i * len(self.examples) // len(plain) for i in range(len(plain)))
            return [
                dataclasses.replace(
                    request,
                    prompt=message_with_examples(
                        prompt, self.examples[place], query, queries[query], self.sampler.fits
                    ),
                )
                for request, place in zip(plain, places, strict=True)
            ]

        return dataclasses.replace(requests, make=make) if self.examples else requests

    def _messages(
        self,
        step: Ask,
        queries: Mapping[str, str],
        shown: Mapping[str, Sequence[str]],
        written: Texts,
    ) -> Mapping[str, str]:
        """Query id -> what a step asks of it, with what was found and what was written before."""
        limits = self.most_characters, self.sampler.fits

        def message(query: str) -> str:
            before = written[query, 0] if step.shown else ""
            passages = [self.corpus[document] for document in shown.get(query, ())]
            return step.message(queries[query], passages, *limits, before)

        return MadeWhenAsked(queries, message)

    def _found(
        self,
        step: Search,
        queries: Mapping[str, str],
        texts: Mapping[str, list[list[str]]],
        seen: dict[str, set[int]],
    ) -> dict[str, Sequence[str]]:
        """Query id -> ids of the passages that a step shows of it.

        Hashes of their texts are added to those `seen`, if a step asks for what is not among them:
        passages of hundreds of thousands of queries are too much to keep.
        """
        shown: dict[str, Sequence[str]] = {}
        depth = step.depth
        looks = any(isinstance(each, Search) and each.unseen for each in self.strategy.steps)
        if step.unseen:
            depth += max(map(len, seen.values()), default=0)
        every = [*queries]
        for first in range(0, len(every), SEARCHED_AT_ONCE):
            ids = every[first : first + SEARCHED_AT_ONCE]
            asked = {query: queries[query] for query in ids}
            if step.query is not None:
                made = {q: [t for several in texts[q] for t in several if t] for q in ids}
                asked = {q: step.query(text, made[q]) for q, text in asked.items()}
            for query, found in self.search(step, asked, depth).items():
                shown[query] = found[: step.depth]
                if looks:
                    before = seen.setdefault(query, set())
                    marks = {document: hash(self.corpus[document]) for document in found}
                    new = [d for d in found if not (step.unseen and marks[d] in before)]
                    shown[query] = new[: step.depth]
                    before.update(marks[document] for document in shown[query])
        return shown


def _by_ask(
    made: Sequence[Texts], queries: Mapping[str, str], samples: int
) -> Mapping[str, list[list[str]]]:
    """Query id -> its texts [asks][samples]."""
    made = [*made]  # As it is now: more steps follow.
    return MadeWhenAsked(
        queries, lambda query: [[texts[query, i] for i in range(samples)] for texts in made]
    )


def by_sample(asks: Sequence[Sequence[str]]) -> list[str]:
    """A sample's text of each `Ask`, then those of the next sample, of texts [asks][samples]."""
    return [text for sample in zip(*asks, strict=True) for text in sample]


def journaled(
    expander: Expander, adapter: Any | None, path: pathlib.Path, purpose: str, strip: bool = True
) -> Sample:
    """Samples a strategy's texts by `sample_texts`.

    Path and purpose are those of the last `Ask`; those of the others have their names behind them.
    """

    def sample(step: Ask, requests: Requests) -> Texts:
        where, named = path, purpose
        if step is not expander.strategy.asks[-1]:
            where, named = path.with_stem(f"{path.stem}-{step.name}"), f"{purpose}, {step.name}"
        return sample_texts(
            expander.sampler, adapter, requests, path=where, purpose=named, strip=strip
        )

    return sample


def make_expander(
    settings: ExpansionSettings,
    sampler: Sampler,
    corpus: Mapping[str, str],
    bm25: SearchTexts,
    dense: SearchTexts,
    *,
    most_characters: int,
    drop_identical_ids: bool,
    excluded: Mapping[str, Collection[str]] | None = None,
) -> Expander:
    """Expands queries with passages of a corpus.

    Args:
        settings: The config's section `expansion`.
        sampler: The generator.
        corpus: Document id -> text.
        bm25, dense: Search it by words and by vectors.
        most_characters: Characters of a passage that a prompt shows, at most.
        drop_identical_ids: No query is shown the document that has its id.
        excluded: Query id -> documents that it is not shown.

    Raises:
        UserError: The strategy or the template is wrong.
    """
    searches = {"bm25": bm25, "dense": dense}
    ids, drop = ids_of(corpus), drop_identical_ids

    def search(step: Search, asked: Mapping[str, str], count: int) -> dict[str, list[str]]:
        run = search_named(
            searches[step.by],
            list(asked),
            list(asked.values()),
            ids,
            # One more, so that a tie at the end is not cut before it is ranked.
            max(count, LEAST_RANKED) + drop,
            drop_identical_ids=drop,
            excluded=excluded,
            above=0.0 if step.by == "bm25" else -np.inf,
        )
        return {
            query: [document for document, _ in metrics.rank_documents(found)[:count]]
            for query, found in run.items()
        }

    asked = strategy(settings.strategy, settings.template)
    return Expander(asked, sampler, settings, most_characters, search, corpus)


def expansion_requests(
    settings: ExpansionSettings, messages: Mapping[str, str], samples: int
) -> Requests:
    """Requests for several texts of each message, drawn as the config's `expansion` says."""
    return requests_of(settings, messages, [settings.temperature] * samples)


def requests_of(
    section: SamplingSettings,
    messages: Mapping[str, str],
    temperatures: Sequence[float],
    first: int = 0,
) -> Requests:
    """Requests for a text of each message, query id -> message, at each temperature.

    `section` is one of the config's that samples; samples are counted from `first`.
    """
    drawn = drawing(section)

    def make(query: str) -> list[Request]:
        message = messages[query]
        return [
            Request(query, first + number, message, temperature, **drawn)
            for number, temperature in enumerate(temperatures)
        ]

    return Requests([*messages], [len(temperatures)] * len(messages), make)
