"""Query expansion by strategy: what the generator is asked, and what becomes of its texts.

A strategy is a list of steps and two small functions of a query and its texts: `sparse` makes
BM25's query, `dense` the texts whose vectors are averaged. An empty generation is left out; without
any, the query is alone.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from expandr_jax.errors import UserError
from expandr_jax.expansion.patterns import chosen_pattern
from expandr_jax.expansion.prompts import (
    DOCUMENT_PROMPTS,
    GENQR_ENSEMBLE,
    PROMPTS,
    Prompt,
    custom_prompt,
    strip_lead_in,
)
from expandr_jax.vectors.encoder import Kind

FEEDBACK = 10  # Passages that a search finds for a prompt that shows some.
LEAST_CHARACTERS = 40  # Each passage keeps these in a message that would be too long with more.
SEPARATOR = "[SEP]"  # Replaced by the retriever's own.


@dataclasses.dataclass(frozen=True)
class Ask:
    """A step: the generator writes a text, or as many as there are samples.

    Attributes:
        name: Sets the draws of its texts apart from others'.
        prompt: What it is asked.
        shown: The first text of the `Ask` before, to what the prompt shows of it, by placeholder.
        used: Whether the texts expand the query; those of others are written for the next `Ask`,
            one a query.
    """

    name: str
    prompt: Prompt
    shown: Callable[[str], Mapping[str, str]] | None = None
    used: bool = True

    def message(
        self,
        query: str,
        passages: Sequence[str],
        most_characters: int,
        fits: Callable[[str], bool],
        written: str = "",
    ) -> str:
        """The user's message, with the passages that were found, if the prompt shows any.

        It has `most_characters` of each passage, or fewer: they are cut until the message fits,
        because a prompt that is too long loses its beginning. `written` is the text of the `Ask`
        before.
        """
        shown = self.shown(written) if self.shown else {}
        if not self.prompt.shows_passages:
            return self.prompt.message(query, **shown)
        return _fitting(
            lambda most: self.prompt.message(
                query, passages=_cut(passages, most) or ["-"], **shown
            ),
            most_characters,
            fits,
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """A step: passages of the corpus are found, for the next prompt to show.

    Attributes:
        depth: How many.
        by: How they are found.
        query: (query, texts so far) to what is searched for; None: the query as it is.
        unseen: Whether passages that an earlier step showed are passed over.
    """

    depth: int = FEEDBACK
    by: Literal["bm25", "dense"] = "bm25"
    query: Callable[[str, Sequence[str]], str] | None = None
    unseen: bool = False


def document_message(
    name: str, document: str, most_characters: int, fits: Callable[[str], bool]
) -> str:
    """`fitted_message` of one of `DOCUMENT_PROMPTS`, which has a document expanded."""
    return fitted_message(DOCUMENT_PROMPTS[name], document, most_characters, fits)


def fitted_message(
    prompt: Prompt,
    document: str,
    most_characters: int,
    fits: Callable[[str], bool],
    query: str = "",
) -> str:
    """The user's message that shows a document, cut as the passages of `Ask.message` are."""
    return _fitting(
        lambda most: prompt.message(query, _cut([document], most)[0]), most_characters, fits
    )


def _cut(passages: Sequence[str], most_characters: int) -> list[str]:
    """Passages on one line each, cut to a length."""
    return [" ".join(passage.split())[:most_characters] for passage in passages]


