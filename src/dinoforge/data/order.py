"""The order of images, and the random numbers of each image: functions of the seed and the position."""

import hashlib
import math

import numpy as np

_FEISTEL_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def sample_index(position: int, length: int, seed: int) -> int:
    """Compute the index of the image at a position of the global order.

    Each epoch is a permutation of its own, computed on the fly without a list, whatever the length: a generalised
    Feistel network on Z_a x Z_b with a·b just above `length` (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002), walked until it lands inside.

    Args:
        position: The number of samples before this one since the start of training.
        length: The number of images.
        seed: The run's seed.
    """
    epoch, place = divmod(position, length)
    rows = math.isqrt(length) + 1  # at least 2: a single row could only be rotated
    columns = -(-length // rows)  # length <= rows · columns < length + rows
    keys: list[int] = np.frombuffer(_digest(seed, "order", epoch, size=8 * _FEISTEL_ROUNDS), dtype="<u8").tolist()
    while True:
        left, right = divmod(place, columns)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + _mix(right ^ key)) % rows
            else:
                right = (right + _mix(left ^ key)) % columns
        place = left * columns + right
        if place < length:
            return place


def sample_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Make the generator of one purpose at one position; generators of different arguments are independent."""
    key = np.frombuffer(_digest(seed, purpose, position, size=16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def _digest(seed: int, purpose: str, position: int, *, size: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=size).digest()


def _mix(x: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
