"""Step A with an adapter: it learns as PEFT's, the base stays, exports fit peft and their kin."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from configs import base, smoke
from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.loading import load_retriever_model
from expandr_jax.models.lora import LoraConfig, init_lora, with_adapter
from expandr_jax.objectives.contrastive import (
    ContrastiveConfig,
    contrastive_gradients,
    contrastive_setup,
)
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.objectives.trained import (
    divided,
    drops_out,
    training_retriever,
    with_temperature,
)
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.sharding import bytes_on_device
from expandr_jax.weights.adapter import export_adapter, load_adapter
from expandr_jax.weights.hf import load_retriever
from tests.eight_devices import machine
from tests.retriever_training_test import PAIRS, TINY, config_of, train

QUERIES = [query for query, _ in PAIRS[:6]]
TINY_LLAMA = TINY.replace("bert", "llama")
LORA = LoraConfig(4, 8.0, 0.0, ("_proj$",))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of train.retriever with an adapter."""
    directory = tmp_path_factory.mktemp("lora")
    write_jsonl(directory / "triples.jsonl", [{"query": q, "pos": [d]} for q, d in PAIRS])
    config = lora_config(directory)
    train(config, directory / "run")
    return directory / "run"


def lora_config(directory, **lora):
    settings = {"negatives": 0, "kl_weight": 0.0, "plain_share": 0.0, "learning_rate": 1e-2}
    config = config_of(directory, **settings)
    config.data.dev = ""
    config.contrastive.lora.update({"rank": 4, "alpha": 4.0, "dropout": 0.05, **lora})
    return config


def on_base(run):
    """The run's adapter on its base, by peft: [texts, width] vectors of QUERIES."""
    model = transformers.AutoModel.from_pretrained(TINY).eval()
    model = peft.PeftModel.from_pretrained(model, run / "export" / "retriever-adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    batch = tokenizer(QUERIES, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()


def test_both_exports_have_the_trained_vectors(run):
    merged = SentenceTransformer(str(run / "export" / "retriever"), device="cpu")
    theirs = merged.encode(QUERIES, normalize_embeddings=True)
    np.testing.assert_allclose(theirs, on_base(run), atol=2e-4)
    untrained = SentenceTransformer(TINY, device="cpu").encode(QUERIES, normalize_embeddings=True)
    assert np.abs(theirs - untrained).max() > 0.05


def test_it_learns_and_the_base_stays(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["phase"] == "retriever"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    before = load_file(f"{TINY}/model.safetensors")
    after = load_file(run / "export" / "retriever" / "model.safetensors")
    before = {name.removeprefix("bert."): tensor for name, tensor in before.items()}
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert moved
    assert all(name.endswith("weight") and ".layer." in name for name in moved)
    assert not [name for name in moved if "LayerNorm" in name]


@pytest.fixture(scope="module", params=["bert", "llama"])
def adapted(request):
    """A tiny retriever with an adapter that already changes it, and a batch."""
    source, pooling = {"bert": (TINY, "mean"), "llama": (TINY_LLAMA, "last")}[request.param]
    retriever, params = load_retriever(source, pooling=pooling, normalize=True, max_length=16)
    retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=LORA))
    adapter = init_lora(jax.random.key(0), params, LORA)
    moved = [
        leaf + 0.05 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, leaf in enumerate(jax.tree.leaves(adapter))
    ]
    adapter = jax.tree.unflatten(jax.tree.structure(adapter), moved)
    ids = [retriever.token_ids(list(texts)) for texts in zip(*PAIRS[:8], strict=True)]
    examples = [
        ContrastiveExample(query, [], Passage(document, f"text {i}"))
        for i, (query, document) in enumerate(zip(*ids, strict=True))
    ]
    batch = make_batch(examples, retriever.tokenizer.pad_token_id or 0, 0)
    config = ContrastiveConfig(temperature=0.1, normalize="none")
    gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)
    (loss, _), grads = jax.jit(gradients)(adapter, batch, frozen=(params,))
    return source, retriever, params, adapter, batch, loss, grads


