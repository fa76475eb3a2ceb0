"""`--adapter code_moments`: one noisy sum over the codes of all images, and class rows drawn from what it says.

The sum holds, of each class, the number of its images and the first two moments of their codes: all that there is to
know of a Gaussian. Everything after the noise is post-processing. Docs: docs/explanation/code-moments.md.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = (0.15, 0.7, 0.7)  # of count, first and second moment in the norm of an example
BELOW_BOUND = 1 - 1e-5  # every example has this share of the clip bound as its norm, so that rounding clips none
POOL, ACCEPTED = 2, 0.9  # draws for each row; posterior of its own class above which a draw is taken
SMALLEST_CLASS = 0.1  # a class counts as at least this share of an even one: noise may say less than none
DRAWS = 0  # public: seed of the normals that rows are drawn with


class CodeMoments(nn.Module):
    """The base's class table, whose spare rows are drawn from one Gaussian of codes for each private class.

    Row rows[j * C + c] is draw j of class c; all other rows stay as they are. The only parameter that trains is `sums`,
    an ordinary embedding: entry c is the noisy mean, over the batch, of `statistics` of the codes of class c.

    Args:
        table: the base's.
        directions: (d, dim) what a unit code adds to the null row, linearly.
        rows: first of consecutive rows, and how many each class takes.
        max_grad_norm: clip bound C of one example.
        noise_of_mean: standard deviation of the noise in every number of `sums`.
    """

    directions: Tensor  # (d, dim)
    rows: Tensor  # (rows_per_class * num_classes,)
    entry_of_row: Tensor  # (num_embeddings,), -1 where the row is no private class

    def __init__(
        self,
        table: nn.Embedding,
        directions: Tensor,
        num_classes: int,
        first_row: int,
        rows_per_class: int,
        max_grad_norm: float,
        noise_of_mean: float,
    ):
        super().__init__()
        self.rows_per_class, self.noise_of_mean = rows_per_class, noise_of_mean
        scale = BELOW_BOUND * max_grad_norm / math.hypot(*WEIGHTS)
        self.weights = tuple(scale * weight for weight in WEIGHTS)
        self.table = table.requires_grad_(False)
        d, count = len(directions), num_classes * rows_per_class
        size = 1 + d + d * (d + 1) // 2
        self.sums = nn.Embedding(num_classes, size, _weight=torch.zeros(num_classes, size))
        rows = first_row + torch.arange(count)
        self.register_buffer("directions", directions)
        self.register_buffer("rows", rows)
        self.register_buffer(
            "entry_of_row", torch.full((table.num_embeddings,), -1).scatter(0, rows, torch.arange(count))
        )
        self._drawn: tuple[Tensor, Tensor] | None = None  # the sums, and the codes drawn from them

    def losses(self, codes: Tensor, labels: Tensor) -> Tensor:
        """(b,), of unit codes (b, d) and classes (b,): linear in `sums`, so that gradients are minus the statistics.

        Their norm is the clip bound for every example but for BELOW_BOUND, whatever its code (invariant 1 holds
        without a clip, which stays in force).
        """
        return -(statistics(codes, self.weights) * self.sums(labels)).sum(dim=1)

    def forward(self, row: Tensor) -> Tensor:
        """(b,) rows of the table -> (b, dim)."""
        entry = self.entry_of_row[row]
        drawn = self.codes().to(self.directions)[entry.clamp(min=0)] @ self.directions
        return self.table(row) + torch.where(entry[:, None] >= 0, drawn, 0.0)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes of `rows`, (rows_per_class * num_classes, d) float32 on the CPU, from the sums as they stand."""
        sums = self.sums.weight.detach().float().cpu()
        if self._drawn is None or not torch.equal(self._drawn[0], sums):
            gaussians = gaussians_of(sums.double(), self.weights, self.noise_of_mean)
            drawn = draw(*gaussians, self.rows_per_class)  # (C, R, d)
            self._drawn = sums.clone(), drawn.transpose(0, 1).flatten(0, 1).float()
        return self._drawn[1]

    def outlook(self) -> str:
        """A sentence of what the noise leaves, from public quantities only."""
        known_to = self.noise_of_mean * len(self.sums.weight) / self.weights[1]
        return (
            f"in a class of an even share, each number of the mean code is known to {known_to:.1g}; those of a code "
            f"have root mean square {len(self.directions) ** -0.5:.2g}"
        )

    @torch.no_grad()
    def write_to(self, layer: Any) -> None:
        """Give the rows to a stock LoRA on the class table: B is the frozen directions, A the codes."""
        layer.lora_embedding_A["default"].zero_()
        layer.lora_embedding_A["default"][:, self.rows] = self.codes().T.to(self.directions)
        layer.lora_embedding_B["default"].copy_(self.directions.T)


