"""Step A's batches: triples of text as token ids, and the arrays of each step's draw of them."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.data.batches import batch_indices, pad
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.losses.contrastive import LEARNED_FROM_A_TEACHER, loss_weights
from expandr_jax.models.retriever import Retriever
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import batch_divisor
from expandr_jax.vectors.encoder import Kind, TextEncoder

TEXTS_AT_ONCE = 4096  # Tokenized in one call.


@dataclasses.dataclass(frozen=True)
class Passage:
    """A document of a training query.

    Attributes:
        ids: Token ids.
        text: Hash or id of its text, to find equal ones in a batch.
        score: A teacher's, where there is one.
    """

    ids: Sequence[int]
    text: str
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class ContrastiveExample:
    """Token ids of one training query, its expansions (may be none) and its documents.

    Attributes:
        query: Ids of the query.
        expansions: Ids of each sampled passage; an empty generation is left out.
        positive: The relevant document.
        negatives: Documents that were given as irrelevant.
        other_positives: Further relevant documents, of which `draw_passages` may take one instead.
        known: Texts of documents that are relevant as well and must not count as negatives.
    """

    query: Sequence[int]
    expansions: Sequence[Sequence[int]]
    positive: Passage
    negatives: Sequence[Passage] = ()
    other_positives: Sequence[Passage] = ()
    known: Collection[str] = ()


def triple_examples(triples: Sequence[Triple], encoder: TextEncoder) -> list[ContrastiveExample]:
    """Tokenizes triples; a query's positives on other lines are known, too."""
    queries = _tokens(encoder, (t.query for t in triples), "query")
    documents = _tokens(
        encoder, (x for t in triples for x in (*t.positives, *t.negatives, *t.expansions)),
        "document",
    )  # fmt: skip
    known: dict[str, set[str]] = {}
    for triple in triples:
        known.setdefault(triple.query, set()).update(triple.positives)
    examples = []
    for triple in triples:
        texts = (*triple.positives, *triple.negatives)
        scores = triple.teacher_scores or [None] * len(texts)
        passages = [Passage(documents[x], x, score) for x, score in zip(texts, scores, strict=True)]
        count = len(triple.positives)
        examples.append(
            ContrastiveExample(
                query=queries[triple.query],
                expansions=[documents[x] for x in triple.expansions],
                positive=passages[0],
                negatives=passages[count:],
                other_positives=passages[1:count],
                known=known[triple.query],
            )
        )
    return examples


def _tokens(encoder: TextEncoder, texts: Iterable[str], kind: Kind) -> dict[str, np.ndarray]:
    """Text -> token ids; equal texts are kept once, as arrays, which are a fifth of a list."""
    unique = list(dict.fromkeys(texts))
    result = {}
    for start in range(0, len(unique), TEXTS_AT_ONCE):
        block = unique[start : start + TEXTS_AT_ONCE]
        for text, ids in zip(block, encoder.tokenize(block, kind), strict=True):
            result[text] = np.array(ids, np.int32)
    return result


def hash_examples(examples: Sequence[ContrastiveExample]) -> str:
    """sha256 over what tells a training's examples from others."""
    parts = (
        [e.positive.text, [*map(int, e.query)], [n.text for n in e.negatives]] for e in examples
    )
    return hash_json([*map(hash_json, parts)])


def draw_passages(
    example: ContrastiveExample, negatives: int, *, seed: int, epoch: int, query: int
) -> ContrastiveExample:
    """The example as one epoch sees it: one of its positives, at most `negatives` negatives.

    The draw is a function of (seed, epoch, query) alone; `query` numbers the examples.
    """
    if not example.other_positives and len(example.negatives) <= negatives:
        return example
    generator = np.random.default_rng([seed, epoch, query])
    positives = [example.positive, *example.other_positives]
    positive = positives.pop(int(generator.integers(len(positives))))
    kept = np.sort(generator.permutation(len(example.negatives))[:negatives])
    return dataclasses.replace(
        example,
        positive=positive,
        other_positives=positives,
        negatives=[example.negatives[i] for i in kept],
    )


def stays_plain(share: float, *, seed: int, step: int, query: int) -> bool:
    """Whether a query is left unexpanded in a step: drawn with `share` by (seed, step, query)."""
    # The fourth number keeps this apart from the draws of passages.
    return share > 0 and np.random.default_rng([seed, step, query, 1]).random() < share


