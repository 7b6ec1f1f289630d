"""Plans of what not every run has: LLaRA, FiGRet, sparse vectors, lists; counted by hand."""

import math

import jax
import numpy as np
import pytest

from expandr_jax.config import with_settings
from expandr_jax.errors import UserError
from expandr_jax.models.pooling import BLOCK_TOKENS
from expandr_jax.objectives.llara import LlaraBatches
from expandr_jax.planning.host_stages import INDEX, LINE, TERMS, TOKEN_BYTES
from expandr_jax.planning.hosts import host_rows
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.planning.programs import planned_programs
from expandr_jax.planning.synthetic import Counts
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime.chips import GIB
from expandr_jax.sharding import bytes_on_device
from expandr_jax.training.flops import forward_flops
from expandr_jax.weights.hf import load_retriever
from tests.eight_devices import CHIP, PROGRAMS, QUIET, machine, smoke_on_meshes
from tests.llm_ql_test import TINY_LLAMA
from tests.retriever_training_test import TINY
from train import plan

ALONE = {"generator.source": ""}
BLOCKS = {"retriever.source": TINY_LLAMA, "retriever.pooling": "block", "retriever.max_length": 64,
          "llara.epochs": 1.0, "contrastive.micro_batch": 0,
          "contrastive.batch_size": 16}  # fmt: skip
SPARSE = {"retriever.pooling": "splade", "contrastive.normalize": "none"}
LISTS = {"evaluation.systems": ("bm25", "rrf:bm25:listwise:bm25"),
         "generator.prompt_buckets": (96, 160), "evaluation.listwise.window": 10}  # fmt: skip
PAIRS = {"evaluation.systems": ("rerank:bm25",), "evaluation.rerank.source": TINY,
         "evaluation.rerank.max_length": 32, "evaluation.rerank.rows": 8}  # fmt: skip
BY_SPLADE = {"evaluation.systems": ("splade", "splade+q2d"), "evaluation.splade.source": TINY}
ADAPTED = {"contrastive.lora.rank": 4}
FIGRET = {"figret.rank": 10, "figret.queries": 100}
RETRIEVER = ["contrastive step", "retriever restored", "corpus encoding"]


@pytest.fixture(scope="module")
def config():
    return smoke_on_meshes()


@pytest.mark.parametrize(
    ("settings", "programs"),
    [
        (FIGRET, [*PROGRAMS, "FiGRet step"]),
        (LISTS, [*PROGRAMS, "listwise prefill", "listwise decode"]),
        (BY_SPLADE, [*PROGRAMS, "sparse encoding"]),
        (PAIRS, [*PROGRAMS, "pairs scored by rerank"]),
        (ADAPTED, [*PROGRAMS, "retriever merged for export"]),
        (ALONE, [*RETRIEVER, "exact search"]),
        (ALONE | ADAPTED, [*RETRIEVER, "exact search", "retriever merged for export"]),
        (BLOCKS, ["LLaRA step", *RETRIEVER, "exact search"]),
        (SPARSE, RETRIEVER),
    ],
)
def test_a_run_s_programs_follow_from_its_config(config, settings, programs):
    assert [*planned_programs(with_settings(config, settings), machine())] == programs


