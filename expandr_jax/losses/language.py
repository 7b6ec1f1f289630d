"""Log-probabilities of tokens under a language model, and what they come to for whole responses."""

import jax
import jax.numpy as jnp


def token_log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target] in float32: logits [..., vocab], targets [...] -> [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def token_entropies(logits: jax.Array) -> jax.Array:
    """-sum p log p of softmax(logits) in float32 and nats: logits [..., vocab] -> [...]."""
    logits = logits.astype(jnp.float32)
    shares = jax.nn.softmax(logits, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(shares * logits, axis=-1)


def response_sums(
    log_probs: jax.Array, responses: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities and number of tokens of each response that a row holds.

    Args:
        log_probs: [batch, tokens] of the response tokens.
        responses: [batch, tokens] which response a token belongs to, from 1 on; others count for
            none.
        count: Responses a row.

    Returns:
        Two of [batch, count] float32; 0 and 0 for a response that a row does not have.
    """
    own = [responses == number for number in range(1, count + 1)]
    sums = [jnp.sum(jnp.where(mine, log_probs, 0.0), axis=1) for mine in own]
    tokens = [jnp.sum(mine, axis=1).astype(jnp.float32) for mine in own]
    return jnp.stack(sums, axis=1), jnp.stack(tokens, axis=1)


def bag_of_words_loss(logits: jax.Array, words: jax.Array, given: jax.Array) -> jax.Array:
    """How well a block of tokens, together, foretells which words a text has.

    Each word's greatest logit among the block's rows counts; the loss is the mean of -log
    softmax of these over the text's words, in float32.

    Args:
        logits: [..., rows, vocab].
        words: [..., count] int32, each word of the text once.
        given: [..., count] bool, False where there are no more.

    Returns:
        [...] float32; 0 for a text without words.

    References:
        LLaRA, arXiv 2312.15503; its code leaves stop words out and divides by 10.
    """
    log_probs = token_log_probs(jnp.max(logits.astype(jnp.float32), axis=-2)[..., None, :], words)
    total = jnp.sum(jnp.where(given, log_probs, 0.0), axis=-1)
    return -total / jnp.maximum(jnp.sum(given, axis=-1), 1)
