"""Secret 128-bit key -> independent random streams, one for every (purpose, step, example id, draw).

Philox (Salmon et al., SC 2011) turns (key, counter) into random words. The key is derived from the run's key and
the purpose by HKDF-SHA256 (RFC 5869). Of the 256 bits of the counter, step, example id and draw fill the upper three
words of 64, and the generator counts in the lowest: two streams cannot overlap before one has given 2^64 blocks.
The key is an argument everywhere and an attribute nowhere, and no `--seed` reaches it (invariant 7).
"""

import enum
import hashlib
import hmac
import operator
import secrets

import numpy as np

KEY_BYTES = 16
WORD = 1 << 64


class Purpose(enum.StrEnum):
    """What a stream is for."""

    SAMPLING = "sampling"
    TRUNCATION = "truncation"
    NOISE = "noise"
    TIMESTEP = "timestep"
    DIFFUSION_NOISE = "diffusion_noise"
    LABEL_DROPOUT = "label_dropout"
    AUGMENTATION = "augmentation"


def new_key() -> bytes:
    """16 secret bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def attempt_key(run_key: bytes, attempt: int, context: bytes) -> bytes:
    """The key of all streams of one attempt at a run (invariant 12): the same for the same context, else another.

    Args:
        run_key: the run's secret, 16 bytes.
        attempt: 1 for the first; each later one draws afresh.
        context: digest of everything that shapes an update, so that no noise is used under two recipes.

    Raises:
        ValueError: the key is not 16 bytes.
    """
    if len(run_key) != KEY_BYTES:
        raise ValueError(f"the key has {len(run_key)} bytes, not {KEY_BYTES}")
    return hkdf_sha256(run_key, context, b"dp-peft/1/attempt/%d" % attempt, KEY_BYTES)


def hkdf_sha256(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF with SHA-256, RFC 5869: `length` (at most 8160) bytes from `key`, bound to `info`."""
    extracted = hmac.digest(salt or bytes(32), key, hashlib.sha256)
    block, output = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), hashlib.sha256)
        output += block
    return output[:length]


def generator(key: bytes, purpose: str, step: int, example_id: int = 0, draw: int = 0) -> np.random.Generator:
    """The stream of (purpose, step, example id, draw): the same numbers always (invariant 8).

    Args:
        key: the run's secret, 16 bytes.
        purpose: one of `Purpose`.
        step: 0 or more, below 2^64; so are `example_id` and `draw`.
        example_id: position of the record in the data set.
        draw: which of the K noise draws inside one example.

    Raises:
        ValueError: the key is not 16 bytes, the purpose is not known, or a number is out of range.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
    counter = 0
    for word in (step, example_id, draw):
        if not 0 <= operator.index(word) < WORD:
            raise ValueError(f"step, example_id and draw are in [0, 2**64), not {word}")
        counter = (counter << 64) | operator.index(word)
    subkey = hkdf_sha256(key, b"", b"dp-peft/1/" + Purpose(purpose).encode(), KEY_BYTES)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(subkey, "little"), counter=counter << 64))
