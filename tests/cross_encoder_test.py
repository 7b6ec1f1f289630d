"""Cross-encoders against transformers and sentence-transformers, on random models."""

import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import CrossEncoder as Peer
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from expandr_jax.errors import UserError
from expandr_jax.weights.cross_encoder import load_cross_encoder
from tests.file_options import edit

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert"
QUERY = "clip the norm of the gradient"
DOCUMENTS = [
    "Clips updates by their global norm.",
    "Returns an array.",
    "",
    "The learning rate schedule, momentum and weight decay of an optimizer state. " * 12,
]
LONG = QUERY + " of an array" * 6  # Longer than half of what a pair may have.


def save(directory: pathlib.Path, kind: str, **fields) -> pathlib.Path:
    """A random classifier of the tiny model's shape, with its tokenizer for pairs."""
    torch.manual_seed(0)
    backend = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    second = ":1" if kind == "bert" else ""
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}",
        special_tokens=ends,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", model_max_length=48,
        model_input_names=["input_ids", "attention_mask"]
        + (["token_type_ids"] if kind == "bert" else []),
    )  # fmt: skip
    shape = {
        "vocab_size": backend.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
        "num_labels": 1, "initializer_range": 0.5, "pad_token_id": backend.token_to_id("[PAD]"),
    } | fields  # fmt: skip
    config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](**shape)
    AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_scores_are_those_of_sentence_transformers(tmp_path, kind):
    directory = save(tmp_path / "model", kind)
    peer = Peer(str(directory), device="cpu")
    expected = peer.predict([(QUERY, document) for document in DOCUMENTS])
    encoder, params = load_cross_encoder(str(directory))
    found = encoder.scores(params, QUERY, DOCUMENTS, rows=3)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 1e-2
    assert 24 < len(encoder.token_ids(LONG, [""])[0][0]) < 48
    expected = peer.predict([(LONG, document) for document in DOCUMENTS])
    np.testing.assert_allclose(encoder.scores(params, LONG, DOCUMENTS), expected, atol=1e-4)
    assert max(len(ids) for ids, _ in encoder.token_ids(QUERY, DOCUMENTS)) == 48
    # What it writes itself loads, too, and says which activation it has.
    other = Peer(str(directory), device="cpu", activation_fn=torch.nn.Identity())
    other.save_pretrained(str(tmp_path / "own"))
    encoder, params = load_cross_encoder(str(tmp_path / "own"))
    logits = other.predict([(QUERY, document) for document in DOCUMENTS])
    np.testing.assert_allclose(encoder.scores(params, QUERY, DOCUMENTS), logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["BertTokenizer", "DistilBertTokenizer", "TokenizersBackend"])
def test_token_types_are_those_of_the_tokenizer_s_class(tmp_path, kind):
    """Most files of BERT's do not say them by model_input_names."""
    settings = save(tmp_path, "bert") / "tokenizer_config.json"
    fields = {**json.loads(settings.read_text()), "tokenizer_class": kind}
    del fields["model_input_names"]
    settings.write_text(json.dumps(fields))
    right = AutoTokenizer.from_pretrained(tmp_path)([QUERY], [DOCUMENTS[0]])
    encoder, _ = load_cross_encoder(str(tmp_path))
    ((ids, types),) = encoder.token_ids(QUERY, DOCUMENTS[:1])
    assert [ids] == right["input_ids"]
    assert [types] == right.get("token_type_ids", [[0] * len(ids)])
    assert (max(types) == 1) == (kind == "BertTokenizer")


def test_a_score_does_not_depend_on_what_is_scored_with_it(tmp_path):
    encoder, params = load_cross_encoder(str(save(tmp_path, "bert")))
    together = encoder.scores(params, QUERY, DOCUMENTS)
    order = [2, 0, 3, 1]
    alone = encoder.scores(params, QUERY, [DOCUMENTS[i] for i in order], rows=2)
    np.testing.assert_allclose(alone, together[order], atol=1e-6)
    assert encoder.scores(params, QUERY, []).shape == (0,)  # No document was found.


def test_other_heads_and_activations_are_refused(tmp_path):
    with pytest.raises(UserError, match="id2label has 3 labels; expected the one of a score"):
        load_cross_encoder(str(save(tmp_path / "three", "bert", num_labels=3)))
    with pytest.raises(UserError, match="type_vocab_size is 1, but the tokenizer marks the second"):
        load_cross_encoder(str(save(tmp_path / "one", "bert", type_vocab_size=1)))
    directory = save(tmp_path / "odd", "bert")
    own = directory / "config_sentence_transformers.json"
    own.write_text(json.dumps({"activation_fn": "my.Function"}))
    edit(directory / "sentence_bert_config.json", max_seq_length=12)
    encoder, _ = load_cross_encoder(str(directory))  # There is no list that has these files read.
    assert (encoder.activation, encoder.max_length) == ("sigmoid", 48)
    (directory / "sentence_bert_config.json").unlink()
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (directory / "modules.json").write_text(json.dumps([module]))
    kind = {"model_type": "CrossEncoder"}
    own.write_text(json.dumps({"activation_fn": "my.Function"} | kind))
    with pytest.raises(
        UserError, match=r"activation_fn 'my.Function' is not supported; supported: t"
    ):
        load_cross_encoder(str(directory))
    own.write_text(json.dumps({"activation_fn": {"name": "Sigmoid"}} | kind))
    with pytest.raises(UserError, match=r"activation_fn {'name': 'Sigmoid'} is not supported"):
        load_cross_encoder(str(directory))
    own.write_text(json.dumps({"prompts": {"q": "query: "}, "default_prompt_name": "q"} | kind))
    with pytest.raises(UserError, match="default_prompt_name='q' is not supported; only None is"):
        load_cross_encoder(str(directory))
    own.unlink()
    (directory / "modules.json").unlink()
    shape = (directory / "config.json").read_text()
    (directory / "config.json").write_text(json.dumps(json.loads(shape) | {"model_type": ["bert"]}))
    with pytest.raises(UserError, match="a cross-encoder is a whole model of type bert"):
        load_cross_encoder(str(directory))
    (directory / "config.json").write_text(shape)
    with pytest.raises(UserError, match="max_length is 4; no pair of texts fits into it"):
        load_cross_encoder(str(directory), max_length=4)
    tensors = load_file(directory / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "classifier.bias"},
              directory / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"1 tensors are missing: classifier.bias"):
        load_cross_encoder(str(directory))
    with pytest.raises(UserError, match="a cross-encoder is a whole model of type bert"):
        load_cross_encoder(str(TINY.parent / "tiny-llama"))
