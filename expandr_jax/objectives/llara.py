"""A decoder learns from texts alone to say in eight states what they say (LLaRA, arXiv 2312.15503).

Behind a passage stand two blocks, which see the passage and themselves and not each other. The
first is to foretell the passage's own words, the second those of the passage that follows it: these
blocks are what step A then reads passages and queries by (`pooling.BLOCK_TOKENS`). The released
code adds the usual loss of the next token, which is left out here.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from expandr_jax.data.batches import batch_indices, pad
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.losses.language import bag_of_words_loss
from expandr_jax.models.mask import Mask
from expandr_jax.models.pooling import BLOCK_TOKENS
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive_checks import check_contrastive_batch
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.objectives.trained import (
    Frozen,
    divided,
    drops_out,
    joined,
    shardings_of,
    training_retriever,
    with_frozen_base,
)
from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.settings import MANY, count, number
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import TrainingSetup, count_updates, section_optimizer, set_up
from expandr_jax.training.stage import on_devices, train_stage
from expandr_jax.training.train_state import TrainState

LLARA = "llara"  # The stage, as its section is called.
FORETOLD = ("own", "next")  # The text whose words each block foretells.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlaraSettings:
    """The section `llara`, of the stage before step A; the rest is as there."""

    epochs: Annotated[float, number(least=0, most=MANY)]
    passage_words: Annotated[int, count(1)]
    pairs: Annotated[int, count(0)]


def passage_pairs(texts: Iterable[str], words: int) -> Iterator[tuple[str, str]]:
    """Each passage of the texts with the one that follows it in the same text.

    Passages have so many words, or half of a text's where it has fewer than two of them; the last
    one of a text may be shorter. A text of one word has no pair.
    """
    for text in texts:
        every = text.split()
        size = min(words, -(-len(every) // 2))
        starts = range(0, len(every), max(size, 1))
        passages = (" ".join(every[start : start + size]) for start in starts)
        yield from itertools.pairwise(passages)


def stage_settings(own: LlaraSettings, step_a: Any) -> tuple[Any, int]:
    """The stage's settings, which are step A's but for its epochs, and the pairs of a batch.

    Losses of rows are apart from each other, so that a micro-batch is a batch.
    """
    size = step_a.micro_batch or step_a.batch_size
    parts = max(1, step_a.accumulation * step_a.batch_size // size)
    return dataclasses.replace(step_a, epochs=own.epochs, accumulation=parts), size


def pair_arrays(
    passages: Sequence[Sequence[int]],
    words: Sequence[Sequence[int]],
    behind: tuple[Sequence[int], Sequence[int]],
    pad_id: int,
) -> dict[str, np.ndarray]:
    """The arrays of a batch, as `LlaraBatches.batch` has them.

    Args:
        passages: Token ids of each, without suffixes.
        words: Distinct ids of each passage and of what follows it, a pair's side by side.
        behind: The suffixes of both blocks.
        pad_id: Fills texts up.
    """
    sizes = [*map(len, behind)]
    parts = {
        "tokens": ([[*ids, *behind[0], *behind[1]] for ids in passages], pad_id),
        "positions": (
            [
                [*range(len(ids) + sizes[0]), *range(len(ids), len(ids) + sizes[1])]
                for ids in passages
            ],
            0,
        ),
        "segments": ([[1] * len(ids) + [2] * sizes[0] + [3] * sizes[1] for ids in passages], 0),
    }
    arrays = {name: pad(*part)[0] for name, part in parts.items()}
    ends = np.array([[len(ids) + sizes[0], len(ids) + sum(sizes)] for ids in passages])
    own = ends[..., None] + np.arange(-BLOCK_TOKENS, 0)
    arrays["block_positions"] = own.reshape(len(passages), -1).astype(np.int32)
    arrays["words"], given = pad(words, 0)
    return arrays | {"given": given > 0}


@dataclasses.dataclass(frozen=True)
class LlaraBatches:
    """The batches of the stage; each is a function of the seed and the step's number alone.

    Attributes:
        pairs: From `passage_pairs`.
        retriever: Reads them.
        batch_size: Pairs a batch.
        seed: What the order depends on.
    """

    pairs: Sequence[tuple[str, str]]
    retriever: Retriever
    batch_size: int
    seed: int

    def indices(self, number: int) -> np.ndarray:
        """Which pairs a step has."""
        return batch_indices(self.seed, number, len(self.pairs), self.batch_size)

    def batch(
        self, number: int, rows: np.ndarray | slice = slice(None)
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Some rows of a step's arrays, padded as all are, and tokens of all.

        The arrays "tokens", "positions" and "segments" are [rows, length] int32: a passage, 1,
        the first block, 2, and the second, 3, which is where it would be without the first; 0 is
        padding. "block_positions" [rows, 2 * BLOCK_TOKENS] are those of the blocks' own tokens,
        "words" and "given" [2 * rows, count] the words of passages and of what follows, a pair's
        side by side.
        """
        retriever = self.retriever
        pairs = [self.pairs[i] for i in self.indices(number)]
        behind = retriever.document_suffix, retriever.query_suffix
        texts = [
            ids[: -len(behind[0])]
            for ids in retriever.token_ids([own for own, _ in pairs], "document")
        ]
        both = [text for pair in pairs for text in pair]
        found = retriever.tokenizer(both, add_special_tokens=False)["input_ids"]
        words = [sorted({*ids}) for ids in found]
        arrays = pair_arrays(texts, words, behind, retriever.tokenizer.pad_token_id)
        for name, array in arrays.items():
            if len(array) == len(texts):
                arrays[name] = array[rows]
            else:
                arrays[name] = array.reshape(len(texts), 2, -1)[rows].reshape(-1, array.shape[1])
        tokens = [len(ids) + len(behind[0]) + len(behind[1]) for ids in texts]
        return arrays, np.array(tokens, np.int32)


