"""A query's candidates and what they are worth: sampled, rewarded, learned from."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COMPARED_WITH = ("positive", "answer")  # A line has a candidate's cosines with both.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A text that was sampled for a query.

    Attributes:
        text: What it says; "" where the model said nothing.
        temperature: What it was sampled at; None where a file does not say.
        tokens: Its token ids as they were sampled; none where a file has kept the text alone.
        length: How many tokens were sampled, where the text is kept without them.
        finished: What ended it, as `Completion` has it: "eos", "length", "stop" or "refused"; ""
            where a file does not say.
        log_probs: The log-probability of each of them then, or None where nobody kept them.
        similarities: Its cosine to the positive document and to the self-answer, where they were
            compared.
        ranks: Its rank among the candidates by each of these.
        rewards: Rewards by their names.
        total: Their weighted sum.
    """

    text: str
    temperature: float | None = None
    tokens: Sequence[int] = ()
    length: int | None = None
    finished: str = ""
    log_probs: Sequence[float] | None = None
    similarities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    total: float = 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """A query and its candidates. `to_row` and `from_row` are its form in candidates.jsonl.

    Attributes:
        query_id: The query's id.
        query: Its text.
        positive_id: Id of the relevant document that candidates are compared with.
        answer: The self-answer; "" where none was asked for.
        candidates: The texts, as they were asked for.
        prompt: What the generator was given, the chat template applied.
        weight: How much on-policy training learns of it beside others.
        is_document: It is a document of the corpus, for which texts are written, and no query:
            `query` is the document's text and `positive_id` its id.
    """

    query_id: str
    query: str
    positive_id: str
    answer: str
    candidates: Sequence[Candidate]
    prompt: str = ""
    weight: float = 1.0
    is_document: bool = False

    @property
    def texts(self) -> list[str]:
        """The candidates' texts."""
        return [candidate.text for candidate in self.candidates]

    def rewarded(self, rewards: Iterable[tuple[float, Mapping[str, float]]]) -> "Group":
        """The group with what each candidate is worth: in sum, and by the rewards' names."""
        candidates = [
            dataclasses.replace(candidate, total=total, rewards=terms)
            for candidate, (total, terms) in zip(self.candidates, rewards, strict=True)
        ]
        return dataclasses.replace(self, candidates=candidates)

    def to_row(self, with_prompt: bool = False) -> dict[str, Any]:
        """A line of candidates.jsonl, of candidates that have been rewarded.

        Args:
            with_prompt: The query alone does not give the prompt, which stands in the line, too.
        """
        return {
            "query_id": self.query_id,
            "query": self.query,
            "positive_id": self.positive_id,
            "answer": self.answer,
            "candidates": [
                {
                    "text": c.text,
                    "temperature": c.temperature,
                    **{f"similarity_{side}": value for side, value in c.similarities.items()},
                    **{f"rank_{side}": value for side, value in c.ranks.items()},
                    "reward": c.total,
                    "reward_terms": dict(c.rewards),
                }
                for c in self.candidates
            ],
            **({"prompt": self.prompt} if with_prompt else {}),
            **({"is_document": True} if self.is_document else {}),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Group":
        """The group of a line; of a file that is no run's, candidates may have "reward" alone."""
        names = ("query_id", "query", "positive_id", "answer")
        candidates = [
            Candidate(
                c["text"],
                c.get("temperature"),
                similarities=_by_side(c, "similarity"),
                ranks=_by_side(c, "rank"),
                rewards=c.get("reward_terms", {}),
                total=c["reward"],
            )
            for c in row["candidates"]
        ]
        return cls(
            *(row.get(name, "") for name in names),
            candidates,
            row.get("prompt", ""),
            is_document=row.get("is_document", False),
        )


def _by_side(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {side: row[f"{field}_{side}"] for side in COMPARED_WITH if f"{field}_{side}" in row}
