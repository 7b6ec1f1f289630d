"""One token per row from logits: temperature, top-k, nucleus (top-p), min-p, one draw per token.

The vocabulary is never sorted. Probabilities become integers in units of 2**-30, whose sums are
exact in any order, and the cut of top-k or top-p is found by bisection on those integers. The
filters follow the order of Hugging Face: temperature, top-k, top-p on what is left, min-p.
A set always holds every token as likely as its least likely one, so that ties need no order.
"""

import flax.struct
import jax
import jax.numpy as jnp

from expandr_jax.sharding import platform

NEAR_TIE = 1e-4  # Probability, or relative difference of two probabilities.
UNIT_BITS = 30
CDF_BLOCK = 128  # Tokens summed together by the inverse CDF.
COLDEST = 1e-30  # Colder draws are greedy already, and quotients stay finite.
MOST_TURNS = 64  # A bisection has no more; one between integers of 31 bits takes 35 or so at most.
BROKEN = -1  # The token of a row that has none to draw.
CPU_BLOCK = 2  # Rows handled at once, so that the passes over them stay in the cache.


@flax.struct.dataclass
class RowSampling:
    """Settings of each row, [batch] each.

    Attributes:
        temperature: Divides the logits, float32; 0 takes the likeliest token.
        top_p: Mass of the nucleus, float32; 1 keeps everything (arXiv 1904.09751).
        top_k: Number of tokens kept, int32; 0 keeps everything.
        min_p: Least probability relative to the likeliest token's, float32; 0 keeps everything.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array


def sample(
    logits: jax.Array, settings: RowSampling, bits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row by inverting the CDF of the filtered distribution.

    Args:
        logits: [batch, vocabulary] float32.
        settings: Settings of each row.
        bits: One uniform draw per row, [batch] uint32.

    Returns:
        Tokens [batch] int32, and [batch] bool: whether the draw lay within `NEAR_TIE` of another
        outcome (an edge of the CDF, or a token that almost was or was not kept). The token is
        `BROKEN` where a logit is NaN or +inf, or all are -inf: the model's weights are damaged.
    """
    batch, vocabulary = logits.shape
    padding = -vocabulary % CDF_BLOCK
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    arguments = (logits, settings, bits)
    if platform() != "cpu" or batch % CPU_BLOCK or batch == CPU_BLOCK:
        return _sample(*arguments)
    blocks = jax.tree.map(lambda x: x.reshape(-1, CPU_BLOCK, *x.shape[1:]), arguments)
    outputs = jax.lax.map(lambda block: _sample(*block), blocks)
    return jax.tree.map(lambda x: x.reshape(batch), outputs)


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of seen tokens (CTRL, arXiv 1909.05858).

    Args:
        logits: [batch, vocabulary] float32.
        seen: [batch, vocabulary] bool, tokens of the prompt or of the answer so far.
        penalty: [batch] float32; 1 changes nothing.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def log_probability(logits: jax.Array, temperature: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits / temperature)[token], [batch] float32, nothing filtered out.

    Args:
        logits: [batch, vocabulary].
        temperature: [batch]; where it is 0, logits are taken as they are.
        tokens: [batch] int32.
    """
    below = logits.astype(jnp.float32) - jnp.max(logits, axis=1, keepdims=True)
    scaled = below / _divisor(temperature)[:, None]
    picked = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    return picked - jnp.log(jnp.sum(jnp.exp(scaled), axis=1))


def _divisor(temperature):
    return jnp.where(temperature == 0, 1.0, jnp.maximum(temperature, COLDEST))


def _sample(logits, settings, bits):
    greedy = settings.temperature == 0
    temperature = _divisor(settings.temperature)
    units = _probability_units(logits, temperature)
    cut, doubtful = _cut(units, settings)
    tokens, near = _draw(jnp.where(units >= cut[:, None], units, 0), bits, cut, doubtful)
    best, best_near = jax.lax.cond(
        jnp.any(greedy), lambda: _argmax(logits, units), lambda: (tokens, near)
    )
    # The maximum of what has a NaN is NaN; the probabilities are computed from it already.
    broken = ~jnp.isfinite(jnp.max(logits, axis=1))
    tokens = jnp.where(broken, BROKEN, jnp.where(greedy, best, tokens))
    return tokens, jnp.where(greedy, best_near, near) & ~broken


def _probability_units(logits, temperature):
    """softmax(logits / temperature) in units of 2**-30, [batch, vocabulary] int32."""
    # Divided first, logits could become infinite, and the differences NaN.
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp(below / temperature[:, None])
    scale = 2.0**UNIT_BITS / jnp.sum(weights, axis=1, keepdims=True)
    return jnp.round(weights * scale).astype(jnp.int32)


def _argmax(logits, units):
    """The likeliest token, the lowest of equals; and whether another is about as likely."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    best = logits == jnp.max(logits, axis=1, keepdims=True)
    token = jnp.min(jnp.where(best, ids, logits.shape[1]), axis=1)
    top = jnp.max(units, axis=1)
    return token, jnp.sum(units >= (top - _tolerance(top))[:, None], axis=1) > 1


def _tolerance(units):
    return jnp.ceil(units * NEAR_TIE).astype(jnp.int32)