def llara_losses(
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    retriever: Retriever,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`bag_of_words_loss` of both blocks: [rows, 2] float32, as `FORETOLD` has them.

    Args:
        params: As of `Retriever.embed`, with the head.
        batch: From `LlaraBatches`.
        retriever: Pooled by "block".
        dropout_key: Turns dropout on.
    """
    mask = Mask(batch["segments"], causal=True, responses=2)
    inputs = batch["tokens"], batch["positions"], mask
    hidden = retriever.states(params, *inputs, dropout_key=dropout_key)
    states = jnp.take_along_axis(hidden, batch["block_positions"][..., None], axis=1)
    shape = len(states), 2, -1
    logits = retriever.logits(params, states).reshape(*shape[:2], BLOCK_TOKENS, -1)
    return bag_of_words_loss(logits, batch["words"].reshape(shape), batch["given"].reshape(shape))


def llara_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    retriever: Retriever,
    optimizer: optax.GradientTransformation,
    frozen: Frozen = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update: (state, batch, key) -> (state, metrics), dropout drawn from (key, step)."""
    key = None if key is None else jax.random.fold_in(key, state.step)

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = joined(frozen, params)
        means = jnp.mean(llara_losses(model, batch, retriever=retriever, dropout_key=key), axis=0)
        return jnp.sum(means), means

    (loss, means), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    metrics |= {f"{text}_words": mean for text, mean in zip(FORETOLD, means, strict=True)}
    return state.apply(grads, optimizer), metrics


def llara_setup(
    mesh: Mesh, retriever: Retriever, params: Any, optimizer: optax.GradientTransformation
) -> TrainingSetup:
    """Sets the stage up; the retriever is from `training_retriever`, with parameters or shapes."""
    held, trained, shardings = shardings_of(mesh, retriever, params)
    step = with_frozen_base(llara_step) if held else llara_step
    step = functools.partial(step, retriever=retriever)
    return set_up(mesh, step, trained, shardings, optimizer, *held)


def train_blocks(
    stage: TrainedStage,
    models: RetrieverModel,
    triples: Sequence[Triple],
    own: LlaraSettings,
    step_a: ContrastiveSettings,
    seed: int,
) -> Any:
    """The retriever's parameters after the stage, as each process can read them all.

    Args:
        stage: Where it is recorded and kept.
        models: The retriever's module and mesh.
        triples: Their documents are learned from, each once; no query is.
        own, step_a: The config's sections `llara` and `contrastive`.
        seed: That of the order of documents and of batches.

    Raises:
        UserError: The retriever has no blocks, there are too few texts, or training diverges.
    """
    mesh = models.contrastive_mesh
    settings, size = stage_settings(own, step_a)
    retriever = training_retriever(models.retriever, step_a)
    if retriever.pooling != "block":
        raise UserError(
            f"llara.epochs is {settings.epochs}, but the retriever's pooling is "
            f"{retriever.pooling!r}; expected retriever.pooling 'block'"
        )
    check_contrastive_batch(step_a, retriever, models.retriever_params, mesh, len(triples))
    texts = [*dict.fromkeys(text for t in triples for text in (*t.positives, *t.negatives))]
    drawn = (texts[i] for i in np.random.default_rng(seed).permutation(len(texts)))
    every = passage_pairs(drawn, own.passage_words)
    pairs = [*itertools.islice(every, own.pairs or None)]
    if len(pairs) < size:
        raise UserError(
            f"{len(pairs)} pairs of passages do not fill one batch of {size}; lower "
            "llara.passage_words or contrastive.batch_size"
        )
    stage.log.reporter.say(f"{LLARA}: {len(pairs)} pairs of passages, of {len(texts)} documents")
    batches = LlaraBatches(pairs, retriever, size, seed)
    updates = count_updates(settings, len(pairs) // size)
    steps = updates * settings.accumulation
    optimizer = section_optimizer(settings, updates)
    params = models.retriever_params
    setup = llara_setup(mesh, retriever, params, optimizer)
    held, trained = divided(retriever, params, seed)
    frozen = device_put(held, setup.frozen)
    rows = rows_here(mesh, size)
    key = jax.random.key(seed) if drops_out(retriever, step_a) else None
    identity = {
        "model": models.retriever_hash,
        "settings": hash_json([identity_of("llara", own), identity_of("contrastive", settings)]),
        "pairs": hash_json(pairs),
        "retriever": retriever.identity,
        "steps": steps,
    }

    flops = row_flops(retriever.module, params, bool(held))

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        arrays, tokens = batches.batch(step, rows)
        names = [f"pair {i}" for i in batches.indices(step)]
        return arrays, Contents(names, int(tokens.sum()), sum(map(flops, tokens.tolist())))

    trained = train_stage(
        stage,
        setup,
        device_put(trained, setup.shardings.params),
        on_devices(stage.log.processes, batch, mesh, rows, size),
        identity=identity,
        settings=settings,
        steps=steps,
        frozen=frozen,
        key=key,
    )
    return joined(held, whole(trained))
