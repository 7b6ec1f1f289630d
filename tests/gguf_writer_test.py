"""GGUF files that we write: in the gguf package, in transformers, in our own reader."""

import unicodedata

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights.byte_level import PRE_TOKENIZERS
from expandr_jax.weights.gguf_writer import export_gguf
from expandr_jax.weights.hf import load_generator
from tests.load_model import logits
from train.export import export_one, target

ROWS = 352  # Some more than there are tokens.
TEXTS = (
    "In 2024, numpy.pad(x, 12) doesn't  wrap\n\n\tround: it's 3.14 — naïve 東京 ½ ٣ x2y",
    "  leading and trailing  ",
    "We'll see THEY'LL; a\u00a0b 🙂🙂 e\u0301",
    "a</s>b <s>c",
    "",
)
# transformers knows Gemma 3's tokens by SentencePiece alone.
PIECES = {"llama": "gpt-2", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen2"}
SHAPE = {"hidden_size": 64, "vocab_size": ROWS}
GEMMA = {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Family -> what its config has otherwise than the tiny models' and its llama.cpp name.
FAMILIES = {
    "llama": ({}, "llama"),
    "llama-3.2": ({"rope_scaling": LLAMA3}, "llama"),
    "mistral": ({}, "llama"),
    "qwen2": ({}, "qwen2"),
    "qwen3": ({}, "qwen3"),
    "gemma3": (GEMMA, "gemma3"),
    "gemma3-linear": (GEMMA, "gemma3"),
}


def byte_level(split: str) -> Tokenizer:
    """A byte-level BPE that has learned a few merges."""
    backend, pattern = Tokenizer(models.BPE()), PRE_TOKENIZERS[split]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    if split == "smollm":
        cut = [pre_tokenizers.Digits(individual_digits=True)]
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<pad>")]
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 12, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "the anchor 123 12 1234 it's 2024"] * 9, trainer)
    return backend


