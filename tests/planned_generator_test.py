"""What the generator's programs send between devices: what their sharding needs, and no more."""

import json
import math

import jax

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.planning import compiled
from expandr_jax.planning import programs as plan_programs
from expandr_jax.planning.planned_generator import GeneratorShapes
from tests.eight_devices import CHIP, machine


def wide_model(tmp_path, layers):
    """The smoke config on 8 devices, with a generator whose matrices have 4 MiB and more."""
    shape = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 2048, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 512,
        "intermediate_size": 4096, "rope_theta": 1e4,
    }  # fmt: skip
    (tmp_path / "wide.json").write_text(json.dumps(shape))
    wide = smoke.get_config()
    wide.generator.slots = 512
    wide.candidates.max_new_tokens = 512
    wide.dpo.update(batch_size=16, prompt_length=100, response_length=512)
    wide.mesh.update(sampling=(-1, 1, 2), dpo=(1, 8, 1))
    wide.generator.shape = str(tmp_path / "wide.json")
    return read_config(wide)


def test_a_dpo_step_gathers_weights_for_two_passes_and_sums_the_adapter_alone(tmp_path):
    wide = wide_model(tmp_path, layers=2)
    shapes = GeneratorShapes(wide, None)
    base, adapter = (
        [4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]
        for tree in (shapes.params, shapes.adapter)
    )
    made = plan_programs.planned_programs(wide, machine())["DPO step"]()
    needs = compiled.compile_program(made.program.lower(*made.arguments), CHIP)
    assert set(needs.collectives) == {"all-gather", "all-reduce"}
    # Forward and backward; of the stack of two layers one at a time.
    assert sum(base) < needs.collectives["all-gather"].bytes <= 2 * sum(base)
    assert needs.collectives["all-gather"].largest <= max(base) / 2
    # Gradients, and a few metrics.
    assert 0 <= needs.collectives["all-reduce"].bytes - sum(adapter) < 1000


def test_a_repetition_penalty_s_tokens_are_planned(tmp_path):
    wide = wide_model(tmp_path, layers=1)
    for penalty, stage in ((1.0, "answer"), (1.2, "answer"), (1.2, "candidates")):
        config = with_settings(wide, {f"{stage}.repetition_penalty": penalty})
        slots = GeneratorShapes(config, machine()).decode().arguments[1]
        assert (slots.seen is not None) == (penalty != 1)


def test_no_parameter_is_gathered_to_decode(tmp_path):
    """With 512 rows, whose logits are a quarter of the smallest matrix."""
    wide = wide_model(tmp_path, layers=1)
    topology = machine()
    made = plan_programs.planned_programs(wide, topology)["decode"]()
    needs = compiled.compile_program(made.program.lower(*made.arguments), CHIP)
    matrices = [
        leaf
        for leaf in jax.tree.leaves(GeneratorShapes(wide, None).params)
        if leaf.ndim > 1 and min(leaf.shape[-2:]) > 1
    ]
    smallest = min(4 * math.prod(leaf.shape) for leaf in matrices)
    assert smallest == 4 * 2**20
    assert needs.collectives["all-reduce"].count > 0
    assert max(found.largest for found in needs.collectives.values()) < smallest
