"""Plots of an evaluation, as PNG. Of private images, each says in itself that the guarantee does not cover it."""

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dp_peft_diffusion.evaluation.summary import STAMP, TITLES, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_CLASSES = 25  # from which on the plot of classes widens


def plots(result: dict[str, Any]) -> dict[str, bytes]:
    """File name -> PNG, of what was measured."""
    made = {"classes.png": _png(_draw_classes, result, 6.4 * max(1, len(result["class_names"]) / MANY_CLASSES))}
    if "learning_curve" in result:
        made["learning_curve.png"] = _png(_draw_learning_curve, result)
    if "tuning" in result:
        made["tuning.png"] = _png(_draw_tuning, result)
    return made


def _png(draw: "Callable[[Axes, dict[str, Any]], None]", result: dict[str, Any], width: float = 6.4) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, whatever the user's settings
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 40), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes, result)
    if not result["declared_public"]:
        axes.annotate(STAMP, (1, 1.01), xycoords="axes fraction", ha="right", va="bottom", fontsize=8, color="#c2410c")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters of a class name that the font lacks: boxes
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def _draw_learning_curve(axes: "Axes", result: dict[str, Any]) -> None:
    points = result["learning_curve"]
    sizes = [point["num_synthetic_images"] for point in points]
    for index, name in enumerate(measured(result)):
        values = [100 * point[name]["accuracy"] for point in points]
        spread = [100 * (point[name]["accuracy_stddev"] or 0.0) for point in points]
        axes.errorbar(sizes, values, spread, marker="o", capsize=3, color=f"C{index}", label=TITLES[name])
        if name in result.get("reference", {}):
            real = 100 * result["reference"][name]["accuracy"]
            axes.axhline(real, color=f"C{index}", linestyle=":", label=f"{TITLES[name]}, real images")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("synthetic images trained on")
    axes.set_ylabel("accuracy on real images (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_classes(axes: "Axes", result: dict[str, Any]) -> None:
    found, names = measured(result), result["class_names"]
    width = 0.8 / len(found)
    for index, name in enumerate(found):
        shares = result[name]["per_class_accuracy"]
        places = [int(label) + (index - (len(found) - 1) / 2) * width for label in shares]
        axes.bar(places, [100 * share for share in shares.values()], width, label=TITLES[name])
    turned = max(map(len, names)) > 3
    angle, side = (45, "right") if turned else (0, "center")
    axes.set_xticks(range(len(names)), names, parse_math=False, rotation=angle, ha=side)  # a name may hold a $
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy on real images (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=3)  # over the bars it would hide some


def _draw_tuning(axes: "Axes", result: dict[str, Any]) -> None:
    found = result["tuning"]
    synthetic, real = (
        [100 * setting[key] for setting in found["settings"]] for key in ("synthetic_accuracy", "real_accuracy")
    )
    axes.plot(synthetic, real, "o", color="C0", label="a setting of the small CNN")
    chosen = synthetic.index(max(synthetic))
    axes.plot(synthetic[chosen], real[chosen], "o", markersize=12, fillstyle="none", color="C3", label="chosen")
    if found["spearman"] is not None:
        axes.set_title(f"Spearman {found['spearman']:.2f}, Kendall {found['kendall']:.2f}", fontsize=10, loc="left")
    axes.set_xlabel("accuracy on held-out synthetic images (%)")
    axes.set_ylabel("accuracy on real images (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
