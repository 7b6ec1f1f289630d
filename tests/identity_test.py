"""A run goes on with the models and tokenizers it began with, and with no others."""

import dataclasses
import datetime
import io
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.loading import load_generator_model, load_models
from expandr_jax.models.identity import module_identity
from expandr_jax.objectives.adapter import hold_out
from expandr_jax.objectives.adapter_stage import adapter_round
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage
from expandr_jax.objectives.packed_examples import ExampleHashes, pack_examples, triples_key
from expandr_jax.objectives.packing import Example, hash_response_examples
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.objectives.warm_start import WARM_START
from expandr_jax.pair import model_hashes
from expandr_jax.rewards.group import Group
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.weights.hf import load_generator
from tests.file_options import edit

GENERATOR_SAYS = "generator.source, what its files say"
RETRIEVER_SAYS = "retriever.source, what its files say"


def begin(workdir: pathlib.Path, models: pathlib.Path) -> None:
    """What `train.joint` does before its first stage."""
    config = smoke.get_config()
    config.retriever.source = str(models / "tiny-bert")
    config.generator.source = str(models / "tiny-llama")
    config = read_config(config)
    run = Run(workdir, config, Console(file=io.StringIO()))
    run.check_models(model_hashes(load_models(config, lambda _: None)))
    run.close()


def other_word(path: pathlib.Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_template(path: pathlib.Path) -> None:
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


def other_weight(path: pathlib.Path) -> None:
    tensors = load_file(path / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(0.25)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def says(file: str, **fields):
    return lambda path: edit(path / file, **fields)


@pytest.mark.parametrize(
    ("model", "change", "named"),
    [
        ("tiny-bert", other_weight, "retriever.source, its weights"),
        ("tiny-llama", other_weight, "generator.source, its weights"),
        ("tiny-bert", other_word, "retriever.source, its tokenizer"),
        ("tiny-llama", other_word, "generator.source, its tokenizer"),
        ("tiny-llama", other_template, "generator.source, its chat template"),
        ("tiny-llama", says("config.json", rms_norm_eps=1e-5), GENERATOR_SAYS),
        ("tiny-llama", says("generation_config.json", eos_token_id=[2, 5]), GENERATOR_SAYS),
        ("tiny-bert", says("tokenizer_config.json", truncation_side="left"), RETRIEVER_SAYS),
        ("tiny-bert", says("1_Pooling/config.json", pooling_mode="cls"), RETRIEVER_SAYS),
        ("tiny-bert", says("config_sentence_transformers.json", prompts={"query": "q: "}),
         RETRIEVER_SAYS),
    ],
)  # fmt: skip
def test_another_model_or_tokenizer_is_refused(tmp_path, model, change, named):
    models = tmp_path / "models"
    shutil.copytree(smoke.MODELS, models)
    begin(tmp_path / "run", models)
    begin(tmp_path / "run", models)  # The same ones are taken again.
    change(models / model)
    with pytest.raises(UserError, match=f"^{named}: is not what this run began with"):
        begin(tmp_path / "run", models)


def test_a_run_notes_models_that_it_loads_later(tmp_path):
    """`eval.beir` loads a generator where a system asks for one."""
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO()))
    run.check_models({"retriever.source, its weights": "a"})
    run.check_models({"retriever.source, its weights": "a", "generator.source, its weights": "b"})
    run.check_models({"retriever.source, its weights": "a"})
    for other in ({"generator.source, its weights": "c"}, {"retriever.source, its weights": "b"}):
        with pytest.raises(UserError, match=f"^{next(iter(other))}: is not what this run began"):
            run.check_models(other)
    run.close()


def test_a_generator_is_told_by_all_that_its_texts_depend_on():
    generator, _ = load_generator(str(smoke.MODELS / "tiny-llama"))
    module, tokenizer = generator.module, generator.tokenizer
    other = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template.replace("user", "User") + "x{{ today }}",
    )
    wider = dataclasses.replace(module.config, rope_theta=module.config.rope_theta * 2)
    changes = [
        {"module": module.clone(config=wider)},
        {"module": module.clone(dtype=jnp.bfloat16)},
        {"tokenizer": other},
        {"eos_ids": (1,)},
    ]
    told = {dataclasses.replace(generator, **change).identity for change in ({}, *changes)}
    assert len(told) == 1 + len(changes)
    # Neither the day, where the template does not ask for it, nor what the backward pass keeps.
    later = dataclasses.replace(
        generator, module=module.clone(remat="full"), today=datetime.date(2000, 1, 1)
    )
    assert later.identity == generator.identity
    # Runs that were begun when there were no 4 bits said of 8 that they were "int8".
    in_bytes = dataclasses.replace(module.config, quantized="int8")
    (_, before, _), (_, now, _) = (
        module_identity(module.clone(config=config)) for config in (module.config, in_bytes)
    )
    assert now == {**before, "int8": True}


def test_step_a_is_told_by_all_of_its_examples():
    passages = [Passage([i], str(i), score=0.5) for i in range(4)]
    example = ContrastiveExample([1], [[2], [3]], *passages[:1], passages[1:2], passages[2:3])
    changes = [
        {"query": [2]}, {"expansions": [[2]]}, {"expansions": [[2, 3]]}, {"expansions": [[3], [2]]},
        {"positive": passages[3]}, {"positive": dataclasses.replace(passages[0], score=None)},
        {"positive": dataclasses.replace(passages[0], ids=[9])}, {"negatives": passages[1:3]},
        {"other_positives": ()}, {"negatives": (), "other_positives": passages[1:3]},
        {"known": {"1"}},
    ]  # fmt: skip

    def hash_all(examples):
        hashes = ExampleHashes()
        assert len([*hashes.passing([pack_examples(examples)])]) == 1
        return hashes.all

    told = {hash_all([dataclasses.replace(example, **change)]) for change in ({}, *changes)}
    assert len(told) == 1 + len(changes)
    arrays = dataclasses.replace(example, query=np.array([1], np.int32), known=frozenset())
    assert hash_all([arrays]) == hash_all([example])
    assert hash_all([example, arrays]) != hash_all([example])


