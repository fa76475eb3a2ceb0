"""What an evaluation found, as titled tables of text: for the terminal, the Markdown file and the page alike."""

import html
from dataclasses import dataclass, replace
from typing import Any

TITLES = {
    "logistic_regression": "logistic regression",
    "mlp": "MLP",
    "cnn": "small CNN",
    "cnn_dpdm": "CNN of DPDM",
    "wrn_40_4": "WRN-40-4",
    "resnet_110": "ResNet-110",
}
SHARES = ("precision", "recall", "density", "coverage")
STAMP = "Not covered by the guarantee."


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading, all rows as long as the header; and what has to be said of them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def markdown(self) -> str:
        """The table as Markdown, in which names of classes are text and nothing else."""
        header, *rows = (f"| {' | '.join(map(_as_markdown, line))} |\n" for line in [self.header, *self.rows])
        shown = "".join([header, "|---" * len(self.header), "|\n", *rows])
        return f"## {_as_markdown(self.title)}\n\n{shown}" + (f"\n{self.note}\n" if self.note else "")

    @property
    def text(self) -> str:
        """The table for a terminal, columns aligned."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *(f"  {line}" for line in [*shown, self.note] if line)]) + "\n"


def _as_markdown(cell: str) -> str:
    plain = html.escape("".join(char if char.isprintable() else " " for char in cell), quote=False)
    return "".join(f"\\{char}" if char in r"\`*_[]|#!~$" else char for char in plain)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of what `evaluation.json` holds, those that were measured; stamped, if of private images."""
    made = [_utility(result), _classes(result)]
    if "real_images" in result:
        made.append(_real_images(result["real_images"]))
    if "learning_curve" in result:
        made.append(_learning_curve(result))
    if "tuning" in result:
        made.append(_tuning(result["tuning"]))
    made += map(_fidelity, result["fidelity"])
    if "memorization" in result:
        made.append(_memorization(result["memorization"]))
    if "membership" in result:
        made.append(_membership(result["membership"]))
    stamp = "" if result["declared_public"] else STAMP
    return [replace(table, note=f"{stamp} {table.note}".strip()) for table in made]


def measured(result: dict[str, Any]) -> list[str]:
    """The classifiers of a result, in order."""
    return [name for name in TITLES if name in result]


def accuracy(found: dict[str, Any]) -> str:
    """Mean and spread over seeds, in percent; of one seed, the standard error of the test set."""
    mean, error = 100 * found["accuracy"], 100 * found["test_standard_error"]
    if found["accuracy_stddev"] is None:
        seed = "one seed; " if found.get("training", True) else ""  # logistic regression has none
        return f"{mean:.1f} % ({seed}standard error of the test {error:.1f})"
    return f"{mean:.1f} ± {100 * found['accuracy_stddev']:.1f} % over {len(found['accuracies'])} seeds"


def _utility(result: dict[str, Any]) -> Table:
    voting = f", {result['ensemble']} vote" if result["ensemble"] > 1 else ""
    images = f"{result['num_synthetic_images']:,} synthetic images"
    rows = [(TITLES[name] + voting, images, accuracy(result[name])) for name in measured(result)]
    note = ""
    if "reference" in result:
        real = result["reference"]
        images = f"{real['num_training_images']:,} real images, without privacy"
        rows += [(TITLES[name] + voting, images, accuracy(real[name])) for name in measured(real)]
    if "private_classifier" in result:
        found = result["private_classifier"]
        release, joint = found["release"], found["joint_epsilon"]
        together = "above 100" if joint is None else f"{joint:g}"
        if found["earlier_classifiers"]:
            together += f", with {found['earlier_classifiers']} earlier classifier(s)"
        images = f"real images, at epsilon {release['epsilon']:g} in addition (together {together})"
        rows.append(("CNN trained with DP-SGD", images, accuracy(found)))
        note = " ".join([release["statement"], *found["not_counted"]])
    title = f"Accuracy on {result['num_real_images']:,} real images"
    return Table(title, ("classifier", "trained on", "accuracy"), tuple(rows), note)


def _classes(result: dict[str, Any]) -> Table:
    found = measured(result)
    shares = [result[name]["per_class_accuracy"] for name in found]
    rows = tuple(
        (name, *(f"{100 * each[str(index)]:.1f} %" for each in shares))
        for index, name in enumerate(result["class_names"])
        if str(index) in shares[0]
    )
    return Table("Accuracy of each class", ("class", *(TITLES[name] for name in found)), rows)