def _cut(units, settings):
    """Fewest units of a kept token; and the mass in doubt there, 0 where the cut is clear."""
    vocabulary = units.shape[1]
    top = jnp.max(units, axis=1)
    ones = jnp.ones_like(top)

    def top_k():
        wanted = jnp.where(settings.top_k > 0, settings.top_k, vocabulary)
        return _bisect(_count, units, wanted, ones, top + 1)

    cut_k = jax.lax.cond(jnp.any(settings.top_k > 0), top_k, lambda: ones)
    cut_k = jnp.where(settings.top_k > 0, cut_k, 1)

    def top_p():
        left = jnp.where(units >= cut_k[:, None], units, 0)
        total = jnp.sum(left, axis=1)
        wanted = jnp.maximum(jnp.ceil(settings.top_p * total), 1).astype(jnp.int32)
        # What lies outside the nucleus is more than tokens below this bound can sum to.
        low = jnp.maximum((total - wanted) // vocabulary, 1)
        return _bisect(_mass, left, wanted, low, top + 1), wanted

    nucleus = settings.top_p < 1
    cut_p, wanted = jax.lax.cond(jnp.any(nucleus), top_p, lambda: (ones, ones))
    cut_p = jnp.where(nucleus, cut_p, 1)
    cut_m = jnp.ceil(settings.min_p * top).astype(jnp.int32)
    cut = jnp.maximum(jnp.maximum(cut_k, cut_p), cut_m)

    def doubtful():
        tolerance = _tolerance(cut)
        above = _mass(units, cut + tolerance + 1)
        band = _mass(units, cut - tolerance) - above
        margin = jnp.minimum(wanted - above, above + cut - wanted)
        by_mass = nucleus & (cut == cut_p) & (margin <= NEAR_TIE * 2.0**UNIT_BITS)
        clear = (band == jnp.where(cut == cut_m, 0, cut)) & ~by_mass
        return jnp.where(clear | (cut == 1), 0, band)

    return cut, jax.lax.cond(jnp.any(cut > 1), doubtful, lambda: jnp.zeros_like(top))


def _mass(units, cut):
    return jnp.sum(jnp.where(units >= cut[:, None], units, 0), axis=1)


def _count(units, cut):
    return jnp.sum(units >= cut[:, None], axis=1, dtype=jnp.int32)


def _bisect(weigh, units, wanted, low, high):
    """Units of the last token needed, from the likeliest down, for `weigh` to reach `wanted`.

    `weigh` is `_mass` or `_count`. Tokens of `low` units or more weigh enough, those of `high` or
    more do not; all are int32, [batch] each.
    """

    def searching(low, high, weight_low, weight_high):
        lightest = low if weigh is _mass else 1
        return (weight_low - weight_high >= 2 * lightest) & (high - low > 1)

    def halve(state):
        low, high, weight_low, weight_high = state
        middle = jnp.sqrt(low.astype(jnp.float32)) * jnp.sqrt(high.astype(jnp.float32))
        # Within a factor of 2 the arithmetic mean, which float32 does not round.
        middle = jnp.where(high - low < low, low + (high - low) // 2, middle.astype(jnp.int32))
        middle = jnp.clip(middle, low + 1, jnp.maximum(high - 1, low + 1))
        weight = weigh(units, middle)
        up = searching(*state) & (weight >= wanted)
        down = searching(*state) & (weight < wanted)
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, weight, weight_low),
            jnp.where(down, weight, weight_high),
        )

    unknown = jnp.full_like(low, 2**31 - 1)
    state = (low, high, unknown, jnp.zeros_like(low))
    _, (low, *_) = jax.lax.while_loop(
        lambda turn: (turn[0] < MOST_TURNS) & jnp.any(searching(*turn[1])),
        lambda turn: (turn[0] + 1, halve(turn[1])),
        (0, state),
    )
    return jnp.min(jnp.where(units >= low[:, None], units, 2**31 - 1), axis=1)


def _draw(kept, bits, cut, doubtful):
    """Inverts the CDF in two steps: the chunk, then the token in it."""
    batch, vocabulary = kept.shape
    chunks = kept.reshape(batch, vocabulary // CDF_BLOCK, CDF_BLOCK)
    ends = jnp.cumsum(jnp.sum(chunks, axis=2), axis=1)
    total = ends[:, -1]
    point = _scale_bits(bits, total)
    chunk = jnp.sum(ends <= point[:, None], axis=1)
    inside = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]
    start = jnp.take_along_axis(ends, chunk[:, None], axis=1)[:, 0] - jnp.sum(inside, axis=1)
    ends = start[:, None] + jnp.cumsum(inside, axis=1)
    number = jnp.sum(ends <= point[:, None], axis=1)
    mine = jnp.take_along_axis(inside, number[:, None], axis=1)[:, 0]
    after = jnp.take_along_axis(ends, number[:, None], axis=1)[:, 0]
    before = after - mine

    reach = (NEAR_TIE * total).astype(jnp.int32) + doubtful
    near = ((point - before < reach) & (before > 0)) | ((after - point <= reach) & (after < total))
    near |= (doubtful > 0) & (jnp.abs(mine - cut) <= _tolerance(cut))
    return (chunk * CDF_BLOCK + number).astype(jnp.int32), near


def _scale_bits(bits, total):
    """floor(bits * total / 2**32) in 32-bit arithmetic."""
    total = total.astype(jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    total_high, total_low = total >> 16, total & 0xFFFF
    middle = (high * total_low & 0xFFFF) + (low * total_high & 0xFFFF) + (low * total_low >> 16)
    scaled = high * total_high + (high * total_low >> 16) + (low * total_high >> 16)
    return (scaled + (middle >> 16)).astype(jnp.int32)
