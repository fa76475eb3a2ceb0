"""A changed image hangs on its key, step, id and view alone, and stays an image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_peft_diffusion.diffusion.augmentation import augment
from dp_peft_diffusion.recipe import AUGMENTATIONS

KEY = b"0123456789abcdef"


def images(count, channels=3, side=16, seed=0):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ramp(count, side=16):
    """Images whose value says the place: across in the first channel, down in the second."""
    line = torch.arange(side) / side - 0.5
    return torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(count, 2, side, side)


@pytest.mark.parametrize("names", [[name] for name in AUGMENTATIONS] + [AUGMENTATIONS])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_bit_for_bit_the_same_alone_in_any_batch_and_in_any_order(names, channels):
    x, ids = images(12, channels), np.arange(40, 52)
    together = augment(x, names, KEY, 5, ids, 3)
    assert together.shape == (12, 3, channels, 16, 16) and together.is_contiguous()
    order = np.random.default_rng(0).permutation(12)
    assert torch.equal(augment(x[order], names, KEY, 5, ids[order], 3), together[order])
    for size in (1, 5):
        chunks = [augment(x[i : i + size], names, KEY, 5, ids[i : i + size], 3) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(chunks), together)
    assert torch.equal(augment(x, names, KEY, 5, ids, 2), together[:, :2])


@pytest.mark.parametrize("names", [["crop"], ["color"], AUGMENTATIONS])
def test_views_keys_steps_and_examples_are_changed_differently(names):
    x = images(1).expand(6, -1, -1, -1)
    drawn = [augment(x, names, KEY, 0, np.arange(6), 6), augment(x, names, KEY, 1, np.arange(6), 6)]
    drawn.append(augment(x, names, bytes(16), 0, np.arange(6), 6))
    assert len(torch.cat(drawn).flatten(0, 1).flatten(1).unique(dim=0)) == 3 * 6 * 6


@given(
    st.sets(st.sampled_from(AUGMENTATIONS)), st.integers(0, 2**32), st.sampled_from([1, 3]), st.sampled_from([4, 8, 15])
)
@settings(max_examples=50, deadline=None)
def test_a_changed_image_stays_finite_and_in_range(names, step, channels, side):
    x = images(2, channels, side, step % 1000).sign()  # black and white: the ends of the range
    changed = augment(x, names, KEY, step, np.arange(2), 2)
    assert changed.shape == (2, 2, channels, side, side) and changed.dtype == torch.float32
    assert changed.min() >= -1 and changed.max() <= 1
    if not names:
        assert torch.equal(changed, x[:, None].expand_as(changed))


def test_a_flip_mirrors_left_and_right_every_other_time():
    x = images(2000, 1, 4)
    changed = augment(x, ["flip"], KEY, 0, np.arange(2000), 1)[:, 0]
    mirrored = (changed == x.flip(-1)).flatten(1).all(1)
    assert ((changed == x).flatten(1).all(1) != mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-6


def test_a_shift_is_a_copy_moved_by_whole_pixels_with_the_border_repeated():
    x = images(500, 3, 16)
    changed = augment(x, ["shift"], KEY, 0, np.arange(500), 1)[:, 0].numpy()
    moves = []
    for image, found in zip(x.numpy(), changed, strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")
        fits = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-2, 3)
            if np.array_equal(found, padded[:, 2 - down : 18 - down, 2 - across : 18 - across])
        ]
        assert len(fits) == 1
        moves.append((fits[0][0] + 2) * 5 + fits[0][1] + 2)
    assert stats.chisquare(np.bincount(moves, minlength=25)).pvalue > 1e-6


def test_a_crop_is_a_square_of_four_fifths_to_all_of_the_side_inside_the_image():
    changed = augment(ramp(2000), ["crop"], KEY, 0, np.arange(2000), 1)[:, 0].double()
    across, down = changed[:, 0, 8], changed[:, 1, :, 8]  # (2000, 16): where each pixel came from
    width, height = (16 * (line[:, 12] - line[:, 3]) / 9 for line in (across, down))
    assert torch.allclose(width, height, atol=1e-5)  # a square
    assert stats.kstest(width.numpy(), stats.uniform(0.8, 0.2).cdf).pvalue > 1e-6
    for line in (across, down):
        middle = 16 * (line[:, 3] + line[:, 12]) / 2 + 8 - 7.5  # of pixels 3 and 12, from the middle of the image
        free = 8 * (1 - width)  # the square can be that far off the middle
        place = (middle / free)[width < 0.99]
        assert place.abs().max() < 1.001
        assert stats.kstest(place.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-6


def test_color_changes_contrast_brightness_and_saturation_mildly():
    x = images(1000, 3, 8) / 2  # far from the ends, where nothing is cut off
    changed = augment(x, ["color"], KEY, 0, np.arange(1000), 1)[:, 0].double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    grey, new_grey = ((luma * images_.double()).sum(1).flatten(1) for images_ in (x, changed))
    contrast = (new_grey[:, 5] - new_grey[:, 0]) / (grey[:, 5] - grey[:, 0])
    brightness = new_grey[:, 0] - contrast * grey[:, 0]
    assert torch.allclose(new_grey, contrast[:, None] * grey + brightness[:, None], atol=1e-4)
    far = (grey[:, 5] - grey[:, 0]).abs() > 0.05
    colour = (changed - new_grey.view(-1, 1, 8, 8)).flatten(1) / contrast[:, None]
    saturation = (colour / (x.double() - grey.view(-1, 1, 8, 8)).flatten(1)).median(dim=1).values
    for values, middle in ((contrast, 1), (brightness, 0), (saturation, 1)):
        amount = (values[far].numpy() - middle) / 0.2
        assert stats.kstest(amount, stats.uniform(-1, 2).cdf).pvalue > 1e-6
        assert amount.min() < -0.96 and amount.max() > 0.96 and abs(amount).max() < 1.001


def test_grey_images_have_no_colour_to_change():
    x = images(20, 1, 8) / 2
    changed = augment(x, ["color"], KEY, 0, np.arange(20), 1)[:, 0].flatten(1)
    slope = (changed[:, 1] - changed[:, 0]) / (x.flatten(1)[:, 1] - x.flatten(1)[:, 0])
    offset = changed[:, 0] - slope * x.flatten(1)[:, 0]
    assert torch.allclose(changed, slope[:, None] * x.flatten(1) + offset[:, None], atol=1e-4)


def test_a_change_draws_the_same_whichever_others_are_named():
    x = images(10, 3, 16)
    flipped = augment(x, ["flip"], KEY, 0, np.arange(10), 1)
    both = augment(x, ["color", "flip"], KEY, 0, np.arange(10), 1)
    coloured = augment(flipped[:, 0], ["color"], KEY, 0, np.arange(10), 1)
    assert torch.equal(both, coloured)
