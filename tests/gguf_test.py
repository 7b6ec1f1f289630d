"""GGUF: our reader against the gguf package's, our models against transformers', tokenizers."""

import itertools

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
import torch
import transformers

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.gguf import open_gguf
from expandr_jax.weights.gguf_reader import GgufReader
from expandr_jax.weights.gguf_tokenizer import ends_of_turn, read_gguf_tokenizer
from expandr_jax.weights.hf import load_generator
from expandr_jax.weights.source import locate
from tests import conftest
from tests.load_model import load_model, logits

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, names):
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, module = stem.split(".", 3)
        return f"blk.{layer}.{names[module]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def write_gguf(path, model, architecture, *, pre="smollm", tokenizer="gpt2", rope_freqs=None):
    """Writes a PyTorch model as llama.cpp's converter does, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None)
    writer.add_key_length(head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if rope["full_attention"]["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    letters = [chr(c) for c in range(ord("!"), ord("~"))][: tiny_models.VOCAB - 5]
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<unk>", "<s>", "</s>", "Ġ", *letters, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * (tiny_models.VOCAB - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny_models.TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        names = NAMES
        if architecture == "gemma3":
            names = GEMMA_NAMES
            array = array + 1 if name.endswith("norm.weight") else array
        writer.add_tensor(gguf_name(name, names), np.ascontiguousarray(array))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Deep enough for a layer of each kind after a global one; scores scaled by the head's width.
DEEP = {
    "num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3", DEEP),
        ("gemma3", {**DEEP, "rope_parameters": tiny_models.linear_rope(1e6, 1e4)}),
    ],
)
def test_models_equal_the_one_that_was_written(family, changes, tmp_path):
    path = tmp_path / "model.gguf"
    reference = tiny_models.torch_model(family, head=True, **changes)
    write_gguf(path, reference, family)
    module, params, files = load_model(str(path))
    ids, mask = tiny_models.ragged_batch("right")
    found = logits(module, params, ids, mask)
    with torch.no_grad():
        expected = reference(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    assert np.abs((found - expected) * mask[..., None]).max() < 1e-4
    for key in ("rms_norm_eps", "tie_word_embeddings", "head_dim", "intermediate_size"):
        if hasattr(reference.config, key):
            assert files.config.values[key] == getattr(reference.config, key), key
    if family == "gemma3":
        # transformers understands the configuration made from the metadata alike.
        theirs = transformers.Gemma3TextConfig(**files.config.values)
        for key in ("layer_types", "rope_parameters", "sliding_window", "query_pre_attn_scalar"):
            assert getattr(theirs, key) == getattr(reference.config, key), key


def test_every_quantization_reads_as_the_gguf_package_does(tmp_path):
    path = tmp_path / "kinds.gguf"
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("text", "naïve 東京")
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_uint64("large", 2**40)
    plain = (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q4_1, kinds.Q5_1)
    for kind in plain:
        data = gguf.quantize(rng.normal(size=(3, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    # All others that the package dequantizes, some of which it cannot make.
    others = gguf.quants._type_traits.keys() - set(plain)
    assert {kinds.Q5_0, kinds.Q3_K, kinds.Q4_K, kinds.Q6_K, kinds.IQ2_XS, kinds.TQ1_0} <= others
    for kind in sorted(others):
        _, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 60, (2, size), dtype=np.uint8)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.add_tensor("other", rng.integers(0, 60, (2, 8), dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GgufReader(path), gguf.GGUFReader(path)
    assert ours.metadata["text"] == "naïve 東京"
    assert ours.metadata["numbers"] == [1.5, -2.0]
    assert ours.metadata["large"] == 2**40
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    with pytest.raises(UserError, match=r"kinds.gguf: tensor other is stored as I32, which the"):
        ours.read("other")
    for tensor in theirs.tensors[:-1]:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = ours.read(tensor.name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_rope_scaling_is_recovered_from_its_divisors(tmp_path):
    options = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**shape, rope_theta=5e5, rope_scaling=dict(options))
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled = init(config, "cpu")[0].numpy()
    plain = 5e5 ** -(np.arange(0, 128, 2, dtype=np.float32) / 128)
    model = tiny_models.torch_model("llama", head=True)
    model.config.head_dim = 128  # all that the divisors depend on
    path = tmp_path / "scaled.gguf"
    write_gguf(path, model, "llama", rope_freqs=(plain / scaled).astype(np.float32))
    assert open_gguf(path).config.values["rope_scaling"] == options
    write_gguf(path, model, "llama", rope_freqs=np.linspace(1, 9, 64, dtype=np.float32))
    with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3's"):
        open_gguf(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_equal_the_library(prefix, tmp_path):
    text = tmp_path / "text"
    words = "the anchor text of a web page leads to the page that it's about, 12 3.5"
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words.split(), 8)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "sp"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<end_of_turn>"],
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(library.get_piece_size())

    def kind(i):
        if library.is_unknown(i):
            return 2
        if library.is_control(i):
            return 3
        return 6 if library.is_byte(i) else 4 if library.id_to_piece(i) == "\n" else 1

    metadata = {
        "general.architecture": "gemma3",
        "gemma3.context_length": 99,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [library.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": library.bos_id(),
        "tokenizer.ggml.eos_token_id": library.eos_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    fields = Fields(metadata, "file")
    tokenizer = read_gguf_tokenizer(fields, len(ids))
    end = library.piece_to_id("<end_of_turn>")
    assert ends_of_turn(fields) == [end]
    for sample in (
        "the web page leads",
        "it's  about 35,",
        "naïve 東 anchors",
        "a",
        "pagepage the",
    ):
        ids = tokenizer(sample)["input_ids"]
        assert ids == [library.bos_id(), *library.encode(sample)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample
    assert tokenizer("a<end_of_turn>", add_special_tokens=False)["input_ids"][-1] == end
    newline = library.piece_to_id("\n")
    assert tokenizer("a\n\n", add_special_tokens=False)["input_ids"][-2:] == [newline] * 2


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bpe_twin(text, vocab, ranks):
    """Byte-pair encoding as llama.cpp does it for `smollm`: digits alone, then GPT-2's words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (c for c in range(256) if c not in printable)
    letter = {c: chr(c) for c in printable} | {c: chr(256 + i) for i, c in enumerate(others)}
    ids = []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(GPT2, piece):
            parts = [letter[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
                best = int(np.argmin(pairs))
                if pairs[best] == len(ranks):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [vocab[part] for part in parts]
    return ids


def test_smollm2_tokens_equal_a_twin(smollm2):
    generator, _ = smollm2
    reader = GgufReader(locate(conftest.SMOLLM2))
    vocab = {token: i for i, token in enumerate(reader.metadata["tokenizer.ggml.tokens"])}
    merges = reader.metadata["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    for text in (
        "In 2024, numpy.pad(x, 12) doesn't  wrap\n\n\tround: it's 3.14 — naïve 東京 ½ ٣ x2y",
        "  leading and trailing  ",
        "We'll see THEY'LL; a\u00a0b 🙂🙂 e\u0301",
        "",
    ):
        ids = generator.tokenizer(text)["input_ids"]
        assert ids == bpe_twin(text, vocab, ranks)
        assert generator.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Hi", "Ġ", "1", "2", "3", "4", "Ċ", "Ġit", "'s"]),
        ("llama-bpe", ["Hi", "Ġ", "123", "4", "Ċ", "Ġit", "'s"]),
        ("qwen2", ["Hi", "Ġ", "1", "2", "3", "4", "Ċ", "Ġit", "'s"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, expected, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_models.torch_model("llama", head=True), "llama", pre=pre)
    generator, _ = load_generator(str(path))
    cut = generator.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("Hi 1234\n it's")
    assert [piece for piece, _ in cut] == expected
    # Llama 3 begins texts with its first token; the chat template brings its own.
    plain = generator.tokenizer("ab").input_ids
    assert plain == [1] * (pre == "llama-bpe") + [tiny_models.VOCAB - 1]
    assert generator.chat_ids("b", 99)[0].count(1) == 1


def test_refused_files(tmp_path):
    path, model = tmp_path / "model.gguf", tiny_models.torch_model("llama", head=True)
    write_gguf(path, model, "llama", tokenizer="bert")
    with pytest.raises(UserError, match=r"tokenizer 'bert' with pre 'smollm' is not supported"):
        load_generator(str(path))
    write_gguf(path, model, "llama", pre="new")
    with pytest.raises(UserError, match=r"pre 'new' is not supported"):
        load_generator(str(path))
    whole = path.read_bytes()
    for cut in (0, 3, 100, 2000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"not a whole GGUF file"):
            load_model(str(path))
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(UserError, match=r"does not begin"):
        load_model(str(path))
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.block_COUNT"))
    with pytest.raises(UserError, match=r"field 'llama.block_count' is missing"):
        load_model(str(path))
    write_gguf(path, model, "falcon")
    with pytest.raises(UserError, match=r"general.architecture 'falcon' is not supported"):
        load_model(str(path))
