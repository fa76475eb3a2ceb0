"""The tables of adapters/README.md, from the certificates of the released adapters and adapters/measured.json.

    python docs/scripts/gallery.py measure digits-eps1 --images digits --dataset_name builtin:digits --split report
    python docs/scripts/gallery.py        # writes the tables between the marks of the page
    python docs/scripts/gallery.py together FOLDER...       # what releases from the same images cost together

`measure` runs `dp-peft evaluate` on a released folder and keeps what no certificate says: accuracies on held-out
images, and the command. Folders stand in measured.json in the order in which they were trained.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from click.testing import CliRunner

from dp_peft_diffusion.cli import main as dp_peft
from dp_peft_diffusion.privacy import accounting, certificate
from dp_peft_diffusion.privacy.composition import promise_of, read_prior
from dp_peft_diffusion.privacy.promise import composed_event
from dp_peft_diffusion.privacy.ranges import round_up

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
PAGE, MEASURED = ADAPTERS / "README.md", ADAPTERS / "measured.json"
BEGIN, END = "<!-- begin: docs/scripts/gallery.py -->\n", "<!-- end -->\n"
CLASSIFIERS = {"cnn": "small CNN", "logistic_regression": "logistic regression"}


def folders() -> dict[str, dict]:
    """Released adapter -> what was measured of it, the oldest first."""
    return json.loads(MEASURED.read_text())


def measure(name: str, images: str, words: list[str]) -> None:
    """Run `dp-peft evaluate` on a released folder with these options, and keep what it found."""
    ran = CliRunner().invoke(dp_peft, ["evaluate", str(ADAPTERS / name), *words, "--format", "json"])
    if ran.exit_code:
        raise SystemExit(ran.output)
    found = json.loads(ran.stdout)
    keys = ("accuracy", "accuracies", "accuracy_stddev", "per_class_accuracy")
    entry = {
        "images": images,
        "command": " ".join(["dp-peft evaluate", f"adapters/{name}", *hide_places(words)]),
        **{key: found[key] for key in ("num_synthetic_images", "num_real_images")},
        **{classifier: {key: found[classifier][key] for key in keys} for classifier in CLASSIFIERS},
    }
    MEASURED.write_text(json.dumps({**folders(), name: entry}, indent=2) + "\n")


def hide_places(words: list[str]) -> list[str]:
    """The options without the folders of this machine."""
    return [f"PATH_TO/{Path(word).name}" if "/" in word else word for word in words]


def adapter_table() -> str:
    """One row for each released adapter."""
    header = ["adapter", "images", "base", "epsilon", "earlier files in it", "runs before, not in it"]
    rows = [[*header, *CLASSIFIERS.values(), "kB"]]
    for name, measured in folders().items():
        folder = ADAPTERS / name
        document = certificate.read(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cells = [
            f"[{name}]({name}/README.md)",
            measured["images"],
            f"`{document['base']['name']}`",
            f"{document['guarantee']['epsilon']:g}",
            f"{len(document['other_releases']) or 'none'}",
            f"{document['tuning']['runs']}",
            *(accuracy(measured[classifier]) for classifier in CLASSIFIERS),
            f"{size / 1e3:,.0f}",
        ]
        rows.append(cells)
    return table(rows)


def class_table() -> str:
    """One row for each released adapter: how many of the real images of each class the CNN tells."""
    measured = folders()
    classes = list(next(iter(measured.values()))["cnn"]["per_class_accuracy"])
    rows = [["small CNN, percent right", *classes]]
    for name, entry in measured.items():
        shares = entry["cnn"]["per_class_accuracy"]
        rows.append([name, *(f"{100 * shares[label]:.0f}" for label in classes)])
    return table(rows)


def accuracy(found: dict) -> str:
    """Mean in percent, and the spread over seeds of what draws anything."""
    spread = found["accuracy_stddev"]
    return f"{100 * found['accuracy']:.1f}" + (f" ± {100 * spread:.1f} %" if spread is not None else " %")


def joint_epsilon(names: Sequence[str | Path]) -> tuple[float, float]:
    """What all these releases, here or in other folders, cost one record together, by composition: (epsilon, delta)."""
    promises = [promise_of(certificate.read(ADAPTERS / name)) for name in names]
    delta, mechanism = max(promise.delta for promise in promises), promises[0].mechanism
    first, *others = read_prior([ADAPTERS / name for name in names], mechanism)
    event = composed_event(first.mechanism, first.runs, others)
    return round_up(accounting.epsilon(event, delta, mechanism.neighboring_relation)), delta


def joint_table() -> str:
    """One row for each data set: what all files released from it cost together."""
    rows, released = [["images", "released", "epsilon of all together", "delta"]], folders()
    for images in dict.fromkeys(measured["images"] for measured in released.values()):
        names = [name for name, measured in released.items() if measured["images"] == images]
        epsilon, delta = joint_epsilon(names)
        rows.append([images, ", ".join(names), f"{epsilon:g}", f"{delta:g}"])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown, the first of them the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def rendered(page: str) -> str:
    """The page with fresh tables between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n\n".join([adapter_table(), joint_table(), class_table()])
    return f"{before}{BEGIN}{tables}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    measuring = commands.add_parser("measure")
    measuring.add_argument("name")
    measuring.add_argument("--images", required=True, help="as the table calls them")
    joining = commands.add_parser("together")
    joining.add_argument("folders", nargs="+", type=Path)
    given, options = parser.parse_known_args()
    if given.command == "together":
        print("epsilon {:g}, delta {:g}".format(*joint_epsilon([folder.resolve() for folder in given.folders])))
        raise SystemExit
    if given.command == "measure":
        measure(given.name, given.images, options)
    PAGE.write_text(rendered(PAGE.read_text()))
