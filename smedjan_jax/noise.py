"""NumPy's Philox4x64-10 (Salmon et al., 2011) on the device, in 32-bit arithmetic, and Gumbel noise from it.

    counter (c0, c1, c2, c3), key (k0, k1):   c <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),  k <- k + W,  10 times

The stream of a key begins at counter 1; a counter gives the next 4 numbers. Number i of the stream of (seed, place) is token i's.
"""

import jax
import jax.numpy as jnp

Word = tuple[jax.Array, jax.Array]  # 64 bits: high half, low half

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS, NUMBERS = 10, 4


def gumbel(seed: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """Noise of the tokens 0 to `count` - 1, float32 [R, count], for each row's seed [R, 2] (low half first) and place in the text [R].

    u = (b + 1/2) / 2^53 of the upper 53 bits b; where u is over 1/2 its distance to 1 is what keeps the digits.
    """
    high, low = bits(seed, place, count)
    low = low >> 11
    near_one = high >= jnp.uint32(1 << 31)
    high, low = jnp.where(near_one, ~high, high), jnp.where(near_one, jnp.uint32((1 << 21) - 1) - low, low)
    part = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-53  # u, or 1 - u: at most 1/2
    return -jnp.log(jnp.where(near_one, -jnp.log1p(-part), -jnp.log(part)))


def bits(seed: jax.Array, place: jax.Array, count: int) -> Word:
    """The first `count` numbers of each row's stream, uint32 [R, count] each half."""
    shape = len(place), -(-count // NUMBERS)
    zero = jnp.zeros(shape, jnp.uint32)
    counter = (zero, jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + 1), *[(zero, zero)] * 3
    key = (seed[:, 1:], seed[:, :1]), (jnp.zeros_like(seed[:, :1]), place[:, None].astype(jnp.uint32))

    def mixed(_: int, carry: tuple) -> tuple:
        counter, key = carry
        (high0, low0), (high1, low1) = _multiply(counter[0], MULTIPLIERS[0]), _multiply(counter[2], MULTIPLIERS[1])
        counter = _xor(high1, counter[1], key[0]), low1, _xor(high0, counter[3], key[1]), low0
        return counter, tuple(_add(each, weyl) for each, weyl in zip(key, WEYL, strict=True))

    # a loop: rounds in a row XLA would fuse, and compute each again for all that need it
    counter, _ = jax.lax.fori_loop(0, ROUNDS, mixed, (counter, key))
    high, low = (jnp.stack([word[half] for word in counter], axis=-1).reshape(shape[0], -1)[:, :count] for half in (0, 1))
    return high, low


def _multiply(a: Word, b: int) -> tuple[Word, Word]:
    """The high and the low 64 bits of a product with a constant."""
    (high, low), (b_high, b_low) = a, divmod(b, 1 << 32)
    carry, bottom = _multiply32(low, b_low)
    cross_high, cross_low = _multiply32(low, b_high)
    other_high, other_low = _multiply32(high, b_low)
    top_high, top_low = _multiply32(high, b_high)
    middle, over = _sum(carry, cross_low, other_low)
    top_low, over = _sum(top_low, cross_high, other_high, over)
    return (top_high + over, top_low), (middle, bottom)


def _multiply32(a: jax.Array, b: int) -> Word:
    """All 64 bits of a product of 32 bits, by halves."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    first = a_high * b_low + ((a_low * b_low) >> 16)
    second = a_low * b_high + (first & 0xFFFF)
    return a_high * b_high + (first >> 16) + (second >> 16), a * jnp.uint32(b)


def _sum(first: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sum of 32 bits, and how often it went over."""
    total, over = first, jnp.zeros_like(first)
    for each in others:
        total = total + each
        over = over + (total < each).astype(jnp.uint32)
    return total, over


def _xor(*words: Word) -> Word:
    (a, b), (c, d), (e, f) = words
    return a ^ c ^ e, b ^ d ^ f


def _add(a: Word, b: int) -> Word:
    low, over = _sum(a[1], jnp.full_like(a[1], b & 0xFFFFFFFF))
    return a[0] + jnp.uint32(b >> 32) + over, low
