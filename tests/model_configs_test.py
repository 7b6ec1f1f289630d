"""Configurations that cannot be: every field is checked by name as it is read."""

import pytest

from expandr_jax.errors import UserError
from expandr_jax.weights.families import model_config
from expandr_jax.weights.fields import Fields
from tests.mutations_test import complaint_of

BERT = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
DECODER = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "bert": BERT,
    "roberta": {**BERT, "pad_token_id": 1},
    "modernbert": {
        "vocab_size": 90,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
    },
    "t5": T5,
    "anchordr": {**T5, "num_decoder_layers": 1, "pad_token_id": 1},
    "gemma3_text": {**DECODER, "sliding_window": 5, "sliding_window_pattern": 6},
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 5},
    "qwen2": {**DECODER, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": DECODER,
}
# What may stand where a whole number above 0 is expected, and where a number above 0 is.
NO_COUNTS = ["12", 1.5, True, -1, [1], {}, float("nan"), float("inf"), 10**30, "x" * 10_000]
NO_NUMBERS = ["1e-6", True, -1.0, 0, [1], float("nan"), float("inf"), 10**60]
NUMBERS = {
    "bert": ("layer_norm_eps",),
    "modernbert": ("norm_eps", "global_rope_theta", "local_rope_theta"),
    "t5": ("layer_norm_epsilon",),
    "llama": ("rms_norm_eps", "rope_theta"),
    "gemma3_text": ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
}


def read_config(kind, **fields):
    fields = {**CONFIGS[kind], **fields}
    config = Fields({k: v for k, v in fields.items() if v is not ...}, "model/config.json")
    return model_config(config, kind)


