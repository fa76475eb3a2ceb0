"""What looks at the one sum of `code_moments`: what an example adds, what rows reckon with, and what they are made of.

It takes a seed and raises AssertionError with a sentence.
"""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from mutants.tiny_run import MEMORY, C, key_of
from tiny_adapters import NAMES, ONE_SUM
from tiny_bases import pixel_codes, public_images

from dp_peft_diffusion.batches import make_batch, make_loss, make_task
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.code_moments import WEIGHTS
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.image_codes import SKETCHED, on_canvas
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.preparation import make_adapter
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import Adapter, Data, Recipe

N = 5


@functools.cache
def _base() -> BaseModel:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        return load_base(str(pixel_codes(Path(folder) / "base")))


def code_sums(seed: int) -> None:
    """The sum is that of statistics of unit codes, each of norm C, of images alone; rows come from noisy sums only."""
    base, spec = _base(), Adapter(kind="code_moments", class_rows=(1, 2), rows_per_class=3)
    recipe = Recipe(data=Data(class_names=NAMES), adapter=spec, **ONE_SUM)
    mechanism = DPMechanism(
        sampling_prob=1.0, steps=1, noise_multiplier=0.4, max_grad_norm=C, expected_batch_size=N, num_examples=N
    )
    adapter = make_adapter(recipe, base, mechanism, private=True)
    table, clipper = adapter.class_rows, PerSampleClipper(adapter.unet, C)
    assert np.isclose(table.noise_of_mean, 0.4 * C / N), "rows reckon with other noise than the sums get"
    task, ids = make_task(recipe, base), np.arange(N)
    images, labels = public_images(N, seed=seed), torch.arange(N) % 2
    weights = torch.ones(N)
    weights[0] = 0  # the null record

    def total_of(keep: list[int]) -> torch.Tensor:
        examples = Examples(images[keep, None], labels[keep], weights[keep], {})
        batch = make_batch(task, examples, ids[keep], key_of(seed), 0)
        assert (clipper.norms_of(make_loss(task), batch) <= C * (1 - 1e-6)).all(), "an example is clipped"
        (total,) = clipper.clipped_sum_of(make_loss(task), batch).values()
        return total

    total = total_of(list(ids))
    assert not total_of([0]).any(), "a null record adds something"
    for i in ids[1:]:
        wanted = np.zeros(total.shape)
        wanted[labels[i]] = -_statistics(base, images[i])
        assert np.allclose(total_of([i]), wanted, atol=1e-5 * C), "an example adds something other than its statistics"
        assert np.linalg.norm(total_of([i])) > 0.999 * C, "an example does not make use of the bound"
    alone = sum(total_of([i]) for i in ids)
    assert torch.allclose(total, alone, atol=1e-5), "what an example adds depends on those beside it"
    with torch.no_grad():
        table.sums.weight.normal_(generator=torch.Generator().manual_seed(seed))
    total_of(list(ids))
    fresh = copy.deepcopy(make_adapter(recipe, base, mechanism, private=True).class_rows)
    fresh.load_state_dict(table.state_dict())
    assert torch.equal(table.codes(), fresh.codes()), "rows are made of something other than the noisy sums"


@torch.no_grad()
def _statistics(base: BaseModel, image: torch.Tensor) -> np.ndarray:
    """1, u and u u^T of the unit code of one image, weighted, of norm C but for a rounding; by numpy."""
    shown, sketch = base.codes.shown(base.codes.features(image[None])), base.codes.sketch(on_canvas(image[None]))
    parts = [part[0].double().numpy() / part.double().norm().item() for part in (shown, sketch)]
    u = np.concatenate([(1 - SKETCHED**2) ** 0.5 * parts[0], SKETCHED * parts[1]])
    i, j = np.triu_indices(len(u))
    half = u[i] * u[j] * np.where(i == j, 1, 2**0.5)
    of_count, of_first, of_second = np.array(WEIGHTS) / np.linalg.norm(WEIGHTS)
    return C * np.concatenate([[of_count], of_first * u, of_second * half])