def sentencepiece_tokens(directory) -> Tokenizer:
    """SentencePiece's BPE, as transformers turns it into tokenizers' form for Mistral."""
    text = directory / "text"
    words = "the anchor text of a web page leads to the page that it's about, 12 3.5"
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words.split(), 8)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "sp"), model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=["<pad>"], minloglevel=2,
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "sp.model"))
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [
        (-library.get_score(i), -cut, piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        if not (library.is_control(i) or library.is_byte(i) or library.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(vocab, merges, **options))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = ("<unk>", "<s>", "</s>", "<pad>")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return backend


def save(directory, family, split=None, **changes):
    """A tiny model with a tokenizer that merges."""
    model = tiny_models.torch_model(family, head=True, **SHAPE, **changes)
    model.save_pretrained(directory)
    split = split or PIECES.get(family, "llama")
    backend = sentencepiece_tokens(directory) if split == "llama" else byte_level(split)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names,
        chat_template=tiny_models.TEMPLATE, model_max_length=64,
    ).save_pretrained(directory)  # fmt: skip
    return model


def expected_tensors(model):
    """A PyTorch model's tables; a tied head is one of them."""
    tied = model.config.tie_word_embeddings
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {name: x for name, x in state.items() if not (tied and name == "lm_head.weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_the_numbers_of_the_model(family, tmp_path):
    changes, architecture = FAMILIES[family]
    model = save(tmp_path, family, **changes)
    generator, params = load_generator(str(tmp_path), in_files=True)
    for kind in ("f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        export_gguf(path, generator, params, kind)
        again, _ = load_generator(str(path))
        ours = again.files
        theirs = gguf.GGUFReader(path)
        assert {str(t.name) for t in theirs.tensors} >= {"token_embd.weight", "output_norm.weight"}
        state = expected_tensors(model)
        assert state.keys() == ours.tensors.keys()
        for name, tensor in state.items():
            found = ours.read(name, slice(None))
            half = tensor.astype(np.float16).astype(np.float32)
            if tensor.ndim == 1:
                # llama.cpp keeps Gemma's 1 + w, which rounds w.
                close = {"atol": 1e-7 if architecture == "gemma3" else 0, "rtol": 0}
                np.testing.assert_allclose(found, tensor, **close, err_msg=name)
            elif kind == "f16" or tensor.shape[-1] % 32:
                np.testing.assert_array_equal(found, half, err_msg=name)
            else:
                # A block of 32 has one scale, a 127th of its largest, as half a float.
                blocks = tensor.reshape(-1, 32)
                step = np.abs(blocks).max(axis=1, keepdims=True) / 127
                error = np.abs(found.reshape(-1, 32) - blocks)
                assert (error <= step * (0.5 + 127 * 2**-11 + 1e-5)).all(), name
                assert error.any(), name
        kept = again.module.config
        assert kept == generator.module.config


# transformers does not read a head's width of Qwen 3, nor what scales Gemma's scores.
STOCK = {
    "qwen3": {"head_dim": 128},
    "gemma3": {**GEMMA, "head_dim": 256, "query_pre_attn_scalar": 256},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_transformers_computes_the_same_from_the_file(family, tmp_path):
    reference = save(tmp_path, family, **STOCK.get(family, {}))
    generator, params = load_generator(str(tmp_path), in_files=True)
    export_gguf(tmp_path / "model.gguf", generator, params, "f16")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
        ids = torch.tensor(tiny_models.ragged_batch("right", lengths=(12, 12))[0])
        found, expected = model.eval()(ids).logits, reference(ids).logits
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2", "llama"])
def test_tokens_and_chats_are_the_same_again(split, tmp_path):
    # Qwen 2 has one way to cut, whatever its tokenizer.json says.
    save(tmp_path, "qwen2" if split == "qwen2" else "qwen3", split)
    generator, params = load_generator(str(tmp_path), in_files=True)
    export_gguf(tmp_path / "model.gguf", generator, params, "q8_0")
    again, _ = load_generator(str(tmp_path / "model.gguf"))
    for text in TEXTS:
        assert again.tokenizer(text)["input_ids"] == generator.tokenizer(text)["input_ids"]
        assert again.chat_ids(text, 999) == generator.chat_ids(text, 999)
    assert (again.eos_ids, again.pad_id) == (generator.eos_ids, generator.pad_id)
    assert again.tokenizer.chat_template == generator.tokenizer.chat_template
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == ("llama" if split == "llama" else "gpt2")
    assert fields["tokenizer.ggml.pre"].contents() == ("default" if split == "llama" else split)
    assert len(fields["tokenizer.ggml.tokens"].contents()) == ROWS
    assert fields["general.file_type"].contents() == 7
    assert fields["tokenizer.chat_template"].contents() == generator.tokenizer.chat_template
    # transformers cuts as its class of the family does, whatever `pre` says, without composing.
    if split == "qwen2":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert theirs.chat_template == generator.tokenizer.chat_template
        for text in TEXTS:
            text = unicodedata.normalize("NFC", text)
            assert theirs(text)["input_ids"] == generator.tokenizer(text)["input_ids"]


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path):
    cases = (
        ("mistral-window", None, {}, "no sliding window in llama"),
        ("gemma3", None, {}, "see a window, but for each 6th"),
        ("gemma3", None, GEMMA | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is not 16"),
        ("qwen2", "gpt-2", {"hidden_act": "gelu_new"}, "has no gelu_tanh in qwen2"),
        ("qwen2", "gpt-2", {"rope_scaling": LLAMA3}, "stretches no positions of qwen2"),
    )
    for number, (family, split, changes, message) in enumerate(cases):
        directory = tmp_path / str(number)
        save(directory, family, split, **changes)
        generator, params = load_generator(str(directory), in_files=True)
        with pytest.raises(UserError, match=message):
            export_gguf(tmp_path / "model.gguf", generator, params, "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_other_tokenizers_and_numbers_are_refused(tmp_path):
    save(tmp_path, "qwen2")
    generator, params = load_generator(str(tmp_path))
    path = tmp_path / "model.gguf"
    export_gguf(path, generator, params, "f16")
    whole = path.read_bytes()
    for kind, number in (("f16", 7e4), ("q8_0", 9e6), ("q8_0", np.nan)):
        huge = params | {"embedding": params["embedding"].at[3, 2].set(number)}
        message = rf"model.gguf: .*token_embd.weight has a number that {kind} cannot hold"
        with pytest.raises(UserError, match=message):
            export_gguf(path, generator, huge, kind)
    norm = jax.tree.map(lambda x: x.at[0].set(np.inf), params["final_norm"])
    with pytest.raises(UserError, match=r"output_norm\.weight has a number that f32 cannot hold"):
        export_gguf(path, generator, params | {"final_norm": norm}, "f16")
    assert path.read_bytes() == whole
    assert {p.name for p in tmp_path.iterdir() if "gguf" in p.name} == {"model.gguf"}
    generator.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(True)
    with pytest.raises(UserError, match=r"cuts texts otherwise than llama.cpp"):
        export_gguf(path, generator, params, "f16")
    generator.tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0}, "a")
    with pytest.raises(UserError, match="its tokenizer is 'WordLevel'"):
        export_gguf(path, generator, params, "f16")


def test_a_run_is_exported_as_a_file(smoke, tmp_path):
    workdir, _ = smoke
    path = tmp_path / "run.gguf"
    export_one(workdir, path, "gguf", "float32", gguf_type="q8_0")
    (again, params), (generator, whole) = map(
        load_generator, (str(path), f"{workdir}/export/generator")
    )
    assert again.module.config == generator.module.config
    for text in (*TEXTS, "user"):
        assert again.chat_ids(text, 999) == generator.chat_ids(text, 999)
    error = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, whole)
    assert max(jax.tree.leaves(error)) < 0.02


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--to=there: expected the name of a file that ends in"):
        target("there", "gguf")
    with pytest.raises(UserError, match=r"--dtype=bfloat16: is not of GGUF; expected --gguf_type"):
        target("a.gguf", "gguf", "bfloat16")
    with pytest.raises(UserError, match="--gguf_type=f16: is of --format=gguf alone"):
        target("there", "generator", None, "f16")
    assert target(str(tmp_path / "a.gguf"), "gguf") == tmp_path / "a.gguf"


@pytest.mark.slow
def test_smollm2_is_the_same_model_again(smollm2, tmp_path):
    generator, params = smollm2
    path = tmp_path / "smollm2.gguf"
    export_gguf(path, generator, params, "f16")
    again, halves = load_generator(str(path))

    def check(path, found, given):
        norm = path[-1].key == "scale"
        half = given if norm else given.astype(jnp.float16).astype(jnp.float32)
        np.testing.assert_array_equal(found, half, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, halves, params)
    assert again.eos_ids == generator.eos_ids
    assert again.tokenizer.get_vocab() == generator.tokenizer.get_vocab()
    for text in TEXTS:
        assert again.chat_ids(text, 999) == generator.chat_ids(text, 999)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ids = np.array([generator.chat_ids("What does numpy.pad do?", 99)[0]])
    found = logits(again.module, halves, ids, np.ones_like(ids))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)
