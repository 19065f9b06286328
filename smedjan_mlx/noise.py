"""NumPy's Philox4x64-10 (Salmon et al., 2011) on the device, in products of 32 bits, and Gumbel noise from it.

    counter (c0, c1, c2, c3), key (k0, k1):   c <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),  k <- k + W,  10 times

The stream of a key begins at counter 1; a counter gives the next 4 numbers. Number i of the stream of (seed, place) is token i's.
"""

import mlx.core as mx

Word = tuple[mx.array, mx.array]  # 64 bits: high half, low half

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS, NUMBERS = 10, 4


def gumbel(seed: mx.array, place: mx.array, count: int) -> mx.array:
    """Noise of the tokens 0 to `count` - 1, float32 [R, count], for each row's seed [R, 2] (low half first) and place in the text [R].

    u = (b + 1/2) / 2^53 of the upper 53 bits b; where u is over 1/2 its distance to 1 is what keeps the digits.
    """
    high, low = bits(seed, place, count)
    low, ones = low >> 11, mx.array(0xFFFFFFFF, mx.uint32)
    near_one = (high >> 31) > 0
    high, low = mx.where(near_one, high ^ ones, high), mx.where(near_one, (ones >> 11) - low, low)
    part = high.astype(mx.float32) * 2.0**-32 + (low.astype(mx.float32) + 0.5) * 2.0**-53  # u, or 1 - u: at most 1/2
    return -mx.log(mx.where(near_one, -mx.log1p(-part), -mx.log(part)))


def bits(seed: mx.array, place: mx.array, count: int) -> Word:
    """The first `count` numbers of each row's stream, uint32 [R, count] each half."""
    shape = len(place), -(-count // NUMBERS)
    zero = mx.zeros(shape, mx.uint64)
    counter = [mx.broadcast_to(mx.arange(1, shape[1] + 1).astype(mx.uint64), shape), zero, zero, zero]
    seed64 = seed.astype(mx.uint64)
    key = [seed64[:, :1] | (seed64[:, 1:] << 32), place[:, None].astype(mx.uint64)]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _multiply(counter[0], MULTIPLIERS[0]), _multiply(counter[2], MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [each + _constant(weyl) for each, weyl in zip(key, WEYL, strict=True)]
    numbers = mx.stack(counter, axis=-1).reshape(shape[0], -1)[:, :count]
    return (numbers >> 32).astype(mx.uint32), (numbers & _constant(0xFFFFFFFF)).astype(mx.uint32)


def _multiply(a: mx.array, b: int) -> Word:
    """The high and the low 64 bits of a product with a constant."""
    a_high, a_low = a >> 32, a & _constant(0xFFFFFFFF)
    b_high, b_low = (_constant(half) for half in divmod(b, 1 << 32))
    bottom, cross, other = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (bottom >> 32) + (cross & _constant(0xFFFFFFFF)) + (other & _constant(0xFFFFFFFF))
    return a_high * b_high + (cross >> 32) + (other >> 32) + (middle >> 32), a * _constant(b)


def _constant(value: int) -> mx.array:
    high, low = divmod(value, 1 << 32)  # MLX takes no whole number of Python's that is over 2^63
    return (mx.array(high, mx.uint64) << 32) | mx.array(low, mx.uint64)