def torch_loss(model, batch, pooling):
    def embed(kind):
        ids, mask = (torch.from_numpy(np.array(batch[f"{kind}_{x}"])) for x in ("ids", "mask"))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        if pooling == "last":
            vectors = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        else:
            vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors)

    scores = embed("query") @ embed("positive").T / 0.1
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def test_gradients_are_those_of_peft(adapted, tmp_path):
    source, retriever, _, adapter, batch, loss, grads = adapted
    for name, tree in (("adapter", adapter), ("grads", grads)):
        export_adapter(
            tmp_path / name, tree, LORA, retriever.module.config, source, generates=False
        )
    model = transformers.AutoModel.from_pretrained(source).eval()
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    theirs = torch_loss(model, batch, retriever.pooling)
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    ours = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    found = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert found.keys() == ours.keys()
    assert len(found) >= 24
    for name, grad in found.items():
        np.testing.assert_allclose(ours[name], grad, atol=1e-5, err_msg=name)


def test_an_adapter_is_read_back(adapted, tmp_path):
    source, retriever, params, adapter, batch, *_ = adapted
    config = retriever.module.config
    export_adapter(tmp_path / "out", adapter, LORA, config, source, generates=False)
    _, again = load_adapter(str(tmp_path / "out"), config)
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter, again))
    pooled = {"pooling": retriever.pooling, "normalize": True, "max_length": 16}
    merged, merged_params = load_retriever(str(tmp_path / "out"), **pooled)
    inputs = batch["query_ids"], batch["query_mask"]
    expected = jax.jit(retriever.embed)(with_adapter(params, adapter), *inputs)
    found = jax.jit(merged.embed)(merged_params, *inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_checkpoints_hold_the_adapter_alone(run):
    steps = [path for path in (run / "checkpoints" / "retriever").iterdir() if path.is_dir()]
    tree = "".join(path.read_text() for path in steps[0].rglob("_METADATA"))
    assert "q_proj" in tree
    assert "opt_state" in tree
    assert "kernel" not in tree
    assert "embedding" not in tree


def tiny():
    return load_retriever(TINY)[0]


def test_an_int8_base_on_a_mesh_learns_in_micro_batches(adapted):
    """A mesh, recomputation and micro-batches change rounding alone; int8 changes a little."""
    source, whole, _, adapter, batch, loss, grads = adapted
    int8 = source == TINY_LLAMA
    config = base.get_config()
    config.retriever.update({"source": source, "pooling": whole.pooling, "normalize": True})
    config.retriever.update({"max_length": 16, "weights": "int8" if int8 else "float32"})
    config.contrastive.update({"remat": "full", "micro_batch": 4, "temperature": 0.1})
    config.contrastive.update({"normalize": "none", "learn_temperature": True})
    config.contrastive.lora.update({"rank": 4, "alpha": 8.0})
    config.mesh.contrastive = (2, 2, 2)
    config = read_config(config)
    model = load_retriever_model(config)
    before = jax.tree.map(np.array, model.retriever_params)
    assert (before["layers"]["self_attn"]["q_proj"]["kernel"].dtype == np.int8) if int8 else True
    started = with_adapter(model.retriever_params, adapter)
    setup = contrastive_setup(
        model.contrastive_mesh, model.retriever, started, config.contrastive, optax.sgd(0.1)
    )
    (frozen,), trained = divided(model.retriever, started, 0)
    state = setup.create(with_temperature(trained, config.contrastive))
    state, metrics = setup.step(state, *jax.device_put((frozen,), setup.frozen), batch, None)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=0.05 if int8 else 1e-5)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    if not int8:
        stepped = jax.tree.map(lambda a, g: a - 0.1 * g, adapter, grads)
        for a, b in zip(
            jax.tree.leaves(stepped), jax.tree.leaves(state.params["retriever"]), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_of_the_adapter_is_apart_from_the_module_s():
    retriever, params = load_retriever(TINY)
    lora = dataclasses.replace(LORA, dropout=0.5)
    retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=lora))
    settings = base.get_config().contrastive
    trained = training_retriever(retriever, settings)
    assert drops_out(retriever, settings)
    assert trained.module.config.hidden_dropout == trained.module.config.attention_dropout == 0
    (ids,) = tiny().token_ids(["a query"])
    ids, mask = np.array([ids]), np.ones((1, len(ids)), int)
    adapter = init_lora(jax.random.key(0), params, lora)
    keys = jax.random.split(jax.random.key(1))
    embed = jax.jit(
        lambda adapter, key: trained.embed(
            with_adapter(params, adapter), ids, mask, dropout_key=key
        )
    )
    # An adapter that changes nothing yet has nothing to drop.
    np.testing.assert_array_equal(embed(adapter, keys[0]), embed(adapter, keys[1]))
    moved = jax.tree.map(jnp.ones_like, adapter)
    assert np.abs(embed(moved, keys[0]) - embed(moved, keys[1])).max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive.lora.rank": 0, "retriever.weights": "int8"}, "contrastive.lora.rank is 0"),
        ({"retriever.weights": "int8"}, "weights in int8 are for decoders only"),
        ({"contrastive.lora.targets": ("no_proj$",)}, "contrastive.lora.targets: 'no_proj.' match"),
        ({"contrastive.lora.rank": 4096}, "above .*; lower contrastive.lora.rank"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    config = base.get_config()
    config.retriever.source = TINY
    config.contrastive.lora.rank = 4
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message):
        load_retriever_model(read_config(config))