def test_batches_lengths_and_slots_are_the_config_s(config):
    changes = {
        "retriever.max_length": 32, "contrastive.batch_size": 64, "contrastive.micro_batch": 16,
        "contrastive.negatives": 3, "expansion.train_samples": 2, "generator.slots": 32,
        "candidates.max_new_tokens": 40, "dpo.batch_size": 8, "dpo.prompt_length": 20,
        "dpo.response_length": 30,
    }  # fmt: skip
    programs = planned_programs(with_settings(config, changes), machine())
    step, pairs, decode = (programs[n]() for n in ("contrastive step", "DPO step", "decode"))
    # While prompts are read, and when they go to their slots, all else of the engine is there.
    prefill, insert = programs["prefill"](), programs["prompts to slots"]()
    slots, weights = bytes_on_device(decode.arguments[1]), bytes_on_device(decode.arguments[0])
    assert prefill.resident - decode.resident == slots == bytes_on_device(insert.arguments[0])
    assert insert.resident - decode.resident == weights
    # A query, two expansions, its document and three negatives.
    assert (step.rows, step.tokens) == (64, 64 * 7 * 32)
    assert (pairs.rows, pairs.tokens) == (8, 8 * (20 + 2 * 30))
    assert decode.arguments[1].output.shape == (32, 40)
    assert decode.rows == 32
    assert programs["prefill"]().tokens % 20 == 0
    hours = plan.paper_chip_hours(
        {name: {"roofline_seconds": 3600.0, "rows": planned.rows, "shares": 1}
         for name, planned in (("contrastive step", step), ("DPO step", pairs),
                               ("reference log-probabilities", pairs), ("decode", decode),
                               ("prefill", decode))},
        1, config,
    )  # fmt: skip
    assert hours["contrastive"] == 3 * math.ceil(709_000 / 64)
    assert hours["DPO"] == 3 * 30_000 / 8


def test_llara_reads_passages_and_both_blocks(config):
    """Batches are as those of a run, and so is the model."""
    config = with_settings(config, BLOCKS)
    planned = planned_programs(config, machine())["LLaRA step"]()
    shapes = RetrieverShapes(config, machine())
    options = {"pooling": "block", "normalize": True, "max_length": 64, "with_head": True}
    retriever, params = load_retriever(TINY_LLAMA, **options)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes.params)
    of_run = LlaraBatches([("the norm", "of an array")] * 8, retriever, 8, seed=0).batch(0)[0]
    (_, batch, _), rows = planned.arguments, config.contrastive.batch_size
    assert {n: (a.dtype, a.ndim) for n, a in batch.items()} == {
        n: (a.dtype, a.ndim) for n, a in of_run.items()
    }
    # 32 words of two tokens, cut to what 64 tokens have room for, and both suffixes.
    assert (planned.rows, planned.tokens) == (rows, rows * 128)
    assert np.sum(np.asarray(planned.values(*planned.arguments)[1]["segments"]) > 0) == rows * (
        64 - 2 * BLOCK_TOKENS + 2 * 2 * BLOCK_TOKENS
    )
    assert batch["words"].shape[0] == 2 * rows
    logits = rows * 2 * BLOCK_TOKENS
    expected = forward_flops(retriever.module, params, rows, 128, logits=logits)
    assert planned.model_flops == 3 * expected
    with pytest.raises(UserError, match=r"^llara\.epochs is 1\.0, but retriever\.pooling is 'last"):
        planned_programs(with_settings(config, {"retriever.pooling": "last"}), machine())[
            "LLaRA step"
        ]()


def test_a_micro_batch_of_llara_is_a_batch_whose_gradients_are_kept(config):
    whole, parts = (
        RetrieverShapes(with_settings(config, {**BLOCKS, **settings}), machine()).llara()
        for settings in (
            {"contrastive.batch_size": 32},
            {"contrastive.batch_size": 32, "contrastive.micro_batch": 8},
        )
    )
    assert (whole.rows, parts.rows) == (32, 8)
    held = bytes_on_device(parts.arguments[0]) - bytes_on_device(whole.arguments[0])
    assert held == pytest.approx(bytes_on_device(whole.arguments[0].params), rel=0.01)


