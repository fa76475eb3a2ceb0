"""What a base is told of an image: a row of its class table, the embedding of a prompt, or nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.errors import UserError

LABEL = "{label}"


@dataclass(frozen=True)
class ConditionTable:
    """Row c is what the network is told of class c; the last row is what it is told of no class.

    rows: argument of the network -> (classes + 1, ...); empty for an unconditional base. All of it is public.
    """

    rows: dict[str, Tensor]

    @property
    def null(self) -> int:
        """The row that means "no class"."""
        return len(next(iter(self.rows.values()))) - 1 if self.rows else 0

    @property
    def digest(self) -> str:
        """SHA-256 of all rows: prompts may be embedded otherwise by another version of a library."""
        digest = hashlib.sha256()
        for name, table in sorted(self.rows.items()):
            digest.update(f"{name} {tuple(table.shape)} {table.dtype}\n".encode())
            digest.update(table.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def take(self, labels: Tensor) -> dict[str, Tensor]:
        """Labels (n,) -> what the network is told: argument -> (n, ...)."""
        return {name: table[labels] for name, table in self.rows.items()}


def condition_table(
    base: BaseModel, class_rows: Sequence[int] | None, class_names: Sequence[str] | None, prompt_template: str
) -> ConditionTable:
    """The table of a run's classes: rows of the class table, or prompts made of the class names.

    Without classes a text-conditional base sees the template itself as the prompt of every image.

    Raises:
        UserError: the template wants a label, and there are none.
    """
    if base.text is not None:
        prompts = class_prompts(class_names, prompt_template)
        encoded, null = base.text.encode(prompts), base.text.null
        return ConditionTable({name: torch.cat([encoded[name], null[name]]) for name in encoded})
    if base.num_class_embeds is None:
        return ConditionTable({})
    null_row = base.layout.null_class or 0
    rows = torch.tensor([*(class_rows or ()), null_row], device=base.unet.device)
    return ConditionTable({"class_labels": rows})


def class_prompts(class_names: Sequence[str] | None, prompt_template: str) -> list[str]:
    """The prompt of each class, or of all images where there are no classes.

    Raises:
        UserError: the template wants a label, and there are none.
    """
    if class_names is not None:
        return [prompt_template.replace(LABEL, name) for name in class_names]
    if LABEL in prompt_template:
        raise UserError(
            f"--prompt_template {prompt_template!r} wants labels, and the images have none. Give --caption_column, "
            "or one prompt for all images, such as --prompt_template 'a chest x-ray'."
        )
    return [prompt_template]


def null_conditions(base: BaseModel, num_images: int) -> dict[str, Tensor]:
    """What the network is told of images of no class: argument -> (num_images, ...)."""
    if base.text is not None:
        return {name: row.expand(num_images, *row.shape[1:]) for name, row in base.text.null.items()}
    if base.num_class_embeds is None:
        return {}
    return {"class_labels": torch.full((num_images,), base.layout.null_class or 0, device=base.unet.device)}