def test_a_plan_has_less_of_an_adapter():
    def step_of(rank):
        config = smoke.get_config()
        config.contrastive.lora.rank = rank
        config.mesh.contrastive = (2, 4, 1)
        shapes = RetrieverShapes(read_config(config), machine())
        return shapes.contrastive(), shapes.resident(), shapes.beside_training()

    (whole, held, beside), (adapted, base_held, adapters) = step_of(0), step_of(4)
    assert beside == held * 2 / 3  # Fine-tuned before ours, which is its own argument.
    assert adapters < base_held < 0.75 * held
    # Neither gradients nor moments of the base.
    assert bytes_on_device(adapted.arguments[:2]) < 0.7 * bytes_on_device(whole.arguments[0])
    assert adapted.model_flops < whole.model_flops
    adapted.program.lower(*adapted.arguments)


FAMILIES = ("roberta", "modernbert", "t5-gated", "mistral", "qwen3", "gemma3")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_any_family_is_peft_s(family, tmp_path):
    """On its base, read back, and merged, its vectors are those that peft's model has."""
    base_, out = tmp_path / "base", tmp_path / "out"
    tiny_models.save(base_, family)
    pooled = {"pooling": "last" if family in tiny_models.DECODERS else "mean", "normalize": True}
    retriever, params = load_retriever(str(base_), **pooled)
    config = retriever.module.config
    retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=LORA))
    adapter = init_lora(jax.random.key(0), params, LORA)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    adapter = jax.tree.unflatten(tree, leaves)
    export_adapter(out, adapter, LORA, config, str(base_), generates=False)
    load = transformers.T5EncoderModel if family.startswith("t5") else transformers.AutoModel
    model = peft.PeftModel.from_pretrained(load.from_pretrained(base_), out).eval()
    ids, mask = tiny_models.ragged_batch("right")
    with torch.no_grad():
        hidden = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).last_hidden_state
        weights = torch.tensor(mask)[..., None].float()
        vectors = (hidden * weights).sum(1) / weights.sum(1)
        if pooled["pooling"] == "last":
            vectors = hidden[torch.arange(len(ids)), torch.tensor(mask).sum(1) - 1]
        expected = torch.nn.functional.normalize(vectors).numpy()
    found = jax.jit(retriever.embed)(with_adapter(params, adapter), ids, mask)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    plain = jax.jit(retriever.embed)(params, ids, mask)
    assert np.abs(plain - found).max() > 0.05
    read_lora, again = load_adapter(str(out), config)
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter, again))
    assert len(read_lora.targets) == len(leaves) / 2
    merged, merged_params = load_retriever(str(out), **pooled)
    np.testing.assert_allclose(jax.jit(merged.embed)(merged_params, ids, mask), expected, atol=2e-4)
