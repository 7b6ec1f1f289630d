"""Models with every option that their files can have, against the libraries that wrote them.

    python -m tests.file_options --combinations=300 --seed=0

Each combination is a tiny random model of some family with one or two options: of the files beside
it, or any field of its class of configurations. Its vectors, or its chat prompts and their logits,
must be those of sentence-transformers and transformers to 1e-4, or the program must refuse the
option by name. What was covered is printed; exit 1: something differs.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval import tiny_models
from expandr_jax.errors import UserError

TEXTS = [
    "plain words", "", " padded ", "a line\n", "CAPS and accents: \u00c9t\u00e9", "tab\tin", "x",
    "a <pad> and </s> in it", "<s>", "\u65e5\u672c",
    "how do I invert a matrix quickly, and then store it? " * 3,
]  # fmt: skip
PROMPT = "how do I invert a matrix, and then store it?"
# What is compared: vectors without and with a module behind pooling, or a chat model's logits.
KINDS = ("vectors", "Normalize", "Dense", "logits")
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Option:
    """Something that a model's directory may say.

    Attributes:
        name: What a refusal must name, and what is counted.
        value: Which value, for people.
        apply: Changes the directory.
        changes: What the configuration has, with which the model is made.
    """

    name: str
    value: str
    apply: Callable[[pathlib.Path], None] = lambda _: None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def edit(path: pathlib.Path, **fields: Any) -> None:
    """Sets fields of a JSON file, made if absent."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**values, **fields}), encoding="utf-8")


def setting(file: str, name: str, *values: Any) -> list[Option]:
    """A field of a JSON file, with each of these values."""
    return [Option(name, json.dumps(v), lambda d, v=v: edit(d / file, **{name: v})) for v in values]


def backend(name: str, value: str, change: Callable[[Any], None]) -> Option:
    """A change of tokenizer.json by the tokenizers library."""

    def apply(directory: pathlib.Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(directory / "tokenizer.json"))

    return Option(name, value, apply)