def test_figret_s_queries_are_plain_and_two_retrievers_more_are_there(config):
    programs = planned_programs(with_settings(config, FIGRET), machine())
    step, turn = programs["contrastive step"](), programs["FiGRet step"]()
    assert turn.tokens == step.tokens * 3 // 4  # A query, its document and a negative.
    names = {name for name in step.arguments[1] if name not in turn.arguments[1]}
    assert names == {"expansion_ids", "expansion_mask", "present"}
    held = RetrieverShapes(config, machine()).resident() / 3  # Fine-tuned, and ours.
    assert turn.resident - step.resident == held
    adapted = planned_programs(with_settings(config, FIGRET | ADAPTED), machine())
    step, turn = adapted["contrastive step"](), adapted["FiGRet step"]()
    assert 0 < turn.resident - step.resident < held / 2  # The base is shared.


def test_one_process_has_every_retriever_on_its_devices(config):
    def held(settings, hosts=1):
        devices = jax.devices("cpu")[:8]
        topology = Topology("hosts", devices, CHIP, devices[: 8 // hosts])
        return RetrieverShapes(with_settings(config, settings), topology)

    ours = {"evaluation.systems": ("expandr",)}
    one = held(ours).resident() / 2
    assert held({}).resident() == 3 * one
    assert held({"rounds": 3}).resident() == 5 * one
    assert held(FIGRET).resident() == 5 * one  # The turn, and the control.
    assert held({"rounds": 3}).beside_training() == 4 * one
    assert held({"rounds": 3}, hosts=2).resident() == 2 * one
    # Adapters share what they were trained on.
    adapters = held(ADAPTED | {"rounds": 3}).resident() - held(ADAPTED | {"rounds": 2}).resident()
    assert 0 < adapters < one / 2


def test_sparse_vectors_are_as_wide_as_the_vocabulary(config):
    shapes = RetrieverShapes(with_settings(config, SPARSE), machine())
    model = shapes.retriever.module.config
    encoding = shapes.encoding()
    vectors = jax.eval_shape(encoding.program, *encoding.arguments)
    assert vectors.shape == (encoding.rows, model.vocab_size)
    plain = RetrieverShapes(config, machine())
    head = 2 * model.hidden_size * (model.hidden_size + model.vocab_size)
    assert encoding.model_flops == plain.encoding().model_flops + encoding.tokens * head
    with pytest.raises(UserError, match=r"is of type bert, .*; this shape is a Decoder's"):
        RetrieverShapes(with_settings(config, {**BLOCKS, **SPARSE}), machine())
    rows = planned_programs(with_settings(config, BY_SPLADE), machine())["sparse encoding"]()
    assert rows.shares == 1
    assert (rows.rows, rows.tokens) == (32, 32 * 64)  # tiny-bert reads 64 tokens of a text.


def test_one_process_has_all_slots_for_lists(config):
    devices = jax.devices("cpu")[:8]
    two = Topology("two hosts", devices, CHIP, devices[:4])
    programs = planned_programs(with_settings(config, LISTS), two)
    decode, prefill = programs["listwise decode"](), programs["listwise prefill"]()
    assert (decode.rows, decode.shares, programs["decode"]().rows) == (512, 1, 256)
    assert [*decode.arguments[0]] == ["params"]
    # 10 places of 6 tokens, and 10 more, behind a prompt of 160.
    assert decode.arguments[1].output.shape == (512, 70)
    assert prefill.tokens == prefill.rows * 160
    narrow = with_settings(config, {**LISTS, "generator.prompt_buckets": (96, 512)})
    prefill = planned_programs(narrow, two)["listwise prefill"]()
    assert prefill.tokens == prefill.rows * (256 - 70)  # Which is what the model reads.


def test_pairs_are_scored_on_one_device(config):
    planned = planned_programs(with_settings(config, PAIRS), machine())["pairs scored by rerank"]()
    assert (planned.rows, planned.tokens, planned.devices) == (8, 8 * 32, 1)
    plain = RetrieverShapes(config, machine())
    module = plain.retriever.module
    width = module.config.hidden_size
    head = 2 * 8 * width * (width + 1)  # Of one token each.
    assert planned.model_flops == forward_flops(module, plain.params, 8, 32) + head


def hosts(config, settings, counts):
    changed = with_settings(config, settings)
    return {row.stage: row for row in host_rows(changed, counts, machine(), 8 * GIB)}


def test_hosts_have_rows_for_them(config):
    counts = Counts(1000, 320, 80, 20, 40)
    plain = hosts(config, {}, counts)
    figret = hosts(config, FIGRET, counts)
    added = {"queries that fail", "easier passages", "FiGRet, 2 trainings"}
    assert added <= figret.keys() - plain.keys()
    assert figret["easier passages"].bytes_disk == 3 * 100 * (8 * TOKEN_BYTES + LINE)
    (name,) = (stage for stage in plain if stage.startswith("step A"))
    each = plain[name].bytes_disk / int(name.split()[2])
    assert figret["FiGRet, 2 trainings"].bytes_disk == pytest.approx(2 * each)
    retriever = RetrieverShapes(config, machine())
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(retriever.params))
    assert figret["models"].bytes_memory - plain["models"].bytes_memory == 2 * size
    assert figret["export"].bytes_disk - plain["export"].bytes_disk == size

    lists = hosts(config, {**LISTS, "evaluation.listwise.depth": 20}, counts)["orders of passages"]
    # Windows of 10 move by the stride of the config over 20 documents.
    stride = config.evaluation.listwise.stride
    each = 1 + math.ceil(10 / stride)
    asked = 40 + 20 * bool(config.evaluation.listwise.depths)
    texts = asked * each
    assert lists.bytes_disk == texts * (60 * TOKEN_BYTES + LINE)
    more = hosts(config, {**LISTS, "evaluation.listwise.depth": 20}, Counts(1000, 320, 80, 20, 80))
    extra = more["orders of passages"].bytes_memory - lists.bytes_memory
    assert extra > 40 * each * INDEX
    sparse = hosts(config, BY_SPLADE, counts)["sparse index"]
    assert sparse.bytes_disk == 1000 * TERMS * 8


def test_hosts_of_a_retriever_s_own_run(config):
    counts = Counts(1000, 320, 80, 20, 40)
    rows = hosts(config, ALONE, counts)
    assert [*rows] == ["data", "models", "step A, 1 training", "export"]
    with_dev = hosts(config, {**BLOCKS, "data.dev": "somewhere"}, counts)
    assert [*with_dev] == ["data", "models", "LLaRA", "step A, 1 training",
                           "each evaluation on dev", "export"]  # fmt: skip
    assert all(row.fits for row in with_dev.values())
    few = hosts(config, {**BLOCKS, "llara.pairs": 10}, counts)
    assert few["LLaRA"].bytes_memory < with_dev["LLaRA"].bytes_memory
    plan.show_hosts([{**vars(row), "fits": row.fits} for row in rows.values()], QUIET)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "only"),
    [
        (BLOCKS, ("LLaRA step", "corpus encoding", "exact search")),
        ({**BLOCKS, **ADAPTED}, ("LLaRA step", "retriever merged for export")),
        (SPARSE, ("corpus encoding", "retriever restored")),
        (FIGRET | BY_SPLADE, ("sparse encoding",)),
        (LISTS, ("listwise prefill", "listwise decode")),
        (PAIRS, ("pairs scored by rerank",)),
    ],
)
def test_they_are_compiled_and_run(config, settings, only):
    planned = plan.plan(with_settings(config, settings), machine(), QUIET, only, repeats=1)
    assert all(row["fits"] and row["seconds"] > 0 for row in planned["rows"])
    assert planned["paper_chip_hours"] is None
    plan.show_plan(planned, QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FIGRET, SPARSE])
def test_their_steps_fit(config, settings):
    name = "FiGRet step" if settings is FIGRET else "contrastive step"
    (row,) = plan.plan(with_settings(config, settings), machine(), QUIET, [name])["rows"]
    assert row["fits"]
    assert row["bytes_temporary"] > 0
