"""How alike real and synthetic images are, as distances between their features and as neighbourhoods of each other.

What the numbers are called depends on the features: an FID is a Frechet distance in Inception's features, and in no
others. Every number here depends on the number of images, too, and is computed from the real ones without noise: the
privacy guarantee covers none of it.
"""

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.features import Features

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as clean-fid draws them
NEAREST = 3  # neighbours that span a ball for precision and recall: Kynkaanniemi et al. 2019, section 3
NEAREST_DENSITY = 5  # the same for density and coverage: Naeem et al. 2020, section 3.4
NEIGHBOURHOOD_IMAGES = 10_000  # of each kind, at most: the cost grows with its square. Naeem et al. took as many
CHUNK_NUMBERS = 1 << 24  # distances held at a time, 128 MB
_CLEAN_FID = {"frechet_distance": "FID", "kernel_distance": "KID"}


def fidelity(features: Features, real_images: np.ndarray, synthetic_images: np.ndarray, *, seed: int = 0) -> dict:
    """All numbers of this file for images (n, c, h, w) uint8 and (m, c, h, w) uint8.

    The order of the images does not matter: what is drawn is drawn from sorted features, by `seed`.

    Returns:
        `features`, their name; `names`, what each of the numbers is called; `frechet_distance`; `kernel_distance` and
        `kernel_distance_std`, its standard deviation over `kernel_subsets` subsets of `kernel_subset_size`, None where
        these are all there is;
        `precision`, `recall`, `density` and `coverage` of `neighbourhood_images` images of each kind;
        `num_real_images`, `num_synthetic_images`, `num_features`; and `frechet_distance_is_biased`, whether the images
        of a kind are no more than the features, so that a covariance is singular. NOT covered by the guarantee.

    Raises:
        UserError: too few images, or images that have no features.
    """
    fewest = min(len(real_images), len(synthetic_images))
    if fewest <= NEAREST_DENSITY:
        raise UserError(
            f"{len(real_images)} real and {len(synthetic_images)} synthetic images are too few to compare: at least "
            f"{NEAREST_DENSITY + 1} of each are needed, and thousands for a number that means something. Sample more."
        )
    real, synthetic = (_sorted(features(images)) for images in (real_images, synthetic_images))
    kernel, spread = kernel_distance(real, synthetic, seed=seed)
    size = min(fewest, NEIGHBOURHOOD_IMAGES)
    generator = np.random.default_rng(seed)
    drawn = (kind[generator.choice(len(kind), size, replace=False)] for kind in (real, synthetic))
    return {
        "features": features.name,
        "names": names(features),
        "frechet_distance": frechet_distance(real, synthetic),
        "kernel_distance": kernel,
        "kernel_distance_std": spread,
        "kernel_subsets": SUBSETS,
        "kernel_subset_size": min(fewest, SUBSET_SIZE),
        **neighbourhoods(*drawn),
        "neighbourhood_images": size,
        "num_real_images": len(real),
        "num_synthetic_images": len(synthetic),
        "num_features": real.shape[1],
        "frechet_distance_is_biased": fewest <= real.shape[1],
        "seed": seed,
    }


def names(features: Features) -> dict[str, str]:
    """What to call each number in these features: FID and KID in those of Inception, never in others."""
    if features.is_inception:
        called = _CLEAN_FID
    elif features.name == "clip":
        called = {"frechet_distance": "CLIP-FID", "kernel_distance": "CLIP kernel distance"}
    else:
        of = features.name
        called = {"frechet_distance": f"{of} Frechet distance", "kernel_distance": f"{of} kernel distance"}
    shares = ("precision", "recall", "density", "coverage")
    return called | {share: f"{share} in {features.name} features" for share in shares}


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> float:
    """The squared Frechet distance of the Gaussians with the means and covariances of features (n, d) and (m, d).

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), Heusel et al. 2017, equation 6. With C = R^T R, where R comes
    from a QR decomposition of the centred features, the last trace is the sum of the singular values of R_1 R_2^T. So
    no covariance is formed, and none has to be regular. clean-fid 0.1.35 takes SciPy's `sqrtm` of the product, which
    loses half of the digits where a covariance is singular (n <= d) and gives negative distances there.
    """
    shift = real.mean(axis=0) - synthetic.mean(axis=0)
    first, second = (_covariance_root(features) for features in (real, synthetic))
    overlap = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    distance = shift @ shift + np.square(first).sum() + np.square(second).sum() - 2 * overlap
    return max(0.0, float(distance))  # what rounding leaves below zero


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """R with R^T R the unbiased covariance."""
    return np.linalg.qr(features - features.mean(axis=0), mode="r") / np.sqrt(len(features) - 1)


