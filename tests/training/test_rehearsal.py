"""What is tried out before step 1."""

import dataclasses

import pytest
import torch
from tiny_bases import latent
from tiny_runs import changed, tiny_recipe

from dp_peft_diffusion import rehearsal
from dp_peft_diffusion.batches import make_task
from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import BaseLayout, load_base


@pytest.mark.parametrize(("null", "spare", "rows"), [(0, (4, 12), {1, 2, 3}), (3, (4, 12), {0, 1, 2})])
def test_gamma_is_measured_on_public_classes_wherever_the_null_row_lies(null, spare, rows, tmp_path, monkeypatch):
    base = load_base(str(latent(tmp_path / "base")))
    base = dataclasses.replace(base, layout=BaseLayout(null_class=null, spare_classes=spare))
    task = make_task(changed(tiny_recipe(tmp_path), "train", micro_batch_size=64), base)
    asked = set[int]()

    def sample_images(base, conditions, **options):
        asked.update(conditions["class_labels"].tolist())
        return torch.zeros(rehearsal.GAMMA_IMAGES, 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(rehearsal, "sample_images", sample_images)
    assert rehearsal.choose_gamma(task, inject_adapter(base, task.recipe.adapter)) > 0
    assert asked == rows
