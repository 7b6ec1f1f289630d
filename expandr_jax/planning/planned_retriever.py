"""The retriever's programs, as shapes: step A, encoding and search."""

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
from expandr_jax.models.quantized import kept_in
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive import contrastive_setup
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.objectives.distillation import distillation_setup, distilled_losses
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
from expandr_jax.planning.planned_moves import gathered, restored, rewarded, spread_leaves
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime.chips import TPUS
from expandr_jax.search.exact import merge_block
from expandr_jax.sharding import (
    batch_divisor,
    batch_sharding,
    bytes_on_device,
    with_shardings,
)
from expandr_jax.training.setup import TrainingSetup, section_optimizer
from expandr_jax.vectors.encoder import embedder
from expandr_jax.weights.families import family_of
from expandr_jax.weights.sparse_encoder import SPLADE

TEXTS = 2 + PASSAGES  # A query, its expansion and its passages.


class RetrieverShapes:
    """Makes the programs of the config's retriever for a topology."""

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        section = config.retriever
        module = shape_module(section, "retriever", section.compute_dtype)
        self._length = min(LENGTH, module.config.max_positions or LENGTH)
        module, weights = kept_in(module, section.weights, "retriever.weights")
        if config.contrastive.lora.rank:
            module = module.clone(lora=config.contrastive.lora)
        pooling = section.pooling or family_of(module).pooling
        if pooling == SPLADE:
            raise UserError("retriever.pooling is 'splade', whose programs no plan has yet")
        self.retriever = Retriever(module, pooling, True, self._length, "", "", None, None)
        base = param_shapes(module, weights)
        if not config.contrastive.query_likelihood_weight:
            base.pop("lm_head", None)  # A decoder's, which no vector needs.
        parts = functools.partial(divided, self.retriever, seed=0)
        self.frozen, self.trained = jax.eval_shape(parts, base)
        self.params = joined(self.frozen, self.trained)

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
        """The same, less what training takes as its own argument: the base of an adapter."""
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

    def rewards(self, rows: int) -> Planned:
        """As of `planned_moves.rewarded`."""
        module = self.retriever.module
        return rewarded(self._config, rows, module.config.hidden_size, self._topology, module)

    def contrastive(self) -> Planned:
        """A step of A: QUERIES, each with an expansion and PASSAGES."""
        config, mesh = self._config.contrastive, self._mesh
        check_rows(QUERIES, mesh, "contrastive", "queries")
        if config.micro_batch and QUERIES % config.micro_batch:
            raise UserError(
                f"contrastive.micro_batch is {config.micro_batch}; expected a divisor of {QUERIES}"
            )
        retriever = training_retriever(self.retriever, config)
        batch = _random_batch(self.retriever.module, self._length)
        setup, state, frozen = self._training()
        texts = QUERIES * TEXTS
        forward = forward_flops(retriever.module, self.params, texts, self._length)
        forward += 2 * QUERIES * QUERIES * PASSAGES * retriever.module.config.hidden_size
        if config.query_likelihood_weight:
            sizes = QUERIES, 2 * self._length
            logits = QUERIES * self._length
            forward += forward_flops(retriever.module, self.params, *sizes, logits=logits)
        needed = FROZEN if frozen else TRAINING
        passes = needed + (config.remat == "full") + bool(config.micro_batch)
        turns = texts // config.micro_batch if config.micro_batch else 1
        weights = bytes_on_device((*frozen, state.params)) * mesh.shape["fsdp"]
        return Planned(
            program=setup.step,
            arguments=(
                state,
                *frozen,
                with_shardings(batch, batch_sharding(mesh)),
                jax.eval_shape(jax.random.key, 0) if drops_out(retriever, config) else None,
            ),
            mesh=mesh,
            parameters=(*frozen, state.params),
            module=retriever.module,
            rows=QUERIES,
            tokens=texts * self._length,
            forward_flops=forward,
            passes=passes,
            needed=needed,
            turns=turns,
            learns=not frozen,
            moved=passes * turns * weights + bytes_on_device(state),
            change="a smaller contrastive.micro_batch, contrastive.remat=full, or more fsdp in "
            "mesh.contrastive",
            values=lambda state, *rest: (untrained(state), *rest[:-2], batch, rest[-1]),
        )

    def distillation(self) -> Planned:
        """A step of the query tower: its queries as long as prompts are, with documents to rank."""
        config, mesh = self._config.distill, self._mesh
        rows = config.batch_size
        check_rows(rows, mesh, "contrastive", "queries")
        retriever = training_retriever(self.retriever, self._config.contrastive)
        length, width = min(PROMPT, self._length), retriever.module.config.hidden_size
        ids = random_tokens(retriever.module, rows, length)
        batch = {"query_ids": ids, "query_mask": np.ones_like(ids)}
        batch["targets"] = np.ones((rows, width), np.float32)
        documents = rows * config.depth if config.kl_weight else 0
        if documents:
            batch["documents"] = np.ones((documents, width), np.float32)
        optimizer = section_optimizer(config, UPDATES)
        setup = distillation_setup(
            mesh, retriever, self.params, distilled_losses, config, optimizer
        )
        state = setup.shapes(self.trained)
        frozen = with_shardings(self.frozen, setup.frozen)
        forward = forward_flops(retriever.module, self.params, rows, length)
        forward += 2 * rows * documents * width
        needed = FROZEN if frozen else TRAINING
        passes = needed + (self._config.contrastive.remat == "full")
        weights = bytes_on_device((*frozen, state.params)) * mesh.shape["fsdp"]
        return Planned(
            program=setup.step,
            arguments=(state, *frozen, with_shardings(batch, batch_sharding(mesh)), None),
            mesh=mesh,
            parameters=(*frozen, state.params),
            module=retriever.module,
            rows=rows,
            tokens=rows * length,
            forward_flops=forward,
            passes=passes,
            needed=needed,
            learns=not frozen,
            moved=passes * weights + bytes_on_device(state),
            change="a smaller distill.batch_size or distill.depth, contrastive.remat=full, or more "
            "fsdp in mesh.contrastive",
            values=lambda state, *rest: (untrained(state), *rest[:-2], batch, rest[-1]),
        )

    def encoding(self) -> Planned:
        """A process's batch of texts: its share of ENCODED, or of what the config takes at once."""
        hosts = self._topology.hosts
        mesh = planned_mesh(self._config, "encoding", self._topology)
        divisor = batch_divisor(mesh)
        rows = self._config.retriever.tokens_per_batch // hosts // self._length
        rows = min(max(1, ENCODED // hosts), max(1, rows // divisor) * divisor)
        check_rows(rows, mesh, "encoding", "texts")
        params = params_on(mesh, self.retriever.module, self.params)
        texts = jax.ShapeDtypeStruct((rows, self._length), jnp.int32, sharding=batch_sharding(mesh))
        forward = forward_flops(self.retriever.module, self.params, rows, self._length)
        return Planned(
            program=embedder(mesh, self.retriever),
            arguments=(params, texts, texts),
            mesh=mesh,
            parameters=params,
            module=self.retriever.module,
            rows=rows,
            tokens=rows * self._length,
            forward_flops=forward,
            moved=bytes_on_device(params) * mesh.shape["fsdp"],
            change="a smaller retriever.tokens_per_batch",
            shares=hosts,
            values=lambda params, *_: (
                params,
                random_tokens(self.retriever.module, rows, self._length),
                np.ones((rows, self._length), np.int32),
            ),
        )

    def search(self) -> Planned:
        """A block of the corpus against QUERIES; it runs on one device."""
        rows, block = QUERIES, self._config.search.exact.block_rows
        width = self.retriever.module.config.hidden_size
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


@functools.lru_cache(maxsize=1)  # A search asks for it with many settings.
def _random_batch(module: nn.Module, length: int) -> dict[str, np.ndarray]:
    """QUERIES of random tokens, each with an expansion and PASSAGES that nobody shares."""
    texts = iter(random_tokens(module, QUERIES * TEXTS, length))
    examples = [
        ContrastiveExample(
            next(texts),
            [next(texts)],
            Passage(next(texts), f"positive {i}"),
            [Passage(next(texts), f"negative {i} {j}") for j in range(PASSAGES - 1)],
        )
        for i in range(QUERIES)
    ]
    return make_batch(examples, 0, 1, PASSAGES - 1)
