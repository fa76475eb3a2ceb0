"""Which class an image shows, by codes: one Gaussian for each class, from an adapter's rows. It costs no privacy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.class_rows import unit_code_directions
from dp_peft_diffusion.diffusion.code_moments import log_densities
from dp_peft_diffusion.diffusion.image_codes import CodeEncoder
from dp_peft_diffusion.errors import UserError


@dataclass(frozen=True)
class CodeClassifier:
    """Classes by the codes of images: `labels`, and of each the mean (C, d) and covariance (C, d, d) of its codes."""

    labels: tuple[str, ...]
    encoder: CodeEncoder
    mean: Tensor
    covariance: Tensor

    @torch.no_grad()
    def classes(self, images: Tensor) -> list[str]:
        """For each image (n, c, side, side) uint8 that one of `labels` whose Gaussian is densest at its code."""
        codes = self.encoder(images.to(self.encoder.device) / 127.5 - 1).double().cpu()  # (n, d)
        return [self.labels[place] for place in log_densities(codes, self.mean, self.covariance).argmax(dim=1)]


def code_classifier(base: BaseModel, labels: Sequence[str] | None, rows: Sequence[int] | None) -> CodeClassifier:
    """What tells the classes of an adapter apart by the codes that its class rows stand for.

    base: with the adapter in its network.
    labels: of the classes. rows: theirs in the class table; entry i is of class i % len(labels).

    Raises:
        UserError: the base is told no codes, there are no classes, or what their rows say is too little or no code.
    """
    if base.codes is None or not labels or not rows:
        raise UserError(
            f"--relabel needs classes, and a base that is told codes of images. Base {base.name!r} and this adapter "
            "have not both. Leave it out, or train with --adapter code_moments."
        )
    own = {name: {row for i, row in enumerate(rows) if labels[i % len(labels)] == name} for name in labels}
    moments = [moments_of_rows(base, sorted(of_class), name) for name, of_class in own.items()]
    mean, covariance = (torch.stack(parts) for parts in zip(*moments, strict=True))
    return CodeClassifier(tuple(own), base.codes, mean, covariance)


@torch.no_grad()
def moments_of_rows(base: BaseModel, rows: Sequence[int], label: str) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d), positive definite, of the codes that rows of the class table stand for.

    Few codes make a poor covariance: it is shrunk as in Ledoit and Wolf (2004), "A well-conditioned estimator for
    large-dimensional covariance matrices".

    Raises:
        UserError: too few rows, or rows that are no codes; `label` is their class.
    """
    directions = unit_code_directions(base).double().cpu()  # (d, dim): told = codes @ directions
    needed = max(3, len(directions) // 2)  # of a few, covariances are mostly shrinkage
    if len(rows) < needed:
        raise UserError(
            f"--relabel: class {label!r} has {len(rows)} class rows, which say too little of what it looks like. Leave "
            f"it out, or train with --adapter code_moments and --rows_per_class {needed} or more."
        )
    told = base.unet.class_embedding(torch.tensor(rows, device=base.unet.device)).double().cpu()  # (n, dim)
    codes = torch.linalg.lstsq(directions.T, told.T).solution.T  # (n, d)
    unlike = (codes @ directions - told).norm() / told.norm()
    if torch.linalg.matrix_rank(directions) < len(directions) or not unlike < 1e-3:  # nor zeros, whose share is nan
        raise UserError(
            f"--relabel: the rows of class {label!r} stand for no codes of base {base.name!r}. Leave it out, or give "
            "the base and the weight of the adapter that they were made with."
        )
    codes = torch.nn.functional.normalize(codes, dim=1)  # an adapter's weight makes them longer or shorter
    return codes.mean(dim=0), torch.from_numpy(ledoit_wolf(codes.numpy())[0])
