"""Adapters that must be refused, in one line that names the file or the tensor."""

import dataclasses
import json
import shutil

import huggingface_hub
import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights import adapter as adapter_file
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.hf import load_generator

BASES = ("llama", "llama-3.2", "qwen3")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Bases, and an adapter of the first that peft wrote; not to be changed."""
    root = tmp_path_factory.mktemp("adapters")
    for family in BASES:
        tiny_models.save(root / family, family, head=True)
    write(root / "adapter", root / "llama")
    return root


def write(directory, base, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(model, config).save_pretrained(directory)


@pytest.fixture
def adapter(written, tmp_path):
    shutil.copytree(written / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def change_settings(directory, **fields):
    path = directory / "adapter_config.json"
    kept = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: kept[key] for key in kept if kept[key] is not ...}))


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        tensors[name] = change(name, tensors[name])
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": ...}, r"adapter_config.json: field 'r' is missing"),
        ({"r": "4"}, r"adapter_config.json: r is '4'; expected a whole number from 1"),
        ({"lora_alpha": ...}, r"field 'lora_alpha' is missing"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan; expected a number"),
        ({"base_model_name_or_path": 3}, r"base_model_name_or_path is 3; expected a string"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication=.* is not supported"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\] is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"what_comes_next": 1}, r"adapter_config.json: what_comes_next=1 is not supported"),
        ({"layers_to_transform": [0], "r": 3}, r"its base and rank 3 make it"),
        ({"init_lora_weights": "pissa_niter_4"}, r"='pissa_niter_4' changes the base too"),
    ],
)
def test_settings_are_named(adapter, fields, message):
    change_settings(adapter, **fields)
    with pytest.raises(UserError, match=message):
        load_generator(str(adapter))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_that_changed_its_base_is_refused(written, tmp_path, init):
    # peft changes the base again as it loads such an adapter: here it would be another model.
    write(tmp_path / "adapter", written / "llama", init_lora_weights=init)
    with pytest.raises(UserError, match=rf"init_lora_weights='{init}' changes the base too"):
        load_generator(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, value: None if "q_proj.lora_B" in name else value,
            r"tensors are missing: layers.0.self_attn.q_proj.lora_B.weight",
        ),
        (
            lambda name, value: value[:, :16].copy() if "q_proj.lora_A" in name else value,
            r"layers.0.self_attn.q_proj.lora_A.weight has shape \(4, 16\); .* make it \(4, 32\)",
        ),
        (
            lambda name, value: np.ones(4, np.float32) if "q_proj.lora_A" in name else value,
            r"q_proj.lora_A.weight has shape \(4,\); its base and rank 4 make it \(4, 32\)",
        ),
    ],
)
def test_tensors_are_named(adapter, change, message):
    change_tensors(adapter, change)
    with pytest.raises(UserError, match=message):
        load_generator(str(adapter))


def test_one_for_another_base_is_refused(written, adapter):
    change_settings(adapter, base_model_name_or_path=str(written / "qwen3"))
    with pytest.raises(UserError, match=r"q_proj.lora_B.weight has shape \(32, 4\); .* \(64, 4\)"):
        load_generator(str(adapter))
    change_settings(adapter, base_model_name_or_path=str(written / "adapter"))
    with pytest.raises(UserError, match=r"its base .*adapter is an adapter, too: merge that one"):
        load_generator(str(adapter))


def test_its_files_are_named(written, adapter):
    # A trainer may leave the base's config.json beside the adapter.
    shutil.copy(written / "llama" / "config.json", adapter)
    load_generator(str(adapter))
    shutil.copy(written / "llama" / "model.safetensors", adapter)
    with pytest.raises(UserError, match=r"it holds a model \(model.safetensors\) and an adapter"):
        load_generator(str(adapter))
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin, a pickle, can run code"):
        load_generator(str(adapter))


def test_its_own_tokenizer_and_template_hold(written, adapter):
    tokenizer = transformers.AutoTokenizer.from_pretrained(written / "llama")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(adapter)
    right = tokenizer.apply_chat_template([{"role": "user", "content": "b"}], return_dict=False)
    generator, _ = load_generator(str(adapter))
    assert generator.chat_ids("b", 99)[0] == right
    # Its end of text is one more: a base of no chats may have another.
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(adapter)
    generator, params = load_generator(str(adapter))
    assert generator.eos_ids == (2, 1)
    export_generator(adapter.parent / "merged", generator, params, np.float32)
    assert load_generator(str(adapter.parent / "merged"))[0].eos_ids == (2, 1)
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template; .* or remove the adapter's tokenizer"):
        load_generator(str(adapter))
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"adapter/tokenizer.json: no such file.*; or remove the a"):
        load_generator(str(adapter))


def test_its_base_is_of_the_revision_that_it_names(written, adapter, monkeypatch):
    asked = []

    def download(repo, *, revision=None, **_):
        asked.append((repo, revision))
        return str(written / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for revision in (None, "v1.5"):
        change_settings(adapter, base_model_name_or_path="owner/name", revision=revision)
        load_generator(str(adapter))
    assert asked == [("owner/name", None), ("owner/name", "v1.5")]


def test_every_setting_of_peft_is_known():
    """One that is new is refused until somebody says what it means here."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    refused = {
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
        "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
        "use_qalora",
    }  # fmt: skip
    assert fields - {*adapter_file._READ, *adapter_file._UNREAD, *adapter_file._PLAIN} <= refused