def test_a_model_of_its_own_code_is_refused():
    """transformers takes its own class of that type without a word, where code is not trusted."""
    for name in ("AutoModel", "AutoModelForCausalLM"):
        message = r"^model/config.json: auto_map names a class .* 'mine.Model', .* 'qwen2'$"
        with pytest.raises(UserError, match=message):
            read_config("qwen2", auto_map={"AutoConfig": "mine.Config", name: "mine.Model"})
    assert read_config("qwen2", auto_map={"AutoConfig": "mine.Config"})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_count_of_a_configuration_is_checked(kind):
    assert read_config(kind)
    for name, value in CONFIGS[kind].items():
        if type(value) is not int or (kind, name) == (
            "anchordr",
            "relative_attention_max_distance",
        ):
            continue  # No number, or one that the family does not use.
        lowest = [] if name in ("pad_token_id", "max_window_layers") else [0]
        for wrong in NO_COUNTS + lowest:
            complaint = complaint_of(lambda n=name, w=wrong: read_config(kind, **{n: w}), "model")
            assert complaint.startswith(f"model/config.json: {name}"), complaint


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_number_of_a_configuration_is_checked(kind):
    for name in NUMBERS[kind]:
        for wrong in NO_NUMBERS:
            complaint = complaint_of(lambda n=name, w=wrong: read_config(kind, **{n: w}), "model")
            assert complaint.startswith(f"model/config.json: {name} is "), complaint
        # As transformers writes it, a null stands for the default.
        assert read_config(kind, **{name: None}) == read_config(kind)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {"hidden_size": 30}, "hidden_size is 30; expected a multiple of num_attention_"),
        ("bert", {"vocab_size": ...}, "field 'vocab_size' is missing"),
        ("bert", {"num_hidden_layers": 10**6}, "expected a whole number from 1 to 10000"),
        ("bert", {"hidden_act": []}, "hidden_act [] is not supported; supported: gelu, "),
        ("bert", {"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relati"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported; only False is"),
        ("bert", {"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1; expected a number from 0"),
        ("bert", {"attention_probs_dropout_prob": "0.1"}, "attention_probs_dropout_prob is '0.1'"),
        ("roberta", {"pad_token_id": ...}, "field 'pad_token_id' is missing"),
        ("roberta", {"max_position_embeddings": 2}, "expected a whole number from 3"),
        ("t5", {"relative_attention_num_buckets": 3}, "expected a whole number from 4"),
        ("t5", {"relative_attention_max_distance": 8}, "expected a whole number from 9"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not supp"),
        ("anchordr", {"num_heads": 3}, "d_model is 32; expected a multiple of num_heads, 3"),
        ("anchordr", {"d_kv": 16}, "d_kv=16 is not supported; only 8 is"),
        ("anchordr", {"relative_attention_num_buckets": 508}, "from 4 to 507"),
        ("modernbert", {"hidden_size": 20}, "num_attention_heads is 5; expected an even number"),
        ("modernbert", {"hidden_activation": "quick_gelu"}, "hidden_activation 'quick_gelu' is"),
        ("modernbert", {"norm_bias": 1}, "norm_bias is 1; expected true or false"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 lay"),
        ("modernbert", {"layer_types": ["local", "full_attention"]}, "layer_types 'local' not s"),
        ("modernbert", {"sliding_window": 8}, "sliding_window=8 is not supported; only 4 is"),
        ("modernbert", {"head_dim": 4}, "head_dim=4 is not supported; only 8 is"),
        ("modernbert", {"rope_scaling": LLAMA3}, "is not supported; only None is"),
        ("modernbert", {"rope_parameters": {"rope_theta": 1.0}}, "full_attention and sliding_at"),
        (
            "modernbert",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type 'yarn' is not supported",
        ),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "rope_parameters.full_attention.partial_rotary_factor=0.5 is not supported",
        ),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads is 4; expected a multiple of"),
        ("llama", {"head_dim": 7}, "head_dim is 7; expected an even number"),
        *(
            (kind, {"is_causal": 0}, "is_causal is 0; expected true or false")
            for kind in ("llama", "mistral", "qwen2", "qwen3")
        ),
        ("gemma3_text", {"is_causal": False}, "is_causal=False is not supported; only True is"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5 is not supported",
        ),
        ("llama", {"head_dim": None, "hidden_size": 20}, "head_dim is 5; expected an even"),
        ("llama", {"head_dim": None, "hidden_size": 30}, "hidden_size is 30; expected a multiple"),
        # Gated feed-forwards have these two functions only.
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: gelu_n"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected tr"),
        ("llama", {"rope_scaling": 2.0}, "rope_scaling is 2.0; expected a JSON object"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_scaling.type 'dynamic'",
        ),
        ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type ['linear']"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "field 'rope_scaling.factor' is missing"),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": 0}}, "rope_scaling.factor is 0; expected"),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "a number above 1.0"),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
            "field 'rope_scaling.original_max_position_embeddings' is missing",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": "1e4"}},
            "rope_parameters.rope_theta is '1e4'",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "layer_types 'chunked' not supp"),
        ("qwen2", {"layer_types": ["full_attention", 3]}, "layer_types is ['full_attention', 3]; "),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; expected true or"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not s"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": LLAMA3}},
            "rope_parameters.sliding_attention.rope_type='llama3' is not supported",
        ),
    ],
)
def test_options_of_a_configuration_are_checked(kind, fields, message):
    assert message in complaint_of(lambda: read_config(kind, **fields), "model/config.json")


@pytest.mark.parametrize("kind", [None, 3, ["llama"], {}, "gpt2", "llama\n" * 1000])
def test_a_model_type_that_is_none(kind):
    complaint = complaint_of(lambda: model_config(Fields({}, "config.json"), kind), "config.json")
    assert "is not supported; supported: bert, " in complaint


def test_fields_that_change_nothing_are_left_alone():
    """What a published ModernBERT's file says besides, of heads, of training and of kernels."""
    plain = read_config("modernbert")
    assert plain == read_config(
        "modernbert", classifier_pooling="mean", classifier_bias=True, decoder_bias=False,
        deterministic_flash_attn=True, initializer_range=0.1, initializer_cutoff_factor=3.0,
        layer_norm_eps=1e-3, pad_token_id=5, position_embedding_type="absolute",
        reference_compile=True, repad_logits_with_grad=True, rope_theta=5.0,
        sparse_prediction=True, tie_word_embeddings=False,
    )  # fmt: skip


def test_both_forms_of_two_rotary_bases_are_read():
    older = read_config("modernbert", global_rope_theta=5e5, local_rope_theta=2e4)
    bases = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    assert older == read_config("modernbert", rope_parameters=bases)
    assert (older.rope_theta, older.rope_local_theta) == (5e5, 2e4)
    assert older.layer_is_local == (False, True)
    mixed = {"full_attention": {"rope_type": "default"}, "sliding_attention": None}
    assert read_config("modernbert", rope_parameters=mixed) == read_config("modernbert")
