"""Smaller generators: what is left out, what it is worth, and what loads elsewhere."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.numpy import load_file

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.models.mask import causal_mask
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.packing import Example, pack, row_sizes
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.pruning.importance import importances, layer_gradients, pruning_loss
from expandr_jax.pruning.quality import decoding_speed, perplexity
from expandr_jax.pruning.selection import most_important, resized, taken
from expandr_jax.pruning.widths import count_params, pruned_config
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.hf import load_generator
from tests.commands import command, finish
from tests.load_model import logits
from train.prune import Options, prune, ranked_by, shares


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


SLOW = [
    pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "mistral", "qwen3", "likelihood")
]


@pytest.mark.parametrize("family", ["qwen2", "gemma3", *SLOW[:3]])
def test_what_is_left_out_is_as_if_masked(family, tmp_path):
    model = tiny_models.save(tmp_path / "in", family, head=True)
    generator, params = load_generator(str(tmp_path / "in"))
    shape = generator.module.config
    config = dataclasses.replace(shape, num_heads=2, num_kv_heads=1, mlp_dim=5)
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 2, (3, 1))
    channels = np.sort([rng.permutation(48)[:5] for _ in range(3)], axis=1)
    small, fewer = resized(generator, config), taken(params, shape, groups, channels)
    # What PyTorch's layers put out of the others is masked, where it enters the next matrix.
    for layer, (group, kept) in enumerate(zip(groups[:, 0], channels, strict=True)):
        block = model.model.layers[layer]
        heads = torch.zeros(2, 2 * shape.head_dim)
        heads[group] = 1
        some = torch.zeros(48)
        some[torch.tensor(kept)] = 1
        block.self_attn.o_proj.register_forward_pre_hook(masking(heads.reshape(-1)))
        block.mlp.down_proj.register_forward_pre_hook(masking(some))
    ids = tiny_models.ragged_batch("right", lengths=(12, 12))[0]
    expected = torch_logits(model, ids)
    found = logits(small.module, fewer, ids, np.ones_like(ids))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    export_generator(tmp_path / "out", small, fewer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(again, ids), expected, atol=1e-5, rtol=0)
    assert again.num_parameters() == count_params(fewer)
    assert again.config.head_dim == shape.head_dim


def masking(mask):
    """A hook of PyTorch's that multiplies what comes in."""
    return lambda _, inputs: (inputs[0] * mask,)


