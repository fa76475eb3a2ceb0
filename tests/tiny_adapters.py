"""Shareable folders of tiny bases, as a run leaves them: what trains is moved far enough to see."""

from pathlib import Path

import torch

from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, Train, to_yaml
from dp_peft_diffusion.sharing.export import certify, write_weights
from tests.privacy.folders import promise

NAMES = ("cat", "dog")
SAMPLE = Sample(num_inference_steps=2, guidance_scale=2.0)
LORA = Adapter(rank=2, target_modules=("to_q",))
ONE_SUM = {  # what code_moments trains with
    "privacy": Privacy(epsilon=1.0, clipping="flat"),
    "train": Train(
        optimizer="sgd", learning_rate=1.0, max_train_steps=1, noise_multiplicity=1, label_dropout=0.0, ema_decay=0.0
    ),
}


def shared(
    folder: Path,
    base_folder: Path,
    adapter: Adapter = LORA,
    data: Data | None = None,
    sample: Sample = SAMPLE,
    seed: int = 0,
    certified: bool = False,
    base_name: str | None = None,
    promised: Promise | None = None,
) -> Path:
    """A folder with weights and recipe. It names its base as a built-in one, unless `base_name` says another.

    certified: with its certificate. promised: what it then says, if not `promise()`.
    """
    base, data = load_base(str(base_folder)), data or Data(class_names=NAMES)
    trained = inject_adapter(base, adapter, len(data.class_names or ()) if adapter.class_rows else 0, seed)
    torch.manual_seed(seed)
    for parameter in trained.trainable.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    write_weights(base, trained, folder)
    model = Model(pretrained_model_name_or_path=base_name or f"builtin:{base_folder.name}")
    by = ONE_SUM if adapter.kind == "code_moments" else {"privacy": Privacy(epsilon=1.0, gamma=0.01)}
    recipe = Recipe(model=model, data=data, adapter=adapter, sample=sample, **by)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    if certified:
        certificate.write(folder, certify(folder, recipe, base, promised or promise(), "given", "os", "deleted"))
    return folder