def test_step_a_is_told_by_all_that_its_examples_are_made_of():
    triple = Triple("q", ("p", "r"), ("n",), ("e", "f"), (1.0, 1.0, 0.5))
    changes = [
        {"query": "x"}, {"positives": ("r", "p")}, {"negatives": ()}, {"expansions": ("e",)},
        {"positives": ("p",), "negatives": ("r", "n")}, {"expansions": ("f", "e")},
        {"teacher_scores": None}, {"teacher_scores": (1.0, 0.9, 0.5)}, {"margin": 2.0},
        {"negatives": ("n", "e"), "expansions": ("f",)},
    ]  # fmt: skip
    told = {triples_key([dataclasses.replace(triple, **change)]) for change in ({}, *changes)}
    told |= {triples_key([triple, triple]), triples_key([triple], "query"), triples_key([])}
    assert len(told) == 1 + len(changes) + 3
    # Where it stands says nothing of it.
    assert triples_key([dataclasses.replace(triple, line=3)]) in told


def test_step_b_is_told_by_all_of_its_examples():
    examples = [
        Example([1, 2], [[3], [4]]), Example([1], [[2, 3], [4]]), Example([1, 2], [[4], [3]]),
        Example([1, 2], [[3], [4], []]), Example([1, 2], [[3], [4]], {"weight": 0.5}),
    ]  # fmt: skip
    told = {hash_response_examples([example]) for example in examples}
    assert len(told | {hash_response_examples(examples)}) == 1 + len(examples)
    assert hash_response_examples([dataclasses.replace(examples[0], name="x")]) in told


def groups_of(*rewarded):
    return Group.from_row({"query_id": "q", "query": "q", "prompt": "p", "candidates": [
        {"text": text, "reward": reward} for text, reward in rewarded
    ]})  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (OBJECTIVES["sigmoid"], [
            {"prompt": "p", "chosen": "a", "rejected": "b", "joined": joined, **other}
            for joined in (False, True)
            for other in ({}, {"prompt": "q"}, {"chosen": "b", "rejected": "a"}, {"chosen": "aa"})
        ]),
        (WARM_START, [
            {"prompt": "p", "response": "a"}, {"prompt": "a", "response": "p"},
            {"prompt": "p", "response": "b"},
        ]),
        (REWARD_SFT, [
            groups_of(("a", 1.0), ("b", 0.0)), groups_of(("b", 1.0), ("a", 0.0)),
            groups_of(("a", 1.0), ("b", 0.5)), groups_of(("a", 1.0), ("c", 0.0)),
            groups_of(("a", 1.0), ("b", 0.0), ("", 2.0)), groups_of(("a", 1.0), ("b", -99.0)),
        ]),
    ],
)  # fmt: skip
def test_step_b_is_told_by_its_texts_and_knows_how_many_examples_they_make(objective, rows):
    """Before any is tokenized: a restart that has nothing to do tokenizes none."""
    generator, _ = load_generator(str(smoke.MODELS / "tiny-llama"))
    settings = read_config(smoke.get_config()).dpo
    told = {hash_json(objective.texts(row)) for row in rows}
    assert len(told) == len(rows)
    rows = [row | {"query_id": "q"} if isinstance(row, dict) else row for row in rows]
    assert {hash_json(objective.texts(row)) for row in rows} == told
    for row in rows:
        examples, _ = objective.tokenize(generator, [row], settings)
        assert objective.count(row, settings) == len(examples) > 0


def test_checkpoints_of_an_older_step_b_are_told_by_its_tokens(tmp_path):
    config = read_config(smoke.get_config())
    model = load_generator_model(config)
    settings = dataclasses.replace(config.dpo, batch_size=8, dev_share=0.3)
    reporter = Reporter(Console(file=io.StringIO()))
    rows = [{"prompt": f"p {i}", "chosen": f"a {i}", "rejected": "b"} for i in range(23)]

    def made(rows):
        return adapter_round(OBJECTIVES["sigmoid"], "dpo", settings, model, rows, 0, 0, reporter)

    def restored(own, name):
        tree = {"x": jnp.zeros(1)}
        found = Checkpoints(tmp_path / name, own.identity(model), older=own.older).restore(tree)
        return found[0]

    own, tree = made(rows), {"x": jnp.ones(1)}
    assert own.steps == round(settings.epochs * 2) * settings.accumulation
    now = own.identity(model)
    dev, others = (
        OBJECTIVES["sigmoid"].tokenize(model.generator, part, settings)[0]
        for part in hold_out(rows, settings.dev_share, OBJECTIVES["sigmoid"].prompt)
    )
    before = {name: value for name, value in now.items() if name != "texts"}
    before["examples"] = hash_response_examples([*others, *dev])
    for name, identity in (("older", before), ("now", now)):
        checkpoints = Checkpoints(tmp_path / name, identity)
        checkpoints.save(3, tree)
        checkpoints.wait()
        assert restored(own, name) == 3
        with pytest.raises(UserError, match="another base model or other settings"):
            restored(made([*rows[:-1], {**rows[-1], "chosen": "c"}]), name)