def torch_log_prob(model, prompt, response):
    """log p of a response's tokens behind a prompt."""
    ids = torch.tensor([[*prompt, *response]])
    found = torch.log_softmax(model(ids).logits[0], dim=-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return found[at, torch.tensor(response)].sum()


@pytest.mark.parametrize("loss", ["step_b", SLOW[3]])
def test_importance_equals_a_twin_in_pytorch(loss, tmp_path):
    model = tiny_models.save(tmp_path / "in", "qwen2", head=True)
    generator, params = load_generator(str(tmp_path / "in"))
    shape, rng = generator.module.config, np.random.default_rng(0)
    pairs = [
        [rng.integers(8, tiny_models.VOCAB, size).tolist() for size in sizes]
        for sizes in ((7, 5, 9), (4, 6, 3), (9, 1, 4), (3, 8, 2))
    ]
    settings = ObjectiveSettings(beta=0.1)
    objective = OBJECTIVES["sigmoid"]

    def loss_of(params, batch):
        return pruning_loss(
            params, batch, module=generator.module, objective=objective, settings=settings,
            loss=loss,
        )  # fmt: skip

    examples = [Example(prompt, responses) for prompt, *responses in pairs]
    sizes = row_sizes([example.size for example in examples], 1)
    batches = [pack(part, 0, sizes) for part in (examples[:2], examples[2:])]
    gradients = layer_gradients(loss_of, params, batches)
    heads, channels = importances(params["layers"], gradients, shape)
    for prompt, chosen, rejected in pairs:
        good, bad = (torch_log_prob(model, prompt, part) for part in (chosen, rejected))
        margin = (good - good.detach()) - (bad - bad.detach())
        own = -torch.nn.functional.logsigmoid(0.1 * margin)
        (own if loss == "step_b" else -good / len(chosen)).div(2).backward()
    for layer, block in enumerate(model.model.layers):
        value = {name: (p * p.grad).abs().detach() for name, p in block.named_parameters()}
        expected = sum(
            value[f"self_attn.{name}_proj.{kind}"].reshape(2, -1).sum(1)
            for name in "qkv"
            for kind in ("weight", "bias")
        ) + value["self_attn.o_proj.weight"].T.reshape(2, -1).sum(1)
        np.testing.assert_allclose(heads[layer], expected, rtol=1e-4)
        expected = sum(value[f"mlp.{name}_proj.weight"].sum(1) for name in ("gate", "up"))
        expected = expected + value["mlp.down_proj.weight"].sum(0)
        np.testing.assert_allclose(channels[layer], expected, rtol=1e-4)


def test_the_most_important_stay_in_their_order():
    values = jnp.array([[1.0, 3.0, 3.0, 2.0], [5.0, 0.0, 1.0, 5.0]])
    assert most_important(values, 2).tolist() == [[1, 2], [0, 3]]
    assert most_important(values, 3).tolist() == [[1, 2, 3], [0, 2, 3]]
    assert most_important(values, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_widths_leave_the_share_that_is_asked_for(tmp_path):
    tiny_models.save(tmp_path, "llama", head=True)
    generator, _ = load_generator(str(tmp_path), in_files=True)
    # Llama 3 8B's, and SmolLM2 135M's, by their published shapes.
    for sizes, total, tied, expected in (
        ((128256, 4096, 32, 32, 8, 128, 14336), 8_030_261_248, False, {0.75: 16, 0.5: 16}),
        ((49152, 576, 30, 9, 3, 64, 1536), 134_515_008, True, {0.9: 9, 0.75: 6, 0.5: 3}),
    ):
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "mlp_dim")  # fmt: skip
        shape = dataclasses.replace(
            generator.module.config, tie_embeddings=tied, **dict(zip(names, sizes, strict=True))
        )
        whole = shapes_of(generator, shape)
        assert count_params(whole) == total
        assert pruned_config(shape, whole, 1) == shape
        for keep, heads in expected.items():
            found = pruned_config(shape, whole, keep)
            assert found.num_heads == heads
            assert found.num_heads // found.num_kv_heads == shape.num_heads // shape.num_kv_heads
            assert found.hidden_size % found.num_heads == found.mlp_dim % 32 == 0
            assert abs(count_params(shapes_of(generator, found)) / total - keep) < 0.01
    with pytest.raises(UserError, match=r"keep=0.1: cannot be had; 28346688 of 134515008 param"):
        pruned_config(shape, whole, 0.1)


def shapes_of(generator, config):
    module = generator.module.clone(config=config)
    tokens = jnp.ones((1, 1), jnp.int32)
    return jax.eval_shape(
        lambda: module.init(jax.random.key(0), tokens, tokens, causal_mask(tokens))
    )["params"]


def test_perplexity_and_speed(tmp_path):
    model = tiny_models.save(tmp_path, "llama", head=True)
    generator, params = load_generator(str(tmp_path))
    texts = ["many letters", "a", "some more letters are here", "b c", "d e f", "gh"]
    total, tokens = 0.0, 0
    for text in texts:
        (ids,) = generator.token_ids([text])
        ids = ids[:10]
        if len(ids) > 1:
            total += float(torch_log_prob(model, ids[:1], ids[1:]).detach())
            tokens += len(ids) - 1
    found = perplexity(generator, params, texts, 10)
    np.testing.assert_allclose(found, np.exp(-total / tokens), rtol=1e-5)
    assert perplexity(generator, params, []) is None
    assert decoding_speed(generator.module, params, rows=2, tokens=4, times=1) > 0


def test_shares_are_read_or_refused():
    assert shares(["1", "0.5", "0.5"]) == [1.0, 0.5]
    for wrong in (["a"], ["0"], ["1.5"], []):
        with pytest.raises(UserError, match=r"expected shares above 0 and up to 1"):
            shares(wrong)
    assert ranked_by(["random", "taylor", "random"]) == ["random", "taylor"]
    for wrong in (["magnitude"], []):
        with pytest.raises(UserError, match=r"expected taylor or random or taylor,random"):
            ranked_by(wrong)


@pytest.fixture
def finished(smoke, tmp_path):
    """What of a finished run is read."""
    run = tmp_path / "run"
    for name in ("data", "export", "round-0"):
        shutil.copytree(smoke[0] / name, run / name)
    shutil.copy(smoke[0] / "config.json", run)
    return run


def quiet():
    return Console(file=io.StringIO())


def test_keeping_all_changes_nothing_and_less_is_less(finished):
    rows = prune(finished, [1, 0.75], Options(epochs=0), quiet())
    before = load_file(finished / "export/generator/model.safetensors")
    after = load_file(finished / "pruned/taylor-1/generator/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.tobytes() == after[name].tobytes()
    assert [row["keep"] for row in rows] == [1, 0.75]
    assert abs(rows[1]["share"] - 0.75) < 0.01
    again = transformers.AutoModelForCausalLM.from_pretrained(
        finished / "pruned/taylor-0.75/generator"
    )
    assert again.num_parameters() == rows[1]["parameters"]
    assert (again.config.num_attention_heads, again.config.head_dim) == (2, 8)
    with pytest.raises(UserError, match=r"was made with epochs=0, not 1: move it"):
        prune(finished, [0.75], Options(epochs=1), quiet())


def test_what_was_measured_stays_and_damage_is_told_before_any_work(finished, monkeypatch):
    """A relevant document that the collection has not is nobody's, as in rankings."""
    with open(finished / "data" / "qrels" / "test.tsv", "a", encoding="utf-8") as file:
        first = (finished / "data" / "qrels" / "test.tsv").read_text().splitlines()[1]
        file.write(f"{first.split(chr(9))[0]}\tnowhere\t1\n")
    monkeypatch.setattr("train.prune._searched", lambda *_: 0.5)
    (row,) = prune(finished, [1], Options(epochs=0, evaluate=True), quiet())
    assert row["ndcg@10"] == 0.5
    (row,) = prune(finished, [1], Options(epochs=0), quiet())
    assert row["ndcg@10"] == 0.5  # Measured before, of the same generator.
    results = finished / "pruned" / "results.json"
    whole = json.loads(results.read_text())
    others = [{**whole["rows"][0], "keep": 0.9, "source": "another"}]
    results.write_text(json.dumps({"rows": whole["rows"] + others}))
    console = quiet()
    (row,) = prune(finished, [1], Options(epochs=0), console)
    assert row["keep"] == 1
    assert "1 rows of another generator are left out" in console.file.getvalue()
    monkeypatch.setattr("train.prune._measured", None)  # It ends before.
    for text in ("{}", "[]", '{"rows": [1]}', '{"rows": [{"keep": "x"}]}', "[" * 100_000):
        results.write_text(text)
        with pytest.raises(UserError, match=r"pruned/results\.json"):
            prune(finished, [1], Options(epochs=0), quiet())
        assert results.read_text() == text
    results.write_text(json.dumps(whole))
    made = finished / "pruned" / "taylor-1" / "pruned.json"
    for text in ("[]", "{", json.dumps(json.loads(made.read_text()) | {"more": 1})):
        made.write_text(text)
        with pytest.raises(UserError, match="taylor-1"):
            prune(finished, [1], Options(epochs=0), quiet())
    (finished / "data" / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match="run/data: has no test judgements"):
        prune(finished, [1], Options(epochs=0), quiet())


@pytest.mark.slow
def test_the_same_again_and_by_chance(finished):
    weights = finished / "pruned/taylor-0.75/generator/model.safetensors"
    prune(finished, [0.75], Options(epochs=0), quiet())
    written = weights.read_bytes()
    shutil.rmtree(finished / "pruned/taylor-0.75")
    prune(finished, [0.75], Options(epochs=0), quiet())
    assert weights.read_bytes() == written
    ours, other = prune(finished, [0.75], Options("random", epochs=0), quiet())
    assert (ours["importance"], other["importance"]) == ("taylor", "random")
    assert ours["parameters"] == other["parameters"]
    drawn = finished / "pruned/random-0.75/generator/model.safetensors"
    assert drawn.read_bytes() != written


@pytest.mark.slow
def test_step_b_recovers_and_goes_on(finished):
    directory = finished / "pruned/taylor-0.75"

    def run():
        arguments = (f"--workdir={finished}", "--keep=0.75", "--epochs=1", "--loss=step_b")
        return finish(command("train.prune", *arguments))

    assert "0.749" in run()
    before, after = (
        load_file(directory / d / "model.safetensors") for d in ("before", "generator")
    )
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    steps = (directory / "recovery/metrics.jsonl").read_text()
    assert steps
    shutil.rmtree(directory / "generator")
    run()
    assert (directory / "recovery/metrics.jsonl").read_text() == steps
    again = load_file(directory / "generator/model.safetensors")
    assert all(after[name].tobytes() == again[name].tobytes() for name in after)


@pytest.mark.slow
def test_one_command_makes_the_whole_table(smoke, finished):
    """The whole is the run's own, which ranks as the run did."""
    arguments = ("--keep=1,0.75", "--importance=taylor,random", "--epochs=1", "--evaluate")
    printed = finish(command("train.prune", f"--workdir={finished}", *arguments))
    rows = json.loads((finished / "pruned/results.json").read_text())["rows"]
    assert [(row["keep"], row["importance"]) for row in rows] == [
        (1, "taylor"), (0.75, "taylor"), (0.75, "random"),
    ]  # fmt: skip
    whole, *less = rows
    assert whole["share"] == 1
    assert whole["perplexity"] == whole["perplexity_before"]
    before = load_file(finished / "export/generator/model.safetensors")
    after = load_file(finished / "pruned/taylor-1/generator/model.safetensors")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    of_run = json.loads((smoke[0] / "results.json").read_text())["rows"]
    assert whole["ndcg@10"] == next(r["ndcg@10"] for r in of_run if r["system"] == "expandr")
    for row in less:
        assert row["parameters"] == less[0]["parameters"] < whole["parameters"]
        assert row["perplexity"] != row["perplexity_before"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert f"{row['ndcg@10']:.4f}" in printed
        assert str(row["parameters"]) in printed


def test_runs_that_cannot_be_pruned_are_refused(finished):
    with pytest.raises(UserError, match=r"keep=0.5: cannot be had"):
        prune(finished, [0.5], Options(), quiet())
    path = finished / "config.json"
    record = json.loads(path.read_text())
    shutil.rmtree(finished / "export/generator")
    with pytest.raises(UserError, match=r"export/generator: not there; let train.joint finish"):
        prune(finished, [0.75], Options(), quiet())
    settings = record.get("config", record)
    settings["step_b"] = "grpo"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"step_b is 'grpo', which leaves no file of pairs"):
        prune(finished, [0.75], Options(), quiet())