def make_batch(
    examples: Sequence[ContrastiveExample],
    pad_id: int,
    samples: int,
    negatives: int = 0,
    longest: int | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one batch.

    Args:
        examples: The first `samples` expansions and `negatives` negatives of each are used.
        pad_id: Fills up rows.
        samples: Expansions a query; 0 for plain queries.
        negatives: Negatives a query. A query with fewer has its positive in their place, which is
            left out of every softmax.
        longest: No text has more tokens; rows are not padded beyond it.

    Returns:
        "query_ids", "query_mask" [batch, length]; "positive_ids", "positive_mask"; "excluded"
        [batch, batch * (1 + negatives)], True for passages with the text of one that is relevant to
        the query. With samples also "expansion_ids", "expansion_mask" [batch * samples, length] and
        "present" [batch, samples]; with negatives "negative_ids", "negative_mask" [batch *
        negatives, length], a query's own side by side, and "given", "teacher_scores" [batch, 1 +
        negatives], the positive first.
    """
    batch: dict[str, np.ndarray] = {}
    fill = functools.partial(pad, pad_id=pad_id, longest=longest)
    batch["query_ids"], batch["query_mask"] = fill([e.query for e in examples])
    batch["positive_ids"], batch["positive_mask"] = fill([e.positive.ids for e in examples])
    texts: list[str | None] = [e.positive.text for e in examples]
    if negatives:
        missing = Passage((), "")
        rows = [[e.positive, *e.negatives[:negatives]] for e in examples]
        rows = [row + [missing] * (1 + negatives - len(row)) for row in rows]
        batch["negative_ids"], batch["negative_mask"] = fill(
            [(own if p is missing else p).ids for own, *row in rows for p in row]
        )
        texts += [None if p is missing else p.text for _, *row in rows for p in row]
        batch["given"] = np.array([[p is not missing for p in row] for row in rows])
        batch["teacher_scores"] = np.array(
            [[p.score or 0.0 for p in row] for row in rows], np.float32
        )
    batch["excluded"] = _excluded(examples, texts)
    if samples:
        present = [[i < len(e.expansions) for i in range(samples)] for e in examples]
        rows = [e.expansions[i] if i < len(e.expansions) else e.query
                for e in examples for i in range(samples)]  # fmt: skip
        batch["expansion_ids"], batch["expansion_mask"] = fill(rows)
        batch["present"] = np.array(present)
    return batch


def _excluded(examples: Sequence[ContrastiveExample], texts: Sequence[str | None]) -> np.ndarray:
    """[examples, texts] bool: the text is relevant to the query, or None, which nobody compares."""
    columns: dict[str | None, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    excluded = np.zeros((len(examples), len(texts)), bool)
    excluded[:, columns.get(None, [])] = True
    for row, example in enumerate(examples):
        positives = (passage.text for passage in (example.positive, *example.other_positives))
        for text in (*positives, *example.known):
            excluded[row, columns.get(text, [])] = True
    return excluded


@dataclasses.dataclass(frozen=True)
class ContrastiveBatches:
    """The batches of step A; each is a function of the seed and the step's number alone.

    Attributes:
        examples: The training queries.
        names: What messages call them.
        settings: The config's section `contrastive`.
        samples: Expansions a query; 0: queries stay plain.
        seed: What order and draws depend on.
        retriever: Its tokenizer fills up rows, and no text has more tokens than it reads.
    """

    examples: Sequence[ContrastiveExample]
    names: Sequence[str]
    settings: Any
    samples: int
    seed: int
    retriever: Retriever

    @property
    def per_epoch(self) -> int:
        """Batches of one pass over the examples."""
        return len(self.examples) // self.settings.batch_size

    def draw(self, number: int) -> dict[int, ContrastiveExample]:
        """The examples of a step as it sees them, by their numbers."""
        settings, seed = self.settings, self.seed
        indices = batch_indices(
            seed, number, len(self.examples), settings.batch_size, self._lengths,
            settings.length_window,
        )  # fmt: skip
        epoch, drawn = number // self.per_epoch, {}
        for i in indices.tolist():
            example = draw_passages(
                self.examples[i], settings.negatives, seed=seed, epoch=epoch, query=i
            )
            if stays_plain(settings.plain_share, seed=seed, step=number, query=i):
                example = dataclasses.replace(example, expansions=())
            drawn[i] = example
        return drawn

    def batch(
        self, number: int, flops: Callable[[int], float]
    ) -> tuple[dict[str, np.ndarray], Contents]:
        """The arrays of a step, as of `make_batch`, and what they are made of.

        Steps count from the first round's first; `flops` says how many operations training on a
        text of so many tokens takes.
        """
        drawn = self.draw(number)
        pad_id, longest = self.retriever.tokenizer.pad_token_id, self.retriever.max_length
        arrays = make_batch(
            [*drawn.values()], pad_id, self.samples, self.settings.negatives, longest
        )
        lengths = [len(ids) for example in drawn.values() for ids in self._texts(example)]
        names = [self.names[i] for i in drawn]
        return arrays, Contents(names, sum(lengths), sum(map(flops, lengths)))

    @functools.cached_property
    def _lengths(self) -> np.ndarray | None:
        """Tokens of the longest text that may be used of each example, where batches need them."""
        if not self.settings.length_window:
            return None
        return np.array([
            max(map(len, [*self._texts(e), *(passage.ids for passage in e.other_positives)]))
            for e in self.examples
        ])  # fmt: skip

    def _texts(self, example: ContrastiveExample) -> list[Sequence[int]]:
        """The texts of a drawn example."""
        negatives = (passage.ids for passage in example.negatives)
        documents = example.positive.ids, *negatives
        return [example.query, *example.expansions[: self.samples], *documents]


def check_contrastive_batch(
    settings: Any, retriever: Retriever, params: Any, mesh: Mesh, queries: int
) -> None:
    """Refuses sizes that the model, its mesh or the number of training queries do not allow.

    Raises UserError, which names the settings; `params` may be shapes.
    """
    size, micro = settings.batch_size, settings.micro_batch
    devices = batch_divisor(mesh)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    width = jax.eval_shape(retriever.embed, params, token, token).shape[-1]
    if not all(1 <= dimension <= width for dimension in settings.dimensions):
        raise UserError(
            f"contrastive.dimensions {tuple(settings.dimensions)} must lie between 1 and {width}, "
            "the width of the vectors"
        )
    if queries < size:
        raise UserError(
            f"{queries} training queries do not fill one batch of {size}; lower "
            "contrastive.batch_size"
        )
    if size == 1 and not settings.negatives:
        raise UserError(
            "contrastive.batch_size is 1 and contrastive.negatives 0, so that a query's document "
            "is compared with no other; raise one of them"
        )
    if size % devices or (micro and (size % micro or micro % devices)):
        raise UserError(
            f"contrastive.batch_size {size} and micro_batch {micro} do not fit: the latter must "
            f"divide the former, and {devices} (the mesh's data and fsdp) must divide both"
        )


def check_contrastive_examples(
    settings: Any, examples: Sequence[ContrastiveExample], samples: int, names: Sequence[str]
) -> None:
    """Refuses examples, with so many expansions a query, that do not have what step A is to learn.

    Raises UserError, which names the setting, and the query where there is one.
    """
    weights = loss_weights(settings)
    expanded = samples and settings.plain_share < 1 and any(e.expansions for e in examples)
    if [*weights] == ["invariance"] and not expanded:
        raise UserError(
            "contrastive.invariance_weight alone is above 0, but no training query is expanded: "
            "there is nothing to learn"
        )
    if settings.negatives and not any(e.negatives for e in examples):
        raise UserError(
            f"contrastive.negatives is {settings.negatives}, but no training query has a negative"
        )
    if any(name in weights for name in LEARNED_FROM_A_TEACHER):
        if not settings.negatives:
            raise UserError("a teacher's scores need contrastive.negatives above 0")
        for name, example in zip(names, examples, strict=True):
            passages = example.positive, *example.negatives, *example.other_positives
            if any(passage.score is None for passage in passages):
                raise UserError(
                    f"training query {name} has no teacher's scores; without them set "
                    "contrastive.margin_mse_weight and kl_weight to 0"
                )