def kernel_distance(real: np.ndarray, synthetic: np.ndarray, *, seed: int) -> tuple[float, float | None]:
    """The squared maximum mean discrepancy of features (n, d) and (m, d), and its standard deviation over subsets.

    No deviation, None, where every subset is the whole of both: they are all alike, which says nothing of its error.

    The mean of `SUBSETS` unbiased estimates on `SUBSET_SIZE` features of each kind, or as many as there are, with the
    kernel (x.y / d + 1)^3: Binkowski et al. 2018, section 4, as clean-fid computes it, but drawn by `seed`. It may be
    below zero, being unbiased.
    """
    generator = np.random.default_rng(seed)
    size = min(len(real), len(synthetic), SUBSET_SIZE)
    estimates = []
    for _ in range(SUBSETS):
        x, y = (kind[generator.choice(len(kind), size, replace=False)] for kind in (real, synthetic))
        estimates.append(_squared_discrepancy(x, y))
    whole = size == len(real) == len(synthetic)
    return float(np.mean(estimates)), None if whole else float(np.std(estimates))


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, of as many x as y: nobody is compared with itself."""
    size = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
    return within / (size * (size - 1)) - 2 * _cubic_kernel(x, y).mean()


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values = x @ (y.T / x.shape[1])
    values += 1
    cubes = values * values
    cubes *= values  # a power of an array takes many times as long
    return cubes


def neighbourhoods(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of features (n, d) of each kind.

    Around each feature lies a ball that reaches to its k-th nearest neighbour of its own kind. Precision: the share of
    the synthetic in a ball of a real one. Recall: the share of the real in a ball of a synthetic one (Kynkaanniemi et
    al. 2019, equations 1 to 3; k = 3). Density: in how many real balls a synthetic one lies, over k, which an outlier
    with a large ball hardly moves. Coverage: the share of real balls with a synthetic one in them (Naeem et al. 2020,
    equations 4 and 5; k = 5). What lies on a ball's surface is in it.

    Distances are computed number by number, not from inner products: those of equal features are exactly zero, and a
    generator that repeats one image would be measured by rounding errors otherwise.
    """
    near_real, dense_real = _radii(real, (NEAREST, NEAREST_DENSITY))
    (near_synthetic,) = _radii(synthetic, (NEAREST,))
    precise, dense = 0, 0
    recalled, covered = (np.zeros(len(real), bool) for _ in range(2))
    for rows, distances in _chunks(synthetic, real):
        precise += int((distances <= near_real).any(axis=1).sum())
        recalled |= (distances <= near_synthetic[rows, None]).any(axis=0)
        inside = distances <= dense_real
        dense += int(inside.sum())
        covered |= inside.any(axis=0)
    return {
        "precision": precise / len(synthetic),
        "recall": float(recalled.mean()),
        "density": dense / (NEAREST_DENSITY * len(synthetic)),
        "coverage": float(covered.mean()),
    }


def _radii(features: np.ndarray, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """Squared distances (n,) from each feature to its k-th nearest other one, for each k of `ranks`."""
    radii = np.empty((len(ranks), len(features)))
    for rows, distances in _chunks(features, features):
        radii[:, rows] = np.partition(distances, ranks, axis=1)[:, ranks].T  # the nearest, at 0, is itself
    return list(radii)


def _chunks(features: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the rows of `features`, with their squared distances (rows, len(others))."""
    step = max(1, CHUNK_NUMBERS // len(others))
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        yield rows, cdist(features[rows], others, "sqeuclidean")


def _sorted(features: np.ndarray) -> np.ndarray:
    """The same rows in an order that is theirs, so that a draw by position does not depend on who listed them."""
    return features[np.lexsort(features.T)]
