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
from expandr_jax.planning.planned import (
    DEPTH,
    PROMPT_TOKENS,
    UPDATES,
    Planned,
    check_rows,
    of_retriever_alone,
    param_shapes,
    params_on,
    planned_mesh,
    random_tokens,
    shape_module,
    untrained,
)
from expandr_jax.planning.planned_encoding import encoded, sparse_module, vector_flops
from expandr_jax.planning.planned_moves import (
    merged,
    planned_gathering,
    restored,
    rewarded,
    spread_leaves,
)
from expandr_jax.planning.topology import Topology
from expandr_jax.ranking.systems import ALL_LABELS, TURNS, parse_systems
from expandr_jax.runtime.chips import TPUS
from expandr_jax.search.exact import merge_block
from expandr_jax.sharding import (
    batch_sharding,
    bytes_on_device,
    with_shardings,
)
from expandr_jax.training.flops import FROZEN, TRAINING, forward_flops
from expandr_jax.training.setup import TrainingSetup, section_optimizer
from expandr_jax.weights.families import family_of
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING

WORD = 2  # Tokens of a word of text, at most.
CHANGE = "contrastive.remat=full, or more fsdp in mesh.contrastive"


def kept_retrievers(config: Config) -> int:
    """How many retrievers a run has before last turns, the one before training among them."""
    if of_retriever_alone(config):
        return 2
    systems = parse_systems(config.evaluation.systems)
    named = set[str]().union(*(system.retrievers for system in systems))
    baselines = len(named & {"fine-tuned", ALL_LABELS})
    towers = (1 + config.distill.control) if config.distill.epochs else 0
    return 1 + baselines + config.rounds + towers


