import itertools

import numpy as np
import pytest
from scipy import stats

from dp_peft_diffusion.privacy.randomness import Purpose, attempt_key, generator, hkdf_sha256, new_key

KEY = bytes(range(16))


def test_hkdf_gives_the_vectors_of_rfc_5869():
    first = hkdf_sha256(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert first.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    third = hkdf_sha256(b"\x0b" * 22, b"", b"", 42)
    assert third.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"


def test_a_key_is_16_bytes_and_new_every_time_whatever_the_seed():
    keys = set()
    for _ in range(100):
        np.random.seed(0)
        keys.add(new_key())
    assert len(keys) == 100
    assert {len(key) for key in keys} == {16}


def test_the_same_place_gives_the_same_numbers_and_no_two_places_do():
    places = list(itertools.product(Purpose, (0, 1, 2**63), (0, 1, 2**33), (0, 1, 7)))
    words = [tuple(generator(KEY, *place).integers(2**63, size=4)) for place in places]
    assert words == [tuple(generator(KEY, *place).integers(2**63, size=4)) for place in places]
    assert len({word for quadruple in words for word in quadruple}) == 4 * len(places)


def test_another_key_gives_other_numbers_everywhere():
    for purpose in Purpose:
        flipped = bytes([KEY[0] ^ 1]) + KEY[1:]
        assert not np.any(generator(KEY, purpose, 3).random(100) == generator(flipped, purpose, 3).random(100))


def test_a_stream_leaves_the_low_word_of_the_counter_to_the_generator():
    stream = generator(KEY, Purpose.NOISE, step=5, example_id=6, draw=7)
    assert stream.bit_generator.state["state"]["counter"].tolist() == [0, 7, 6, 5]
    stream.random(1_000_001)
    low, *place = stream.bit_generator.state["state"]["counter"].tolist()
    assert place == [7, 6, 5]
    assert 0 < low < 2**20


def test_every_bit_of_the_key_and_the_purpose_reach_the_stream():
    seen = {tuple(generator(KEY, purpose, 0).bit_generator.state["state"]["key"].tolist()) for purpose in Purpose}
    for bit in range(128):
        key = (int.from_bytes(KEY, "big") ^ (1 << bit)).to_bytes(16, "big")
        seen.add(tuple(generator(key, Purpose.NOISE, 0).bit_generator.state["state"]["key"].tolist()))
    assert len(seen) == len(Purpose) + 128


def test_numpy_integers_name_the_same_streams():
    by_numpy = generator(KEY, "noise", np.int64(3), np.int64(4), np.int32(5))
    assert by_numpy.random() == generator(KEY, Purpose.NOISE, 3, 4, 5).random()


def test_normals_are_normal_and_neighbouring_streams_independent():
    a, b = generator(KEY, "noise", 0).standard_normal(200_000), generator(KEY, "noise", 1).standard_normal(200_000)
    assert stats.kstest(a, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5 / np.sqrt(len(a))


@pytest.mark.parametrize("place", [(-1,), (2**64,), (0, -1), (0, 2**64), (0, 0, -1), (0, 0, 2**64)])
def test_a_place_outside_64_bits_is_refused(place):
    with pytest.raises(ValueError, match="2\\*\\*64"):
        generator(KEY, "noise", *place)


def test_unknown_purposes_and_short_keys_are_refused():
    with pytest.raises(ValueError, match="dropout"):
        generator(KEY, "dropout", 0)
    with pytest.raises(ValueError, match="15 bytes"):
        generator(KEY[:15], "noise", 0)
    with pytest.raises(TypeError):
        generator(KEY, "noise", 0.5)


def test_another_attempt_context_or_run_has_another_key_and_the_same_ones_the_same():
    key, other, context = bytes(16), bytes(15) + b"\x01", bytes(32)
    keys = {
        attempt_key(key, 1, context),
        attempt_key(key, 2, context),
        attempt_key(key, 12, context),
        attempt_key(key, 1, bytes(31) + b"\x01"),
        attempt_key(other, 1, context),
        key,
    }
    assert len(keys) == 6 and all(len(one) == 16 for one in keys)
    assert attempt_key(key, 1, context) == attempt_key(key, 1, context)
    with pytest.raises(ValueError, match="15 bytes"):
        attempt_key(bytes(15), 1, context)