def tokenizer_options() -> list[Option]:
    """What tokenizer.json and tokenizer_config.json may say."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

    def normalizer(kind: Any) -> Callable[[Any], None]:
        return lambda t: setattr(t, "normalizer", kind)

    file = "tokenizer_config.json"
    return [
        *setting(file, "truncation_side", "left", "right"),
        *setting(file, "padding_side", "left", "right"),
        *setting(file, "model_max_length", 8, 1000000000000000019884624838656),
        *setting(file, "clean_up_tokenization_spaces", True, False),
        *setting(file, "model_input_names", ["input_ids", "attention_mask"]),
        *setting(file, "pad_token", "</s>"),
        *setting(file, "split_special_tokens", True, False),
        *setting(file, "added_tokens_decoder", {"2": {"content": "</s>", "special": True,
                 "lstrip": True, "rstrip": True, "normalized": False}}),
        backend("normalizer", "lower-case", normalizer(normalizers.Lowercase())),
        backend("normalizer", "NFD", normalizer(normalizers.NFD())),
        backend("normalizer", "accents", normalizer(
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]))),
        backend("normalizer", "strip", normalizer(normalizers.Strip())),
        backend("pre_tokenizer", "prefix space", lambda t: setattr(
            t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        backend("truncation", "left, 9", lambda t: t.enable_truncation(9, direction="left")),
        backend("truncation", "right, 9", lambda t: t.enable_truncation(9)),
        backend("padding", "left, to 16", lambda t: t.enable_padding(
            direction="left", length=16, pad_token="<pad>")),
        backend("post_processor", "bos alone", lambda t: setattr(
            t, "post_processor", processors.TemplateProcessing(
                "<s> $A", "<s> $A $B", [("<s>", t.token_to_id("<s>"))]))),
        backend("post_processor", "eos alone", lambda t: setattr(
            t, "post_processor", processors.TemplateProcessing(
                "$A </s>", "$A $B </s>", [("</s>", t.token_to_id("</s>"))]))),
        backend("added_tokens", "a word", lambda t: t.add_tokens([AddedToken("pl")])),
        backend("added_tokens", "stripping", lambda t: t.add_special_tokens(
            [AddedToken("</s>", lstrip=True, rstrip=True)])),
    ]  # fmt: skip


def sentence_options() -> list[Option]:
    """What sentence-transformers' files may say."""
    own, transformer = "config_sentence_transformers.json", "sentence_bert_config.json"
    pooling = "1_Pooling/config.json"
    prompts = (
        {"query": "query: ", "document": ""}, {"query": "", "document": "passage: "}, {"a": "zz"},
        {"query": "q: ", "passage": "p: "}, {},
    )  # fmt: skip
    modes = ("mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens")

    def rename(directory: pathlib.Path) -> None:
        (directory / transformer).rename(directory / "sentence_roberta_config.json")

    def default_prompt(directory: pathlib.Path) -> None:
        edit(directory / own, prompts={"a": "zz: "}, default_prompt_name="a")

    return [
        *setting(own, "similarity_fn_name", "cosine", "dot", "euclidean", "manhattan", None),
        *setting(own, "prompts", *prompts),
        *setting(own, "truncate_dim", 8),
        Option("default_prompt_name", "a", default_prompt),
        *setting(transformer, "max_seq_length", 7, 30, None),
        *setting(transformer, "do_lower_case", True, False),
        *setting(transformer, "model_args", {"attn_implementation": "eager"}),
        *setting(transformer, "model_kwargs", {"dtype": "float32"}, {"output_attentions": True}),
        *setting(transformer, "config_args", {"hidden_act": "relu"}),
        *setting(transformer, "processor_kwargs", {"model_max_length": 9}),
        *setting(transformer, "tokenizer_args", {"truncation_side": "left"}),
        *setting(transformer, "processing_kwargs", {"text": {"max_length": 6}}),
        *setting(transformer, "query_length", 6),
        *setting(transformer, "document_length", 6),
        Option("sentence_roberta_config.json", "by that name", rename),
        *[Option("pooling", mode, lambda d, m=mode: (d / pooling).write_text(
            json.dumps({"embedding_dimension": 32, "pooling_mode": m}))) for mode in modes],
        Option("pooling", "two", lambda d: (d / pooling).write_text(
            json.dumps({"embedding_dimension": 32, "pooling_mode": ["cls", "mean"]}))),
        Option("pooling", "old names", lambda d: (d / pooling).write_text(json.dumps(
            {"word_embedding_dimension": 32, "pooling_mode_cls_token": True,
             "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}))),
        Option("pooling", "none said", lambda d: (d / pooling).write_text(
            json.dumps({"word_embedding_dimension": 32}))),
        *setting(pooling, "include_prompt", False, True),
    ]  # fmt: skip


def dense_options() -> list[Option]:
    """What a Dense module's file may say."""
    file, torch = "2_Dense/config.json", "torch.nn.modules"
    activations = (f"{torch}.linear.Identity", f"{torch}.activation.GELU", "mine.Swish")
    return [
        *setting(file, "activation_function", *activations),
        *setting(file, "bias", False), *setting(file, "use_residual", True, False, None),
        *setting(file, "in_features", 16), *setting(file, "out_features", 16),
        *setting(file, "module_input_name", "token_embeddings"),
        *setting(file, "module_output_name", "sentence_embedding", None, "other"),
    ]  # fmt: skip


def chat_options() -> list[Option]:
    """What generation_config.json may say."""
    file = "generation_config.json"
    return [
        *setting(file, "temperature", 0.5), *setting(file, "repetition_penalty", 1.2),
        *setting(file, "suppress_tokens", [], [5]), *setting(file, "bad_words_ids", [[7]]),
        *setting(file, "forced_eos_token_id", 2), *setting(file, "eos_token_id", [2, 5]),
    ]  # fmt: skip


@functools.cache
def class_options(family: str) -> list[Option]:
    """Every field of the family's class of configurations, with another value than it has."""

    def other(name: str, value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return 2 * value or 1
        if isinstance(value, str):
            return "relu" if "act" in name else value
        return 2 if value is None else value

    fields = tiny_models.torch_model(family).config.to_dict()
    changed = {name: other(name, value) for name, value in fields.items()}
    return [
        Option(name, json.dumps(value), changes={name: value})
        for name, value in changed.items()
        if value != fields[name]
    ]


def model_options(family: str) -> list[Option]:
    """What config.json may say, beside the family's own variants."""
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    common = setting("config.json", "pad_token_id", 0, 1, 2)
    if family in tiny_models.DECODERS:
        return [*common, *setting("config.json", "rope_scaling", linear, None),
                *setting("config.json", "is_causal", True, False),
                *setting("config.json", "partial_rotary_factor", 0.5),
                *setting("config.json", "rms_norm_eps", 1e-3)]  # fmt: skip
    if "bert" in family and "modern" not in family:
        return [*common, *setting("config.json", "hidden_act", "relu", "gelu_new"),
                *setting("config.json", "layer_norm_eps", 1e-3)]  # fmt: skip
    return common


def combinations(count: int, seed: int) -> list[tuple[str, str, tuple[Option, ...]]]:
    """So many (family, one of KINDS, options), each option of the files beside it in its turn."""
    draw = random.Random(seed)
    families = [*tiny_models.ENCODERS, *tiny_models.DECODERS]
    chosen, shared = [], [*tokenizer_options(), *sentence_options()]
    draw.shuffle(shared)
    draw.shuffle(families)
    turns = itertools.cycle(shared)

    def fits(option: Option) -> bool:
        # AutoTokenizer makes Qwen 2's own tokens anew where tokenizer_config.json lacks an
        # added_tokens_decoder, which all files of Qwen's have.
        return option.value != "stripping" or not family.startswith("qwen2")

    for number in range(count):
        family = families[number % len(families)]
        kinds = KINDS if family in tiny_models.DECODERS else KINDS[:-1]
        kind = draw.choice(kinds)
        fields = [*class_options(family), *model_options(family)]
        if kind == "logits":
            fields += chat_options()
            first = draw.choice(chat_options() if draw.random() < 0.4 else fields)
        else:
            fields += dense_options() if kind == "Dense" else []
            first = next(filter(fits, turns)) if draw.random() < 0.6 else draw.choice(fields)
            fields += shared
        others = [
            o
            for o in filter(fits, fields)
            if {first.name, o.name} not in ({first.name}, {"pooling", "include_prompt"})
        ]
        options = (first, draw.choice(others)) if number % 2 else (first,)
        chosen.append((family, kind, options))
    return chosen


def write(directory: pathlib.Path, family: str, kind: str, options: Sequence[Option]) -> None:
    """A model of the family and the files beside it, with what options change in the model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = directory / "model"
    changes = {name: value for o in options for name, value in o.changes.items()}
    if kind == "logits":
        tiny_models.save(model, family, head=True, **changes)
    else:
        tiny_models.save(directory / "base", family, **changes)
        transformer = Transformer(str(directory / "base"), max_seq_length=40)
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]
        behind = {"Normalize": Normalize, "Dense": lambda: Dense(32, 24)}
        modules += [behind[kind]()] if kind in behind else []
        whole = SentenceTransformer(modules=modules, device="cpu")
        whole.save(str(model), create_model_card=False)


def their_vectors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Vectors by sentence-transformers, of length one where their similarity is the cosine."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(directory), device="cpu")
    found = {}
    for kind, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
        # Beside a longer text, padding on the left moves the positions of a BERT there. A text
        # without any token cannot stand alone.
        beside = [text if peer.tokenizer(text)["input_ids"] else "two" for text in TEXTS]
        pairs = zip(beside, TEXTS, strict=True)
        found[kind] = np.stack([encode([*pair])[1] for pair in pairs])
        if peer.similarity_fn_name == "cosine":
            lengths = np.linalg.norm(found[kind], axis=1, keepdims=True)
            found[kind] = found[kind] / np.where(lengths > 1e-12, lengths, 1.0)
    return found


def our_vectors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    from expandr_jax.sharding import make_mesh
    from expandr_jax.vectors.encoder import TextEncoder
    from expandr_jax.weights.hf import load_retriever

    retriever, params = load_retriever(str(directory))
    encoder = TextEncoder(retriever, make_mesh())
    return {kind: encoder.encode(params, TEXTS, kind) for kind in ("query", "document")}


def their_logits(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Logits of a chat's prompt by transformers, and the ids of the prompt."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    message = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        return {"ids": np.array(ids), "logits": model(torch.tensor([ids])).logits[0].numpy()}


def our_logits(directory: pathlib.Path) -> dict[str, np.ndarray]:
    from expandr_jax.models.decoder import token_positions
    from expandr_jax.models.mask import causal_mask
    from expandr_jax.weights.hf import load_generator

    generator, params = load_generator(str(directory))
    ids = np.array(generator.chat_ids(PROMPT, 999)[0])
    batch, mask = ids[None], np.ones((1, len(ids)), np.int32)
    apply = functools.partial(generator.module.apply, {"params": params})
    hidden = apply(batch, token_positions(mask), causal_mask(mask))
    return {"ids": ids, "logits": np.asarray(apply(hidden, method="logits"))[0]}


def verdict(directory: pathlib.Path, kind: str, options: Sequence[Option]) -> tuple[str, str]:
    """("equal", ""), ("refused", ...), ("peer", ...) where the peer fails, or ("WRONG", ...)."""
    theirs, ours = (their_logits, our_logits) if kind == "logits" else (their_vectors, our_vectors)
    try:
        right = theirs(directory)
    except Exception as error:
        right, failure = None, f"{type(error).__name__}: {error}"
    try:
        found = ours(directory)
    except UserError as error:
        # An added token has no row in the model's table, and is named itself.
        names = [option.name for option in options] + ["embedding table"]
        named = any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names)
        return ("refused" if named or right is None else "WRONG"), str(error)
    if right is None:
        return "peer", failure
    for name, values in right.items():
        if found[name].shape != values.shape:
            return "WRONG", f"{name} of shape {found[name].shape}, not {values.shape}"
        differences = np.abs(found[name] - values).reshape(len(values), -1).max(1)
        if not differences.max() <= TOLERANCE:
            return "WRONG", f"{differences.max():.2g} at {name} {int(differences.argmax())}"
    return "equal", ""


def run(count: int, seed: int, say: Callable[[str], None] = print) -> collections.Counter:
    """Tries combinations and says what came of each; the verdicts, counted."""
    verdicts, covered = collections.Counter(), collections.Counter()
    for number, (family, kind, options) in enumerate(combinations(count, seed)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                write(pathlib.Path(folder), family, kind, options)
            except Exception as error:  # The library cannot make such a model.
                result, message = "peer", f"{type(error).__name__}: {error}"
            else:
                for option in options:
                    option.apply(pathlib.Path(folder) / "model")
                result, message = verdict(pathlib.Path(folder) / "model", kind, options)
        verdicts[result] += 1
        covered.update(f"{o.name}: {result}" for o in options)
        names = " + ".join(f"{o.name}={o.value}" for o in options)
        say(f"{number} {family} {kind}, {names}: {result} {' '.join(message.split())[:300]}")
    for name, times in sorted(covered.items()):
        say(f"{times:4} {name}")
    say(f"seed {seed}: " + ", ".join(f"{times} {result}" for result, times in verdicts.items()))
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--combinations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(bool(run(arguments.combinations, arguments.seed)["WRONG"]))
