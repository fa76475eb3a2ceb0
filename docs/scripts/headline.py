"""The MNIST tables and plots of docs/explanation/results.md, from what `dp-peft evaluate --format json` printed.

python docs/scripts/headline.py        # reads docs/explanation/headline/*.json; the page has the commands
"""

import json
import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXPLANATION = Path(__file__).resolve().parents[2] / "docs" / "explanation"
MEASURED, PAGE = EXPLANATION / "headline", EXPLANATION / "results.md"
BEGIN, END = "<!-- begin: docs/scripts/headline.py -->\n", "<!-- end -->\n"
NAMES = {"0.2": "eps0.2", "1": "eps1", "10": "eps10", "none: no noise": "none"}  # epsilon -> file
TITLES = {"logistic_regression": "logistic regression", "cnn": "small CNN"}
# CNN trained on 60,000 synthetic images, percent: (epsilon, accuracy). DPDM: 2210.09929; others: FETA-Pro's release.
PUBLISHED = {
    "DPDM": ((0.2, 86.3), (1, 95.3), (10, 98.1)),
    "DP-FETA": ((1, 95.6), (10, 98.1)),
    "PrivImage": ((1, 94.0), (10, 97.8)),
    "FETA-Pro": ((1, 97.3), (10, 98.6)),
}


def measured() -> dict[str, dict]:
    """Epsilon -> what `dp-peft evaluate` found."""
    return {epsilon: json.loads((MEASURED / f"{name}.json").read_text()) for epsilon, name in NAMES.items()}


def table(found: dict[str, dict]) -> str:
    """One row for each epsilon."""
    lines = [f"| epsilon | synthetic images | {' | '.join(TITLES.values())} |", "|---" * (2 + len(TITLES)) + "|"]
    for epsilon, result in found.items():
        cells = [percent(result[name]) for name in TITLES]
        lines.append(f"| {epsilon} | {result['num_synthetic_images']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(scores: dict) -> str:
    """Mean in percent, and the spread over seeds of what draws anything."""
    spread = scores["accuracy_stddev"]
    return f"{100 * scores['accuracy']:.1f}" + (" %" if spread is None else f" ± {100 * spread:.1f} %")


def plot_epsilon(found: dict[str, dict]) -> Figure:
    """Accuracy against epsilon, beside what was published."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    private = [epsilon for epsilon in found if epsilon[0].isdigit()]
    values = [100 * found[epsilon]["cnn"]["accuracy"] for epsilon in private]
    axes.plot([float(epsilon) for epsilon in private], values, "o-", color="C0", label="here, small CNN")
    for index, (name, points) in enumerate(PUBLISHED.items()):
        axes.plot(*zip(*points, strict=True), "x:", color=f"C{1 + index}", label=name)
    axes.set_xscale("log")
    axes.set_xticks([0.2, 1, 10], ["0.2", "1", "10"])
    axes.set_xlabel("epsilon (delta 1e-5)")
    axes.set_ylabel("accuracy on real MNIST images (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_images(found: dict[str, dict]) -> Figure:
    """Accuracy of the small CNN against the number of synthetic images."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = {epsilon: result["learning_curve"] for epsilon, result in found.items() if "learning_curve" in result}
    for index, (epsilon, points) in enumerate(curves.items()):
        sizes = [point["num_synthetic_images"] for point in points]
        axes.plot(
            sizes, [100 * p["cnn"]["accuracy"] for p in points], "o-", color=f"C{index}", label=f"epsilon {epsilon}"
        )
    least = min(point["cnn"]["accuracy"] for points in curves.values() for point in points)
    axes.set_ylim(max(0, math.floor(100 * least) - 1), 100)
    axes.set_xscale("log")
    axes.set_xlabel("synthetic images trained on")
    axes.set_ylabel("accuracy on real MNIST images (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def rendered(page: str) -> str:
    """The page with a fresh table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table(measured())}\n{END}{after}"


if __name__ == "__main__":
    plot_epsilon(measured()).savefig(EXPLANATION / "mnist-epsilon.png", dpi=130, metadata={"Software": None})
    plot_images(measured()).savefig(EXPLANATION / "mnist-images.png", dpi=130, metadata={"Software": None})
    PAGE.write_text(rendered(PAGE.read_text()))
