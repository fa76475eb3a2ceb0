"""The tables of adapters/README.md, from the certificates of the released adapters and adapters/measured.json.

    python docs/scripts/gallery.py        # writes them between the marks of the page

measured.json holds, by folder, what no certificate says: the data set's name, the accuracy of a classifier that trained
on synthetic images, and the command that measured it.
"""

import json
from pathlib import Path

from dp_peft_diffusion.privacy import accounting, certificate
from dp_peft_diffusion.privacy.composition import promise_of, read_prior
from dp_peft_diffusion.privacy.promise import composed_event
from dp_peft_diffusion.privacy.ranges import round_up

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
PAGE, MEASURED = ADAPTERS / "README.md", ADAPTERS / "measured.json"
BEGIN, END = "<!-- begin: docs/scripts/gallery.py -->\n", "<!-- end -->\n"


def folders() -> dict[str, dict]:
    """Released adapter -> what was measured of it, in the order of measured.json."""
    return json.loads(MEASURED.read_text())


def adapter_table() -> str:
    """One row for each released adapter."""
    rows = [
        "| adapter | images | base | epsilon | earlier files in it | runs before, not in it | accuracy | kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in folders().items():
        folder = ADAPTERS / name
        document = certificate.read(folder)
        earlier = len(document["other_releases"])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cells = [
            f"[{name}]({name}/README.md)",
            measured["images"],
            f"`{document['base']['name']}`",
            f"{document['guarantee']['epsilon']:g}",
            f"{earlier or 'none'}",
            f"{document['tuning']['runs']}",
            measured["accuracy"],
            f"{size / 1e3:,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def joint_epsilon(names: list[str]) -> tuple[float, float]:
    """What all these releases cost one record together: (epsilon, delta), by composition of their mechanisms."""
    promises = [promise_of(certificate.read(ADAPTERS / name)) for name in names]
    delta, mechanism = max(promise.delta for promise in promises), promises[0].mechanism
    first, *others = read_prior([ADAPTERS / name for name in names], mechanism)
    event = composed_event(first.mechanism, first.runs, others)
    return round_up(accounting.epsilon(event, delta, mechanism.neighboring_relation)), delta


def joint_table() -> str:
    """One row for each data set: what all files released from it cost together."""
    rows = ["| images | released | epsilon of all together | delta |", "|---|---|---|---|"]
    released = folders()
    for images in dict.fromkeys(measured["images"] for measured in released.values()):
        names = [name for name, measured in released.items() if measured["images"] == images]
        epsilon, delta = joint_epsilon(names)
        rows.append(f"| {images} | {', '.join(names)} | {epsilon:g} | {delta:g} |")
    return "\n".join(rows)


def rendered(page: str) -> str:
    """The page with fresh tables between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{adapter_table()}\n\n{joint_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