class RetrieverShapes:
    """Makes the programs of the config's retriever for a topology."""

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        section = config.retriever
        module = shape_module(section, "retriever", section.compute_dtype)
        longest = section.max_length
        self._length = min(longest, module.config.max_positions or longest)
        module, weights = kept_in(module, section.weights, "retriever.weights")
        pooling = section.pooling or family_of(module).pooling
        if pooling == SPLADE_POOLING:
            module = sparse_module(module)
        if pooling == "block":  # Its own tokens are added to the table.
            size = module.config.vocab_size + len(FORETOLD) * BLOCK_TOKENS
            module = module.clone(config=dataclasses.replace(module.config, vocab_size=size))
        if config.contrastive.lora.rank:
            module = module.clone(lora=config.contrastive.lora)
        unit = pooling != SPLADE_POOLING
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

    def _copies(self, count: int) -> int:
        """Bytes a device of so many retrievers, of which all but the first were trained.

        Where there are several processes, each has them on its host, and on its devices the first
        and what it trains.
        """
        count, held = count if self._topology.hosts == 1 else 2, self._held
        if self.frozen:  # Adapters have one base between them.
            return bytes_on_device(held) + (count - 2) * bytes_on_device(held[COLLECTION])
        return count * bytes_on_device(held)

    def resident(self) -> int:
        """Bytes a device of what a run holds: weights before training, and all those trained."""
        turns = len(TURNS) if self._config.figret.rank else 0
        return self._copies(kept_retrievers(self._config) + turns)

    def beside_training(self) -> int:
        """`resident` during the last training before turns, without an adapter's base.

        That is an argument of the training step, as is what is trained.
        """
        held = self._held
        base = bytes_on_device(held) - bytes_on_device(held[COLLECTION]) if self.frozen else 0
        return self._copies(max(2, kept_retrievers(self._config) - 1)) - base

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
        return planned_gathering(self._held, self._mesh, self.retriever.module)

    def merge(self) -> Planned:
        """The export's product of the largest update of a frozen base."""
        name = "contrastive.lora.rank"
        return merged(self.trained, self._topology, self.retriever.module, name)

    def rewards(self, rows: int) -> Planned:
        """The program of `planned_moves.rewarded`, for this retriever."""
        return rewarded(self._config, rows, self.width, self._topology, self.retriever.module)

    def contrastive(self, samples: int | None = None, least: int = 0) -> Planned:
        """A batch of step A, of which all texts are as long as they may be.

        Args:
            samples: Expansions of each query; None: as many as the config has.
            least: Negatives that it has even where the config has fewer.
        """
        config, mesh = self._config.contrastive, self._mesh
        queries, passages = config.batch_size, 1 + max(config.negatives, least)
        samples = self._config.expansion.train_samples if samples is None else samples
        check_rows(queries, mesh, "contrastive", "queries")
        if config.micro_batch and queries % config.micro_batch:
            raise UserError(
                f"contrastive.micro_batch is {config.micro_batch}; expected a divisor of {queries}"
            )
        retriever = training_retriever(self.retriever, config)
        batch = _random_batch(self.retriever.module, self._length, queries, samples, passages)
        setup, state, _ = self._training()
        texts = queries * (1 + samples + passages)
        forward = vector_flops(retriever, self.params, texts, self._length)
        forward += 2 * queries * queries * passages * self.width
        if config.query_likelihood_weight:
            sizes = queries, 2 * self._length
            logits = queries * self._length
            forward += forward_flops(retriever.module, self.params, *sizes, logits=logits)
        return self._step(
            setup,
            state,
            batch,
            retriever,
            rows=queries,
            tokens=texts * self._length,
            forward_flops=forward,
            again=bool(config.micro_batch),
            turns=texts // config.micro_batch if config.micro_batch else 1,
            change=f"a smaller contrastive.micro_batch, {CHANGE}",
        )

    def figret(self) -> Planned:
        """A step of the last turns, whose queries are plain; they have a negative at least."""
        held = bytes_on_device(self._held[COLLECTION] if self.frozen else self._held)
        turn = self.contrastive(0, least=1)
        return turn.beside(held)  # The turn's own, while the control has its turn.

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
            self._length,
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
        length = min(PROMPT_TOKENS, self._length)
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
        """A process's batch of texts: its share of what the config takes at once."""
        hosts = self._topology.hosts
        mesh = planned_mesh(self._config, "encoding", self._topology)
        rows = self._config.retriever.tokens_per_batch // hosts // self._length
        change = "a smaller retriever.tokens_per_batch"
        return encoded(self.retriever, self.params, mesh, rows, change, hosts)

    def search(self) -> Planned:
        """A block of the corpus against a batch of queries; it runs on one device."""
        options = self._config.search.exact
        rows, block = options.query_rows, options.block_rows
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
            resident=options.held_bytes(width, DEPTH),
        )


@functools.lru_cache(maxsize=2)  # A search asks for it with many settings.
def _random_batch(
    module: nn.Module, length: int, queries: int, samples: int, passages: int
) -> dict[str, np.ndarray]:
    """Queries of random tokens, each with so many expansions, and passages that nobody shares."""
    texts = iter(random_tokens(module, queries * (1 + samples + passages), length))
    examples = [
        ContrastiveExample(
            next(texts),
            [next(texts) for _ in range(samples)],
            Passage(next(texts), f"positive {i}"),
            [Passage(next(texts), f"negative {i} {j}") for j in range(passages - 1)],
        )
        for i in range(queries)
    ]
    return make_batch(examples, 0, samples, passages - 1)


def _random_pairs(module: nn.Module, rows: int, words: int, length: int) -> dict[str, np.ndarray]:
    """Pairs of passages of so many words, with a question before each block that is as long."""
    behind = random_tokens(module, 2, 2 * BLOCK_TOKENS)
    passage = max(1, min(WORD * words, length - 2 * BLOCK_TOKENS))
    texts = random_tokens(module, rows, passage)
    foretold = np.arange(passage) * np.ones((2 * rows, 1), int)  # All of them distinct.
    return pair_arrays(texts, foretold, tuple(behind), 0)
