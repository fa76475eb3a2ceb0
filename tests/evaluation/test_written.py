"""What an evaluation writes: tables, plots and page say what was found, and names of classes are mere text."""

import io
import json
import re

import numpy as np
import pytest
from browser import look_at
from PIL import Image
from stripes import make_stripes

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.evaluation import measurements
from dp_peft_diffusion.evaluation.measurements import Images, Wanted, measure, open_nets
from dp_peft_diffusion.evaluation.page import CAPTIONS, render_page
from dp_peft_diffusion.evaluation.plots import plots
from dp_peft_diffusion.evaluation.summary import STAMP, Table, accuracy, tables
from dp_peft_diffusion.evaluation.tuning import Setting, tune
from dp_peft_diffusion.evaluation.written import markdown, write_evaluation

NAMES = ("<script>alert(1)</script>", "$\\frac$ | \x1b[2J", "名 _dogs_")
PRIVATE_CLASSIFIER = {"release": {"epsilon": 2.0, "statement": "SPENT."}, "joint_epsilon": 2.83}
PRIVATE_CLASSIFIER |= {"earlier_classifiers": 0, "not_counted": []}


def wanted(**changes):
    looks = ("learning_curve", "tuning", "reference", "memorization", "membership", "private_classifier")
    nothing = dict.fromkeys((*looks, "flip", "warp"), False)
    options = {"classifiers": ("logistic_regression", "cnn"), "seed": 0, "num_seeds": 1, "ensemble": 1, "epochs": 1}
    options |= {"evaluation_resolution": None, "features": ()}
    return Wanted(**{**nothing, **options, **changes})


def found(public=False, names=NAMES, **changes):
    asked = wanted(**changes)
    synthetic, images = make_stripes(60, 0), Images(names, make_stripes(60, 1), None)
    return measure(asked, open_nets(asked, "cpu"), synthetic, images, declared_public=public, device="cpu")


@pytest.fixture(scope="module")
def result():
    """An evaluation of private images under names that somebody typed."""
    with pytest.MonkeyPatch.context() as patch:
        settings = [Setting(1, 4, rate) for rate in (1e-4, 1e-2)]
        patch.setattr(measurements, "tune", lambda *images, **how: tune(*images, settings=settings, **how))
        made = found(learning_curve=True, tuning=True, features=("handwriting",))
    return made | {"private_classifier": made["cnn"] | PRIVATE_CLASSIFIER}


def membership(**changes):
    interval = {"value": 0.5, "low": 0.45, "high": 0.55}
    numbers = {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95, "auc_of_base": interval, "auc_bound": 0.7}
    return numbers | {"message": "FINDING: do not share."} | changes


def test_a_part_of_the_result_alone_says_that_it_is_not_covered_and_what_was_released_says_no_such_thing(result):
    for part in (result["cnn"], result["tuning"], *result["learning_curve"], *result["fidelity"]):
        assert part["covered_by_guarantee"] is False
    assert "covered_by_guarantee" not in result["private_classifier"]["release"]
    public = found(public=True, names=("a", "b", "c"))
    assert "guarantee" not in json.dumps(public) and STAMP not in markdown(public, tables(public))


def test_every_table_of_private_images_is_stamped_wherever_it_is_shown(result):
    made = tables(result | {"membership": membership()})
    assert len(made) == 6 and all(table.note.startswith(STAMP) for table in made)
    assert all(STAMP in table.text and STAMP in table.markdown for table in made)
    assert render_page(result, made, {}).count(STAMP) == len(made)


def test_a_kernel_distance_without_a_deviation_has_no_plus_minus(result):
    (found,) = result["fidelity"]
    for deviation, shown in ((None, "(no ±: each subset is all there is)"), (0.25, "± 0.2")):
        fidelity = found | {"kernel_distance": 1.5, "kernel_distance_std": deviation}
        rows = dict(next(t.rows for t in tables(result | {"fidelity": [fidelity]}) if t.title.startswith("Likeness")))
        assert rows["handwriting kernel distance"] == f"1.5 {shown}"
    assert found["kernel_distance_std"] is None, "60 images of each kind, 60 in a subset"