def _fitting(build: Callable[[int], str], most: int, fits: Callable[[str], bool]) -> str:
    """`build(characters)` with as many as fit, of a falling series."""
    while True:
        text = build(most)
        if most <= LEAST_CHARACTERS or fits(text):
            return text
        most = max(LEAST_CHARACTERS, most * 3 // 4)


@dataclasses.dataclass(frozen=True)
class DenseQuery:
    """What a query's vector is made of: w E(query) + (1 - w) mean of E(text) over the texts."""

    texts: list[str]
    query_weight: float


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to expand a query.

    Attributes:
        steps: What is done in turn; each `Ask` shows what the last `Search` before it found.
        samples: Texts that each `Ask` is answered with, as the method's authors have it.
        sparse: (query, texts) to BM25's query; texts of the first `Ask` come first.
        dense: (query, texts, the weight that is asked for) to what is encoded.
        kind: How `dense`'s texts are encoded: "query" where the query stands in them.
        replaces: Whether a text stands in the query's place in a run, too, in all that it trains
            and ranks; a run weighs those of others with the query, whatever `dense` does.
    """

    steps: tuple[Ask | Search, ...]
    samples: int
    sparse: Callable[[str, Sequence[str]], str]
    dense: Callable[[str, Sequence[str], float], DenseQuery]
    kind: Kind = "document"
    replaces: bool = False

    @property
    def in_a_run(self) -> "Strategy":
        """The strategy as a run uses it whose own it is: its vectors are as in training."""
        kind = self.kind if self.replaces else "document"
        return dataclasses.replace(self, dense=weighted, kind=kind)

    @property
    def asks(self) -> tuple[Ask, ...]:
        """The steps in which the generator writes texts that are used; the last step is one."""
        return tuple(step for step in self.steps if isinstance(step, Ask) and step.used)

    def with_prompt(self, prompt: Prompt) -> "Strategy":
        """The strategy with another prompt at its last `Ask`.

        If it shows passages and no step finds any, BM25 finds them for the query.
        """
        *steps, last = self.steps
        if prompt.shows_passages and not any(isinstance(step, Search) for step in steps):
            steps.append(Search())
        return dataclasses.replace(self, steps=(*steps, dataclasses.replace(last, prompt=prompt)))


def repeated(times: int) -> Callable[[str, Sequence[str]], str]:
    """The query so many times, then the texts."""
    return lambda query, texts: " ".join([query] * (times if texts else 1) + list(texts))


def balanced(query: str, texts: Sequence[str]) -> str:
    """The query once for every six times that it fits into the texts, then the texts (MuGI)."""
    return repeated(max(1, len(" ".join(texts)) // (6 * len(query))))(query, texts)


def alternated(query: str, texts: Sequence[str]) -> str:
    """The query before each text (LameR)."""
    return " ".join(part for text in texts for part in (query, text)) or query


def lower_cased(query: str, texts: Sequence[str]) -> str:
    """The query once for each passage and its extract, then all of them, lower-cased (CSQE)."""
    return repeated(max(1, len(texts) // 2))(query, texts).lower()


def accumulated(query: str, texts: Sequence[str]) -> str:
    """The query once for every three times that its words fit into the texts', lower-cased."""
    words = sum(len(text.split()) for text in texts)
    return repeated(max(1, words // (3 * max(1, len(query.split())))))(query, texts).lower()


def lines_as_json(kind: str, text: str, most: int | None = None) -> str:
    """A text's first lines, without their numbers, as a JSON object with keys KIND1, KIND2, ..."""
    # Texts for training may have lead-ins, and be JSON themselves.
    lines = (_NUMBER.sub("", line.strip()) for line in strip_lead_in(text).splitlines())
    lines = list(filter(None, lines))[:most]
    return json.dumps({f"{kind}{n}": line for n, line in enumerate(lines, start=1)})


_NUMBER = re.compile(r"^(?:[-*•]|\(?\d{1,2}[.):]|[Qq](?:uestion)?\s?\d+[.:)])\s*")


def three_questions(text: str) -> dict[str, str]:
    """QA-Expand's questions, the first three lines of a text, as its next prompt shows them."""
    return {"questions": lines_as_json("question", text, 3)}


def answers(text: str) -> dict[str, str]:
    """QA-Expand's answers, a line each, as its last prompt shows them."""
    return {"answers": lines_as_json("answer", text)}


def weighted(query: str, texts: Sequence[str], query_weight: float) -> DenseQuery:
    """The texts, and the query with the weight that is asked for."""
    return DenseQuery(list(texts), query_weight)


def one_of_them(query: str, texts: Sequence[str], query_weight: float) -> DenseQuery:
    """The mean of the query and the texts, all alike."""
    return DenseQuery(list(texts), 1 / (1 + len(texts)))


def replaced(query: str, texts: Sequence[str]) -> str:
    """The texts in the query's place."""
    return " ".join(texts) or query


def rewritten(query: str, texts: Sequence[str], query_weight: float) -> DenseQuery:
    """The mean of the texts, in the query's place."""
    return DenseQuery(list(texts), 0.0)


def read_as_one(separator: str) -> Callable[[str, Sequence[str], float], DenseQuery]:
    """The query and each text read as one."""
    return lambda query, texts, query_weight: DenseQuery(
        [f"{query}{separator}{text}" for text in texts], 0.0
    )


def rounds(count: int, prompt: Prompt, name: str) -> tuple[Ask | Search, ...]:
    """The steps of ThinkQE: search with what is accumulated, show what is new, write again.

    Args:
        count: How many rounds; theirs are three.
        prompt: It shows passages.
        name: What the texts are called; each round's draws are set apart by its number.

    References:
        Lei et al., arXiv 2506.09260: the prompt, BM25's ten first, first for the query alone and
        then for the query and all texts so far, and five texts a round are those of its code. Ours
        are that no passage is ever shown twice, where theirs may come back after a round, and the
        use by vectors: the mean of the query and all texts, or, of a trained retriever, the
        weighted mean that it is trained with. Thoughts are cut off as any lead-in is.
    """
    searches = (Search(), *[Search(query=accumulated, unseen=True)] * (count - 1))
    asks = (Ask(f"{name}-{number}", prompt) for number in range(1, count + 1))
    return tuple(step for pair in zip(searches, asks, strict=True) for step in pair)


def _asked(name: str, samples: int, *rest, **options) -> Strategy:
    return Strategy((Ask(name, PROMPTS[name]),), samples, *rest, **options)


STRATEGIES = {
    "q2d": _asked("q2d", 1, repeated(5), weighted),
    "pydoc": _asked("pydoc", 1, repeated(5), weighted),
    **{
        name: _asked(name, 8, repeated(5), one_of_them)
        for name in PROMPTS
        if name == "hyde" or name.startswith("hyde-")
    },
    "query2doc": _asked("query2doc", 1, repeated(5), read_as_one(f" {SEPARATOR} "), kind="query"),
    "q2q": _asked("q2q", 1, replaced, rewritten, kind="query"),
    "rewrite": _asked("rewrite", 1, replaced, rewritten, kind="query", replaces=True),
    "q2e": _asked("q2e", 1, repeated(1), read_as_one(" "), kind="query"),
    "q2c": _asked("q2c", 1, repeated(5), read_as_one(" "), kind="query"),
    "mugi": _asked("mugi", 5, balanced, read_as_one(" "), kind="query"),
    "lamer": Strategy((Search(), Ask("lamer", PROMPTS["lamer"])), 5, alternated, one_of_them),
    "csqe": Strategy(
        (Ask("keqe", PROMPTS["keqe"]), Search(), Ask("csqe", PROMPTS["csqe"])),
        5, lower_cased, one_of_them,
    ),
    "thinkqe": Strategy(
        rounds(3, PROMPTS["thinkqe"], "thinkqe"), 5, accumulated, one_of_them
    ),
    "genqr": _asked("genqr", 5, repeated(1), read_as_one(" "), kind="query"),
    "genqr-ensemble": Strategy(
        tuple(Ask(name, prompt) for name, prompt in GENQR_ENSEMBLE.items()),
        1, repeated(5), read_as_one(" "), kind="query",
    ),
    "qa-expand": Strategy(
        (
            Ask("qa-expand-questions", PROMPTS["qa-expand-questions"], used=False),
            Ask("qa-expand-answers", PROMPTS["qa-expand-answers"], three_questions, used=False),
            Ask("qa-expand", PROMPTS["qa-expand"], answers),
        ),
        1, repeated(3), one_of_them,
    ),
    "reformer": Strategy(
        (
            Search(depth=3),
            Ask("reformer-pattern", PROMPTS["reformer-pattern"], used=False),
            Ask("reformer", PROMPTS["reformer"], chosen_pattern),
        ),
        1, replaced, rewritten, kind="query",
    ),
}  # fmt: skip


def strategy(name: str, template: str = "") -> Strategy:
    """A strategy by name, with another prompt at its last `Ask` if a template is given.

    Raises:
        UserError: The name is unknown, or the template is none of `custom_prompt`.
    """
    if name not in STRATEGIES:
        raise UserError(f"strategy {name!r} is unknown; there are {', '.join(STRATEGIES)}")
    found = STRATEGIES[name]
    return found.with_prompt(custom_prompt(template)) if template else found


PUBLISHED = ("q2d", "hyde", "query2doc", "q2e", "q2c", "mugi", "lamer", "csqe")
