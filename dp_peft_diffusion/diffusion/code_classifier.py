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
        """The class of each image (n, c, side, side) uint8 whose Gaussian is densest at its code."""
        codes = self.encoder(images.to(self.encoder.device) / 127.5 - 1).double().cpu()  # (n, d)
        return [self.labels[place] for place in log_densities(codes, self.mean, self.covariance).argmax(dim=1)]


def code_classifier(base: BaseModel, labels: Sequence[str] | None, rows: Sequence[int] | None) -> CodeClassifier:
    """What tells the classes of an adapter apart by the codes that its class rows stand for.

    base: with the adapter in its network.
    labels: of the classes. rows: theirs in the class table; entry i is of class i % len(labels).

    Raises:
        UserError: the base is told no codes, there are no classes, or a class has a single row.
    """
    of_class = [rows[place :: len(labels)] for place in range(len(labels))] if labels and rows else []
    if base.codes is None or not labels or min((len(set(own)) for own in of_class), default=0) < 2:
        raise UserError(
            "--relabel asks the class rows of an adapter what a class looks like, many for each class, and here are "
            "none or too few. Leave it out, or train with --adapter code_moments."
        )
    means, covariances = zip(*(moments_of_rows(base, own) for own in of_class), strict=True)
    return CodeClassifier(tuple(labels), base.codes, torch.stack(means), torch.stack(covariances))


@torch.no_grad()
def moments_of_rows(base: BaseModel, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the codes that rows of the class table stand for.

    Few codes make a poor covariance: it is shrunk as in Ledoit and Wolf (2004), "A well-conditioned estimator for
    large-dimensional covariance matrices".
    """
    told = base.unet.class_embedding(torch.tensor(rows, device=base.unet.device)).double().cpu()  # (n, dim)
    directions = unit_code_directions(base).double().cpu()  # (d, dim): told = codes @ directions
    codes = torch.linalg.lstsq(directions.T, told.T).solution.T
    codes = torch.nn.functional.normalize(codes, dim=1)  # an adapter's weight makes them longer or shorter
    return codes.mean(dim=0), torch.from_numpy(ledoit_wolf(codes.numpy())[0])
