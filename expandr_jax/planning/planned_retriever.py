"""The retriever's programs, as shapes: what trains it, encoding and search."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.models.lora import COLLECTION
from expandr_jax.models.pooling import BLOCK_TOKENS
from expandr_jax.models.quantized import kept_in
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive import contrastive_setup
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.objectives.distillation import distillation_setup, distilled_losses
from expandr_jax.objectives.llara import FORETOLD, llara_setup, pair_arrays, stage_settings
from expandr_jax.objectives.trained import (
    divided,
    drops_out,
    joined,
    training_retriever,
    with_temperature,
)
from expandr_jax.planning.flops import FROZEN, TRAINING, forward_flops
from expandr_jax.planning.planned import (
    DEPTH,
    ENCODED,
    LENGTH,
    PASSAGES,
    PROMPT,
    QUERIES,
    UPDATES,
    Planned,
    check_rows,
    param_shapes,
    params_on,
    planned_mesh,
    random_tokens,
    shape_module,
    untrained,
)
from expandr_jax.planning.planned_encoding import encoded, sparse_module, vector_flops
from expandr_jax.planning.planned_moves import (
    gathered,
    merged,
    restored,
    rewarded,
    spread_leaves,
)
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime.chips import TPUS
from expandr_jax.search.exact import merge_block
from expandr_jax.sharding import (
    batch_sharding,
    bytes_on_device,
    with_shardings,
)
from expandr_jax.training.setup import TrainingSetup, section_optimizer
from expandr_jax.weights.families import family_of
from expandr_jax.weights.sparse_encoder import SPLADE

WORD = 2  # Tokens of a word of text, at most.
CHANGE = "contrastive.remat=full, or more fsdp in mesh.contrastive"


class RetrieverShapes:
    """Makes the programs of the config's retriever for a topology."""

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        section = config.retriever
        module = shape_module(section, "retriever", section.compute_dtype)
        self._length = min(LENGTH, module.config.max_positions or LENGTH)
        module, weights = kept_in(module, section.weights, "retriever.weights")
        pooling = section.pooling or family_of(module).pooling
        if pooling == SPLADE:
            module = sparse_module(module)
        if pooling == "block":  # Its own tokens are added to the table.
            size = module.config.vocab_size + len(FORETOLD) * BLOCK_TOKENS
            module = module.clone(config=dataclasses.replace(module.config, vocab_size=size))
        if config.contrastive.lora.rank:
            module = module.clone(lora=config.contrastive.lora)
        unit = pooling != SPLADE
        self.retriever = Retriever(module, pooling, unit, self._length, "", "", None, None)
        base = param_shapes(module, weights)
        if not (config.contrastive.query_likelihood_weight or config.llara.epochs):
            base.pop("lm_head", None)  # A decoder's, which no vector needs.
        parts = functools.partial(divided, self.retriever, seed=0)
        self.frozen, self.trained = jax.eval_shape(parts, base)
        self.params = joined(self.frozen, self.trained)

    @functools.cached_property
    def width(self) -> int:
        """The dimension of a vector."""
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return jax.eval_shape(self.retriever.embed, self.params, token, token).shape[-1]

    @property
    def _mesh(self) -> Mesh:
        """Step A's devices."""
        return planned_mesh(self._config, "contrastive", self._topology)

    @property
    def _held(self) -> Any:
        """The parameters as step A's devices hold them."""
        return params_on(self._mesh, self.retriever.module, self.params)

    def resident(self) -> int:
        """Bytes a device of what a run holds: the weights before training, and those trained."""
        held = self._held
        # Adapters have one base between them.
        return bytes_on_device(held) if self.frozen else 2 * bytes_on_device(held)

    def beside_training(self) -> int:
        """`resident` without an adapter's base, which is an argument of the training step."""
        return bytes_on_device(self._held[COLLECTION]) if self.frozen else self.resident()

    def _training(self) -> tuple[TrainingSetup, Any, Any]:
        """What step A runs, its state, and what it leaves as it is."""
        config, mesh = self._config.contrastive, self._mesh
        optimizer = section_optimizer(config, UPDATES)
        setup = contrastive_setup(mesh, self.retriever, self.params, config, optimizer)
        trained = jax.eval_shape(lambda params: with_temperature(params, config), self.trained)
        return setup, setup.shapes(trained), with_shardings(self.frozen, setup.frozen)

    def restore(self) -> Planned:
        """Step A's state, read from a checkpoint, beside what it leaves as it is."""
        _, state, frozen = self._training()
        check = restored(state, self._mesh, self._topology, self.retriever.module)
        return check.beside(bytes_on_device(frozen))

    @property
    def gathers(self) -> bool:
        """Whether processes fetch what was trained from each other: each encodes with all of it."""
        return self._topology.hosts > 1 and bool(spread_leaves(self._held))

    def gather(self) -> Planned:
        """A block of the retriever's largest parameter, on its way to every host."""
        return gathered(self._held, self._mesh, self.retriever.module)

    def merge(self) -> Planned:
        """The export's product of the largest update of a frozen base."""
        name = "contrastive.lora.rank"
        return merged(self.trained, self._topology, self.retriever.module, name)

    def rewards(self, rows: int) -> Planned:
        """The program of `planned_moves.rewarded`, for this retriever."""
        return rewarded(self._config, rows, self.width, self._topology, self.retriever.module)

    def contrastive(self, samples: int = 1) -> Planned:
        """A step of A: QUERIES, each with so many expansions and PASSAGES."""
        config, mesh = self._config.contrastive, self._mesh
        check_rows(QUERIES, mesh, "contrastive", "queries")
        if config.micro_batch and QUERIES % config.micro_batch:
            raise UserError(
                f"contrastive.micro_batch is {config.micro_batch}; expected a divisor of {QUERIES}"
            )
        retriever = training_retriever(self.retriever, config)
        batch = _random_batch(self.retriever.module, self._length, samples)
        setup, state, _ = self._training()
        texts = QUERIES * (1 + samples + PASSAGES)
        forward = vector_flops(retriever, self.params, texts, self._length)
        forward += 2 * QUERIES * QUERIES * PASSAGES * self.width
        if config.query_likelihood_weight:
            sizes = QUERIES, 2 * self._length
            logits = QUERIES * self._length
            forward += forward_flops(retriever.module, self.params, *sizes, logits=logits)
        return self._step(
            setup,
            state,
            batch,
            retriever,
            rows=QUERIES,
            tokens=texts * self._length,
            forward_flops=forward,
            again=bool(config.micro_batch),
            turns=texts // config.micro_batch if config.micro_batch else 1,
            change=f"a smaller contrastive.micro_batch, {CHANGE}",
        )

    def figret(self) -> Planned:
        """A step of the last turns, whose queries are plain; they have a negative at least."""
        held = bytes_on_device(self._held[COLLECTION] if self.frozen else self._held)
        return self.contrastive(0).beside(held)  # The turn's own, while the control has its turn.

    def llara(self) -> Planned:
        """A step of LLaRA's stage: a batch of pairs of passages, each as long as it may be."""
        config, own, mesh = self._config.contrastive, self._config.llara, self._mesh
        if self.retriever.pooling != "block":
            raise UserError(
                f"llara.epochs is {own.epochs}, but retriever.pooling is "
                f"{self.retriever.pooling!r}; expected 'block'"
            )
        settings, rows = stage_settings(own, config)
        check_rows(rows, mesh, "contrastive", "pairs of passages")
        retriever = training_retriever(self.retriever, config)
        batch = _random_pairs(
            retriever.module,
            rows,
            own.passage_words,
            min(self._length, self._config.retriever.max_length),
        )
        optimizer = section_optimizer(settings, UPDATES)
        setup = llara_setup(mesh, retriever, self.params, optimizer)
        length = batch["tokens"].shape[1]
        sizes, logits = (rows, length), rows * len(FORETOLD) * BLOCK_TOKENS
        return self._step(
            setup,
            setup.shapes(self.trained),
            batch,
            retriever,
            rows=rows,
            tokens=rows * length,
            forward_flops=forward_flops(retriever.module, self.params, *sizes, logits=logits),
            change=f"a smaller contrastive.micro_batch or llara.passage_words, {CHANGE}",
        )

    def distillation(self) -> Planned:
        """A step of the query tower: its queries as long as prompts are, with documents to rank."""
        config, mesh = self._config.distill, self._mesh
        rows = config.batch_size
        check_rows(rows, mesh, "contrastive", "queries")
        retriever = training_retriever(self.retriever, self._config.contrastive)
        length = min(PROMPT, self._length)
        ids = random_tokens(retriever.module, rows, length)
        batch = {"query_ids": ids, "query_mask": np.ones_like(ids)}
        batch["targets"] = np.ones((rows, self.width), np.float32)
        documents = rows * config.depth if config.kl_weight else 0
        if documents:
            batch["documents"] = np.ones((documents, self.width), np.float32)
        optimizer = section_optimizer(config, UPDATES)
        setup = distillation_setup(
            mesh, retriever, self.params, distilled_losses, config, optimizer
        )
        forward = vector_flops(retriever, self.params, rows, length)
        forward += 2 * rows * documents * self.width
        return self._step(
            setup,
            setup.shapes(self.trained),
            batch,
            retriever,
            rows=rows,
            tokens=rows * length,
            forward_flops=forward,
            dropout=False,
            change=f"a smaller distill.batch_size or distill.depth, {CHANGE}",
        )

    def _step(
        self,
        setup: TrainingSetup,
        state: Any,
        batch: dict[str, np.ndarray],
        retriever: Retriever,
        *,
        again: bool = False,
        dropout: bool = True,
        turns: int = 1,
        **values: Any,
    ) -> Planned:
        """A training step, as the plan has it; `again`: all is computed twice, to save memory."""
        config, mesh = self._config.contrastive, self._mesh
        frozen = with_shardings(self.frozen, setup.frozen)
        needed = FROZEN if frozen else TRAINING
        passes = needed + (config.remat == "full") + again
        weights = bytes_on_device((*frozen, state.params)) * mesh.shape["fsdp"]
        key = dropout and drops_out(retriever, config)
        return Planned(
            program=setup.step,
            arguments=(
                state,
                *frozen,
                with_shardings(batch, batch_sharding(mesh)),
                jax.eval_shape(jax.random.key, 0) if key else None,
            ),
            mesh=mesh,
            parameters=(*frozen, state.params),
            module=retriever.module,
            passes=passes,
            needed=needed,
            turns=turns,
            learns=not frozen,
            moved=passes * turns * weights + bytes_on_device(state),
            values=lambda state, *rest: (untrained(state), *rest[:-2], batch, rest[-1]),
            **values,
        )

    def encoding(self) -> Planned:
        """A process's batch of texts: its share of ENCODED, or of what the config takes at once."""
        hosts = self._topology.hosts
        mesh = planned_mesh(self._config, "encoding", self._topology)
        rows = self._config.retriever.tokens_per_batch // hosts // self._length
        rows = min(max(1, ENCODED // hosts), rows)
        change = "a smaller retriever.tokens_per_batch"
        return encoded(self.retriever, self.params, mesh, rows, change, hosts)

    def search(self) -> Planned:
        """A block of the corpus against QUERIES; it runs on one device."""
        rows, block = QUERIES, self._config.search.exact.block_rows
        width = self.width
        sharding = SingleDeviceSharding(self._topology.devices[0])

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        number = array(dtype=jnp.int32)
        best = array(rows, DEPTH), array(rows, DEPTH, dtype=jnp.int32)
        return Planned(
            program=merge_block,
            arguments=(*best, array(rows, width), array(block, width), number, number),
            mesh=None,
            parameters=(),
            module=self.retriever.module,
            rows=rows,
            tokens=0,
            forward_flops=2 * rows * block * width,
            # A product in float32 is six in bfloat16 on a TPU.
            passes=6 if self._topology.chip.name in TPUS else 1,
            moved=4 * (rows * width + block * width + 2 * rows * block),
            change="fewer rows in a block (search.exact.block_rows) or a smaller resident_mib",
            resident=self._config.search.exact.held_bytes(width, DEPTH),
        )


@functools.lru_cache(maxsize=2)  # A search asks for it with many settings.
def _random_batch(module: nn.Module, length: int, samples: int) -> dict[str, np.ndarray]:
    """QUERIES of random tokens, each with so many expansions and PASSAGES that nobody shares."""
    texts = iter(random_tokens(module, QUERIES * (1 + samples + PASSAGES), length))
    examples = [
        ContrastiveExample(
            next(texts),
            [next(texts) for _ in range(samples)],
            Passage(next(texts), f"positive {i}"),
            [Passage(next(texts), f"negative {i} {j}") for j in range(PASSAGES - 1)],
        )
        for i in range(QUERIES)
    ]
    return make_batch(examples, 0, samples, PASSAGES - 1)


def _random_pairs(module: nn.Module, rows: int, words: int, length: int) -> dict[str, np.ndarray]:
    """Pairs of passages of so many words, with a question before each block that is as long."""
    behind = random_tokens(module, 2, 2 * BLOCK_TOKENS)
    passage = max(1, min(WORD * words, length - 2 * BLOCK_TOKENS))
    texts = random_tokens(module, rows, passage)
    foretold = np.arange(passage) * np.ones((2 * rows, 1), int)  # All of them distinct.
    return pair_arrays(texts, foretold, tuple(behind), 0)
