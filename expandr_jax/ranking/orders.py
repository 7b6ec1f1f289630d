"""Orders of passages from judgements, for a generator to learn to write: `listwise:` rows rank so.

A list is a query's relevant passages among others that are not, as a run's triples have them, in no
order. Two tasks are made of it: to write the order, the main one, and to say which of two orders is
better, the auxiliary one (LLM4PR, arXiv 2411.01178).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.triples import Triple
from expandr_jax.ranking.listwise import ask_for_order, numbered_passages, written

ORDER, COMPARE = TASKS = ("order", "compare")
_LETTERS = "A", "B"
AskOrder = Callable[[str, Sequence[str]], str]
# (query, passages, what asks) to a prompt; passages may be cut.
MakePrompt = Callable[[str, Sequence[str], AskOrder], str]


@dataclasses.dataclass(frozen=True)
class ShownList:
    """A query and its passages, in the order in which a prompt shows them.

    Attributes:
        relevant: Whether each passage is.
    """

    query: str
    passages: tuple[str, ...]
    relevant: tuple[bool, ...]

    @property
    def best(self) -> list[int]:
        """The order in which what is relevant comes first; else as they are shown."""
        return sorted(range(len(self.passages)), key=lambda place: not self.relevant[place])

    def worth(self, order: Sequence[int]) -> float:
        """The discounted gain of an order."""
        gains = np.array([self.relevant[place] for place in order], np.float64)
        return float(np.sum(gains / np.log2(np.arange(len(order)) + 2)))


def shown_lists(triple: Triple, window: int, count: int, seed: int) -> Iterator[ShownList]:
    """`count` lists of a query, each of `window` passages or fewer; none without negatives.

    Half of a list is relevant at most, as far as there are others. What is drawn depends on the
    query, the seed and the number of the list alone.
    """
    relevant = list(dict.fromkeys(triple.positives))
    others = [text for text in dict.fromkeys(triple.negatives) if text not in set(relevant)]
    if not others:
        return
    for number in range(count):
        draw = _draws(seed, triple.query, number)
        most = max(window // 2, window - len(others))
        taken = [relevant[i] for i in draw.permutation(len(relevant))[: min(most, window - 1)]]
        rest = [others[i] for i in draw.permutation(len(others))[: window - len(taken)]]
        passages = [(text, True) for text in taken] + [(text, False) for text in rest]
        placed = [passages[i] for i in draw.permutation(len(passages))]
        yield ShownList(triple.query, *zip(*placed, strict=True))


def order_rows(
    triples: Sequence[Triple],
    prompt: MakePrompt,
    *,
    window: int,
    lists: int,
    auxiliary: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of both tasks, as `train.generator` reads them: pairs, and candidates with rewards.

    Args:
        triples: Queries with relevant passages and others.
        prompt: Makes a prompt, the chat template applied.
        window, lists: Passages of a list, and lists of a query, at most.
        auxiliary: Share of the lists that the auxiliary task is made of, too.
        seed: All draws depend on it.
    """
    for triple in triples:
        for number, made in enumerate(shown_lists(triple, window, lists, seed)):
            draw, asked = _draws(seed, triple.query, number, ORDER), (made.query, made.passages)
            yield _row(ORDER, prompt(*asked, ask_for_order), *map(written, _pair(made, draw)))
            if draw.random() < auxiliary:
                orders, better = _pair(made, draw), int(draw.random() < 0.5)
                ask = functools.partial(_ask_to_compare, orders=orders[:: -1 if better else 1])
                yield _row(COMPARE, prompt(*asked, ask), _LETTERS[better], _LETTERS[1 - better])


def _pair(made: ShownList, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """The best order, and one that is worse: as shown, at random, or the best from its end."""
    best, count = made.best, len(made.passages)
    drawn = draw.permutation(count).tolist() if draw.random() < 0.5 else [*range(count)]
    return best, drawn if made.worth(drawn) < made.worth(best) else best[::-1]


def _ask_to_compare(
    query: str, passages: Sequence[str], orders: tuple[Sequence[int], Sequence[int]]
) -> str:
    """The message that asks which of two orders is better."""
    named = zip(_LETTERS, orders, strict=True)
    both = "\n".join(f"{letter}: {written(order)}" for letter, order in named)
    return (
        f"{numbered_passages(query, passages)}Two orders of the passages, the most relevant "
        f"first:\n{both}\nWrite the letter of the better order."
    )


def _row(task: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    both = [{"text": chosen, "reward": 1.0}, {"text": rejected, "reward": 0.0}]
    return {
        "task": task, "prompt": prompt, "chosen": chosen, "rejected": rejected, "candidates": both
    }  # fmt: skip


def _draws(*names: Any) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
