"""Train again with an escrowed key and compare the weights bit for bit: evidence that no certificate can give."""

import tempfile
from pathlib import Path

from dp_peft_diffusion.attempt import context_of_run, open_images
from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.preparation import prepare
from dp_peft_diffusion.privacy.certificate import read
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.randomness import attempt_key
from dp_peft_diffusion.privacy.untrusted import sha256_of
from dp_peft_diffusion.recipe import load_recipe
from dp_peft_diffusion.runs.context import context_digest, differences
from dp_peft_diffusion.runs.escrow import read_escrowed_key
from dp_peft_diffusion.sharing.export import write_weights
from dp_peft_diffusion.training import train_steps


def replay(folder: Path, escrow_key: Path, dataset_name: str, base: str | None = None) -> str:
    """Repeat the certified training in a temporary folder; the sentence of the level "replay".

    It takes as long as the training took, and spends nothing: the noise is the same.

    Args:
        folder: a shareable folder with its certificate.
        escrow_key: what `--escrow_key` wrote when it was trained.
        dataset_name: the private images.
        base: where the base lies, if not where the recipe says.

    Raises:
        UserError: the recipe, the images or the key file cannot be read.
        PrivacyError: this machine or these inputs are other than in training, or the weights came out different.
    """
    document, escrowed = read(folder), read_escrowed_key(escrow_key)
    places: dict[str, object] = {"data.dataset_name": dataset_name}
    if base is not None:
        places["model.pretrained_model_name_or_path"] = base
    recipe = load_recipe(folder / "recipe.yaml", places)
    with tempfile.TemporaryDirectory(prefix="dp-peft-replay-") as scratch:
        prepared = prepare(recipe, Path(scratch) / "replay", certified=promise_of(document))
        images = open_images(prepared, None)
        context = context_of_run(prepared, images)
        if changed := differences(escrowed.context, context):
            raise PrivacyError(f"Not replayed, as this is not what was trained with: {changed}.")
        prepared.run.private.mkdir(mode=0o700)
        train_steps(prepared, images, attempt_key(escrowed.key, escrowed.attempt, context_digest(context)))
        again = Path(scratch) / "again"
        again.mkdir()
        write_weights(prepared.base, prepared.adapter, again)
        weights = [name for name in document["sha256"] if name.endswith(".safetensors") and (again / name).is_file()]
        different = [name for name in weights if sha256_of(again / name) != document["sha256"][name]]
    if different or not weights:
        raise PrivacyError(f"Trained again with the escrowed key, these came out different: {', '.join(different)}.")
    return f"Trained again from the images with the escrowed key: {', '.join(weights)} came out bit for bit."
