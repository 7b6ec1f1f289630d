"""Which keys a query may attend to: a rule, so that a kernel need not read an array of all pairs.

The forms that do want the array get it from `Mask.dense`; where nobody does, XLA drops it.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mask:
    """Which keys each query may attend to; the queries are the last tokens among the keys.

    What padding attends to has no meaning, and differs from one form of attention to another.

    Attributes:
        segments: [batch, keys] int32. 0 is padding, which no other token sees; 1 is seen by all;
            further segments see 1 and themselves. None where only the array is known.
        causal: No token sees one that comes after it.
        responses: Segments from 2 on that there can be: 0 promises that there are none.
        window: Tokens nearer than so many positions are seen, as `within` says; None: all are.
        windowed: Whether the window counts, a bool or an array of one: layers differ. None: it
            does.
        array: [batch, queries or 1, keys] bool, what the rule without its window comes to.
        near: [batch, queries, keys] bool, what the rule with its window comes to.
    """

    segments: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    responses: int = flax.struct.field(pytree_node=False, default=0)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    windowed: jax.Array | bool | None = None
    array: jax.Array | None = None
    near: jax.Array | None = None

    def prepared(self, queries: int) -> "Mask":
        """This mask with its array made, once for all layers."""
        return self.replace(array=self._whole(queries))

    def within(self, window: int, positions: jax.Array, key_positions: jax.Array) -> "Mask":
        """Adds a window: keys `window` positions or more before or after a query are not seen.

        Args:
            window: In tokens, the query included.
            positions: [batch, queries] int32.
            key_positions: [batch or 1, keys] int32.
        """
        near = jnp.abs(positions[:, :, None] - key_positions[:, None, :]) < window
        return self.replace(window=window, near=near & self._whole(positions.shape[1]))

    def after(self, tokens: int) -> "Mask":
        """This mask for rows that `tokens` tokens precede, which all queries see."""
        segments = jnp.pad(self.segments, ((0, 0), (tokens, 0)), constant_values=1)
        return self.replace(segments=segments)

    def dense(self, queries: int) -> jax.Array:
        """[batch, queries or 1, keys] bool, True where attention is allowed."""
        if self.window is None or self.windowed is False:
            return self._whole(queries)
        if self.windowed is None or self.windowed is True:
            return self.near
        return jnp.where(self.windowed, self.near, self._whole(queries))

    def _whole(self, queries: int) -> jax.Array:
        return self._allowed(queries) if self.array is None else self.array

    def _allowed(self, queries: int) -> jax.Array:
        keys = self.segments.shape[1]
        allowed = (self.segments > 0)[:, None, :]
        if self.responses:
            own = self.segments[:, keys - queries :, None] == self.segments[:, None, :]
            allowed = allowed & (own | (self.segments == 1)[:, None, :])
        if self.causal:
            allowed = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None] & allowed
        return allowed


def padding_mask(attention_mask: jax.Array) -> Mask:
    """[batch, length] of 0/1 to the mask of an encoder: real tokens see all real tokens."""
    return Mask((attention_mask > 0).astype(jnp.int32))


def causal_mask(attention_mask: jax.Array) -> Mask:
    """[batch, length] of 0/1 to the mask of a plain causal pass."""
    return Mask((attention_mask > 0).astype(jnp.int32), causal=True)