def test_the_row_of_the_private_classifier_says_that_its_epsilon_comes_in_addition(result):
    table, *_ = tables(result)
    assert "epsilon 2 in addition (together 2.83)" in table.rows[-1][1] and table.note.endswith("SPENT.")
    above = result | {"private_classifier": result["private_classifier"] | {"joint_epsilon": None}}
    assert "(together above 100)" in tables(above)[0].rows[-1][1]
    more = {"earlier_classifiers": 2, "not_counted": ["NOT counted: 3 earlier run(s)."]}
    table, *_ = tables(result | {"private_classifier": result["private_classifier"] | more})
    assert "(together 2.83, with 2 earlier classifier(s))" in table.rows[-1][1]
    assert table.note.endswith("SPENT. NOT counted: 3 earlier run(s).")


def test_a_finding_stands_under_its_table_and_without_a_promise_there_is_no_bound(result):
    *_, table = tables(result | {"membership": membership()})
    assert table.note == f"{STAMP} FINDING: do not share." and table.rows[1][1] == "0.7"
    *_, table = tables(result | {"membership": membership(auc_bound=None, auc_of_base=None)})
    assert table.rows[1][1] == "none: no promise" and len(table.rows) == 2


def test_an_accuracy_says_what_it_is_uncertain_of():
    one = {
        "training": {"epochs": 1},
        "accuracy": 0.5,
        "accuracies": [0.5],
        "accuracy_stddev": None,
        "test_standard_error": 0.01,
    }
    assert accuracy(one) == "50.0 % (one seed; standard error of the test 1.0)"
    assert accuracy(one | {"training": None}) == "50.0 % (standard error of the test 1.0)"
    assert accuracy(one | {"accuracies": [0.4, 0.6], "accuracy_stddev": 0.02}) == "50.0 ± 2.0 % over 2 seeds"


def test_each_class_stands_beside_its_own_accuracy(result):
    table = tables(result)[1]
    shares = result["cnn"]["per_class_accuracy"]
    assert [row[0] for row in table.rows] == list(NAMES)
    assert [row[2] for row in table.rows] == [f"{100 * shares[label]:.1f} %" for label in "012"]
    few = result | {"cnn": result["cnn"] | {"per_class_accuracy": {"1": 1.0}}}
    few["logistic_regression"] = few["cnn"]
    assert [row[0] for row in tables(few)[1].rows] == [NAMES[1]], "of the others no real image was there"


def test_names_of_classes_are_text_in_page_and_markdown(result):
    made = tables(result)
    page, text = render_page(result, made, plots(result)), markdown(result, made)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<script" not in text and "\x1b" not in text and r"\$\\frac\$ \|" in text and r"\_dogs\_" in text
    for table in made:
        lines = [line for line in table.markdown.splitlines() if line.startswith("|")]
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(lines) == len(table.rows) + 2 and columns == {len(table.header) + 1}


def test_columns_of_a_table_are_aligned():
    table = Table("Title", ("a", "bb"), (("long cell", "1"), ("x", "2")), "Note.")
    assert table.text == "Title\n  a          bb\n  long cell  1\n  x          2\n  Note.\n"


def test_the_plots_are_pictures_that_say_whether_the_guarantee_covers_them(result):
    private, public = plots(result), plots(result | {"declared_public": True})
    assert set(private) == set(CAPTIONS) == set(public)
    for name in CAPTIONS:
        seen, plain = (np.asarray(Image.open(io.BytesIO(made[name])).convert("RGB")) for made in (private, public))
        assert seen.shape == plain.shape
        stamp = [194, 65, 12]  # the colour of the stamp
        assert (seen == stamp).all(axis=2).any() and not (plain == stamp).all(axis=2).any()


def test_what_an_earlier_evaluation_drew_does_not_stay_beside_a_later_one(result, tmp_path):
    folder = tmp_path / "found.private"
    write_evaluation(folder, result, tables(result))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".html", ".png"}
    later = {name: part for name, part in result.items() if name not in ("tuning", "learning_curve")}
    write_evaluation(folder, later, tables(later))
    assert sorted(path.name for path in folder.glob("*.png")) == ["classes.png"]


def test_private_numbers_go_into_no_folder_that_could_be_shared(result, tmp_path):
    with pytest.raises(PrivacyError, match="no private folder"):
        write_evaluation(tmp_path / "found", result, tables(result))
    assert not any(tmp_path.iterdir())


def test_a_browser_shows_the_page_whole_and_loads_nothing(result, tmp_path):
    page = render_page(result, tables(result), plots(result))
    seen = look_at(page, tmp_path, 400, 3000)
    assert seen.width == 400 and (seen.fetched, seen.console, seen.broken) == ([], [], 0)
    assert len(seen.pictures) == 3 and "<img" in page
