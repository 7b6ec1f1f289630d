"""A run goes on with the models and tokenizers it began with, and with no others."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.loading import load_models
from expandr_jax.pair import model_hashes
from expandr_jax.runtime.run import Run


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


@pytest.mark.parametrize(
    ("model", "change", "named"),
    [
        ("tiny-bert", other_weight, "retriever.source, its weights"),
        ("tiny-llama", other_weight, "generator.source, its weights"),
        ("tiny-bert", other_word, "retriever.source, its tokenizer"),
        ("tiny-llama", other_word, "generator.source, its tokenizer"),
        ("tiny-llama", other_template, "generator.source, its tokenizer"),
    ],
)
def test_another_model_or_tokenizer_is_refused(tmp_path, model, change, named):
    models = tmp_path / "models"
    shutil.copytree(smoke.MODELS, models)
    begin(tmp_path / "run", models)
    begin(tmp_path / "run", models)  # The same ones are taken again.
    change(models / model)
    with pytest.raises(UserError, match=f"^{named}: is not what this run began with"):
        begin(tmp_path / "run", models)