def _real_images(found: dict[str, Any]) -> Table:
    whose = {
        True: "those of the run, as its ledger says",
        False: "not verified to be the images of this run",
        None: "taken as given: there is no run",
    }
    identical, held_out = found["held_out_images_identical_to_training_images"], found["num_held_out_images"]
    rows = (
        ("training images", whose[found["training_images_of_the_run"]]),
        ("held-out images identical to a training image", f"{identical:,} of {held_out:,}"),
    )
    return Table("Real images", ("what", "found"), rows)


def _learning_curve(result: dict[str, Any]) -> Table:
    found = measured(result)
    rows = tuple(
        (f"{point['num_synthetic_images']:,}", *(f"{100 * point[name]['accuracy']:.1f} %" for name in found))
        for point in result["learning_curve"]
    )
    header = ("synthetic images", *(TITLES[name] for name in found))
    return Table("Accuracy against the number of synthetic images", header, rows)


def _tuning(found: dict[str, Any]) -> Table:
    def shown(value: float | None) -> str:
        return "none: all settings score the same" if value is None else f"{value:.2f}"

    chosen = ", ".join(f"{name} {value:g}" for name, value in found["chosen_setting"].items())
    rows = (
        ("chosen on synthetic images", f"{chosen}, of {found['num_settings']} settings"),
        ("its accuracy on real images", f"{100 * found['real_accuracy_of_choice']:.1f} %"),
        ("best accuracy on real images of all settings", f"{100 * found['best_real_accuracy']:.1f} %"),
        ("lost by choosing on synthetic images", f"{100 * found['accuracy_lost']:.1f} points"),
        ("rank agreement, Spearman", shown(found["spearman"])),
        ("rank agreement, Kendall", shown(found["kendall"])),
    )
    return Table("Settings of the small CNN, chosen on synthetic images alone", ("number", "value"), rows)


def _fidelity(found: dict[str, Any]) -> Table:
    names = found["names"]
    biased = " (too few images for its covariance)" if found["frechet_distance_is_biased"] else ""
    deviation = found["kernel_distance_std"]
    error = "(no ±: each subset is all there is)" if deviation is None else f"± {deviation:.1g}"
    rows = (
        (names["frechet_distance"], f"{found['frechet_distance']:.3g}{biased}"),
        (names["kernel_distance"], f"{found['kernel_distance']:.3g} {error}"),
        *((names[share], f"{found[share]:.3f}") for share in SHARES),
    )
    count = f"{found['num_synthetic_images']:,} synthetic and {found['num_real_images']:,} real images"
    return Table(f"Likeness in {found['features']} features, {count}", ("number", "value"), rows)


def _memorization(found: dict[str, Any]) -> Table:
    rows = (
        ("samples nearest to a training image", f"{100 * found['share_nearer_to_training']:.1f} %"),
        ("expected by chance", f"{100 * found['expected_share']:.1f} %"),
        ("one-sided p-value", f"{found['p_value']:.2g}"),
        ("median ratio of distances, 1 if nothing is copied", f"{found['median_distance_ratio']:.3f}"),
        ("samples that look like copies", f"{100 * found['share_of_copies']:.2f} %"),
        ("the same against held-out images", f"{100 * found['share_of_copies_of_held_out_images']:.2f} %"),
    )
    return Table(f"Memorization, in {found['features']} features", ("number", "value"), rows)


def _membership(found: dict[str, Any]) -> Table:
    def shown(auc: float, low: float, high: float) -> str:
        return f"{auc:.3f} ({low:.3f} to {high:.3f})"

    bound = "none: no promise" if found["auc_bound"] is None else f"{found['auc_bound']:g}"
    rows = [
        ("AUC of a loss attack", shown(found["auc"], found["auc_low"], found["auc_high"])),
        ("the most that the promise allows any attack", bound),
    ]
    if found["auc_of_base"] is not None:
        control = found["auc_of_base"]
        rows.append(("AUC of the base alone, a control", shown(control["value"], control["low"], control["high"])))
    return Table("Membership test", ("number", "value"), tuple(rows), found["message"])
