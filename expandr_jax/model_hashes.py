"""What tells a run's models and tokenizers from others."""

from typing import Any

from expandr_jax.data.records import hash_json
from expandr_jax.pair import GeneratorModel, RetrieverModel

# Words, cases, accents, digits, spaces, lines, another script: what tokenizers treat differently.
PROBES = ("Naïve CAFÉ  state-of-the-art", "x = 3.14159 # 1,000\n\treturn", "検索 поиск 🔍", "")


def model_hashes(models: RetrieverModel | GeneratorModel) -> dict[str, str]:
    """Hashes of the weights, with their type, and of the tokenizers, by what a message calls them.

    Args:
        models: One of the two, or both.
    """
    hashes = {}
    if isinstance(models, RetrieverModel):
        hashes["retriever.source, its weights"] = models.retriever_hash
        hashes["retriever.source, its tokenizer"] = _hash_tokenizer(models.retriever.tokenizer)
    if isinstance(models, GeneratorModel):
        hashes["generator.source, its weights"] = models.generator_hash
        hashes["generator.source, its tokenizer"] = _hash_tokenizer(models.generator.tokenizer)
    return hashes


def _hash_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary, of what it makes of some texts, and of its chat template."""
    ids = [[int(i) for i in tokenizer([text])["input_ids"][0]] for text in PROBES]
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    template = getattr(tokenizer, "chat_template", None)
    return hash_json([sorted(vocabulary.items()), ids, template])