def statistics(codes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """(b, 1 + d + d (d + 1) / 2): one, u, and the upper half of u u^T, of unit codes u (b, d), times their weights.

    Numbers off the diagonal stand for two of the matrix, and count sqrt(2): the norm of the half is that of u u^T,
    which is |u|^2.
    """
    of_count, of_first, of_second = weights
    i, j = torch.triu_indices(codes.shape[1], codes.shape[1], device=codes.device)
    twice = torch.where(i == j, 1.0, math.sqrt(2)).to(codes)
    second = codes[:, i] * codes[:, j] * twice
    return torch.cat([of_count * torch.ones_like(codes[:, :1]), of_first * codes, of_second * second], dim=1)


def gaussians_of(sums: Tensor, weights: tuple[float, ...], noise_of_mean: float) -> tuple[Tensor, Tensor]:
    """Means (C, d) and covariances (C, d, d), positive definite, of what noisy `sums` (C, 1 + d + d (d + 1) / 2) say.

    The noise of a second moment is known. It decides how far covariances shrink towards the one of all classes pooled,
    in the manner of James and Stein (1961), and below which value no eigenvalue is believed.
    """
    num_classes, size = sums.shape
    d = (math.isqrt(8 * size + 1) - 3) // 2
    of_count, of_first, of_second = weights
    share = (sums[:, 0] / of_count).clamp(min=SMALLEST_CLASS / num_classes)  # (C,)
    mean = sums[:, 1 : 1 + d] / (of_first * share[:, None])
    mean = mean / mean.norm(dim=1, keepdim=True).clamp(min=1)  # of unit vectors
    i, j = torch.triu_indices(d, d)
    upper = sums[:, 1 + d :] / of_second / torch.where(i == j, 1.0, math.sqrt(2))
    second = torch.zeros(num_classes, d, d, dtype=sums.dtype)
    second[:, i, j] = second[:, j, i] = upper / share[:, None]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    pooled = (share[:, None, None] * covariance).sum(dim=0) / share.sum()
    noise = noise_of_mean / (of_second * share)  # (C,) standard deviation of a number on the diagonal
    pooled_noise = noise_of_mean * math.sqrt(num_classes) / (of_second * share.sum())
    apart = (covariance - pooled).square().sum(dim=(1, 2))  # half the variance off the diagonal: d (d + 1) / 2 in all
    kept = (1 - noise.square() * d * (d + 1) / 2 / apart.clamp(min=1e-12)).clamp(min=0)  # (C,)
    covariance = pooled + kept[:, None, None] * (covariance - pooled)
    noise = torch.hypot(kept * noise, pooled_noise.expand(num_classes))
    return mean, believable(covariance, 1e-4 + noise * math.sqrt(d) / 2)


def believable(covariance: Tensor, floor: Tensor) -> Tensor:
    """(C, d, d) with eigenvalues raised to at least floor (C,), and to at most 1, the trace of a unit vector's."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * torch.maximum(values, floor[:, None]).clamp(max=1)[:, None, :]) @ vectors.mT


def draw(mean: Tensor, covariance: Tensor, count: int) -> Tensor:
    """Unit codes (C, count, d) drawn from Gaussians; draws that may be of another class are taken last."""
    num_classes, d = mean.shape
    generator = torch.Generator().manual_seed(DRAWS)
    normal = torch.randn(num_classes, POOL * count, d, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()[:, None, :]) @ vectors.mT  # symmetric: no sign of an eigenvector is in it
    drawn = nn.functional.normalize(mean[:, None, :] + normal @ root, dim=2)  # (C, pool, d)
    posterior = log_densities(drawn.flatten(0, 1), mean, covariance).softmax(dim=1).view(num_classes, -1, num_classes)
    own = posterior[torch.arange(num_classes), :, torch.arange(num_classes)]  # (C, pool)
    order = own.clamp(max=ACCEPTED).argsort(dim=1, descending=True, stable=True)[:, :count]
    return drawn.gather(1, order[:, :, None].expand(-1, -1, d))


def log_densities(codes: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """(n, C) of codes (n, d), up to one constant."""
    values, vectors = torch.linalg.eigh(covariance)
    return torch.stack(
        [
            -0.5 * (((codes - m) @ v).square() / e).sum(dim=1) - 0.5 * e.log().sum()
            for m, e, v in zip(mean, values, vectors, strict=True)
        ],
        dim=1,
    )
