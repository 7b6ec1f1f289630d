"""The paper's configs: what each argument changes, and how raw checkpoints are loaded by them."""

import pathlib
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from configs import paper, published, reference_code, table_8b
from expandr_jax.errors import UserError
from expandr_jax.loading import load_retriever_model
from expandr_jax.weights import source
from tests.commands import command
from tests.configs_test import flatten

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert"


def changed(first, second):
    first, second = dict(flatten(first)), dict(flatten(second))
    return {key for key in first if first[key] != second[key]}


def test_arguments_pick_the_retriever():
    sources = {name: paper.get_config(name).retriever.source for name in paper.RETRIEVERS}
    assert len(set(sources.values())) == 4
    assert len(paper.get_config().data.tests) == 15
    shares = paper.get_config().data.shares.to_dict()
    assert sum(shares.values()) == pytest.approx(1)
    held_out = shares["dev"] + shares["test"]
    assert (shares["retriever_train"] + held_out) / shares["generator_train"] == pytest.approx(
        7.0874, abs=1e-4
    )


def test_a_model_that_is_not_on_disk_is_not_looked_for_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_from_hub", None)
    monkeypatch.chdir(tmp_path)
    configs = [paper.get_config(name) for name in paper.RETRIEVERS]
    configs += [published.get_config(name) for name in published.CHECKPOINTS]
    configs += [table_8b.get_config(name) for name in table_8b.RETRIEVERS]
    for name in {part.source for c in configs for part in (c.retriever, c.generator)}:
        with pytest.raises(UserError, match=f"{name}: no such file or directory"):
            source.locate(name)


def test_the_released_code_differs_from_the_paper_in_these_settings():
    batches = {"contrastive.batch_size", "contrastive.accumulation"}
    always = {*batches, "contrastive.normalize", "expansion.strip_train_lead_ins"}
    assert (
        changed(paper.get_config("contriever"), reference_code.get_config("contriever")) == always
    )
    only_anchordr = {"retriever.normalize", "contrastive.temperature"}
    assert changed(paper.get_config(), reference_code.get_config()) == always | only_anchordr
    queries = {
        module: module.get_config().contrastive.batch_size
        * module.get_config().contrastive.accumulation
        for module in (paper, reference_code)
    }
    assert set(queries.values()) == {64 * 8 * 2}


@pytest.mark.parametrize("module", [paper, reference_code, published, table_8b])
def test_an_unknown_argument_is_refused_in_one_line(module, tmp_path):
    with pytest.raises(UserError, match="expected one of"):
        module.get_config("nothing")


def test_a_user_is_told_so(tmp_path):
    process = command("train.joint", "--config=configs/paper.py:nothing", f"--workdir={tmp_path}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.strip().splitlines() == [
        "error: configs/paper.py:nothing: expected one of anchordr, contriever, cocondenser, bert"
    ]


@pytest.mark.parametrize(("checkpoint", "pooling"), [("contriever", "mean"), ("bert", "cls")])
@pytest.mark.parametrize("normalize", [True, False])
def test_raw_checkpoints_are_pooled_as_the_config_says(tmp_path, checkpoint, pooling, normalize):
    """Directories of transformers do not say how to pool; PyTorch's vectors are compared."""
    shutil.copytree(TINY, tmp_path / "raw")
    for name in ("modules.json", "1_Pooling", "2_Normalize", "sentence_bert_config.json"):
        path = tmp_path / "raw" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    config = paper.get_config(checkpoint)
    assert config.retriever.pooling == pooling
    config.retriever.source = str(tmp_path / "raw")
    config.retriever.max_length = 16
    config.retriever.compute_dtype = "float32"
    config.retriever.normalize = normalize
    model = load_retriever_model(config)
    texts = ["what is the loss", "an array"]
    found = model.encoder.encode(model.retriever_params, texts, "query")
    torch_model = AutoModel.from_pretrained(tmp_path / "raw").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "raw")(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = torch_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = {"mean": mean, "cls": hidden[:, 0]}[pooling]
    if normalize:
        expected = torch.nn.functional.normalize(expected, dim=-1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
