import base64
import copy
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import look_at
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_base_folder

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.privacy.certificate import CANNOT_PROVE, certificate
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Release, make_promise
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, Adapter, Data, Privacy, Recipe, Sample
from dp_peft_diffusion.sharing import pictures
from dp_peft_diffusion.sharing.card import facts
from dp_peft_diffusion.sharing.charts import BOTTOM, LEFT, RIGHT, TOP, profile_chart, spending_chart, ticks
from dp_peft_diffusion.sharing.report import of_100, render_report, right_guesses

VOID = {"meta", "img", "br", "circle", "line", "path", "rect"}
HOSTILE = ("<script>alert(1)</script>", "</style><img src=x onerror=alert(2)>", '" onload="alert(3)', "{{ 7 * 7 }}")
LONGEST = "W" * 200


class Page(HTMLParser):
    """A parsed page: its tags with attributes, its text, and whether all that opens is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.styles, self.words = [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.words).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write_folder(
    folder, steps=(0, 2, 4), resolution=8, epsilons=(0.4, 0.6, 0.8, 0.9), columns=10, count=20, channels=1
):
    """What a run has left before its certificate is made: weights of no use here, grids of noise, metrics."""
    (folder / "samples").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml"):
        (folder / name).write_bytes(b"")
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        images = torch.randint(256, (count, channels, resolution, resolution), generator=noise, dtype=torch.uint8)
        image_grid(images, columns).save(folder / "samples" / f"step-{step:04d}.png")
    lines = [json.dumps({"step": step, "epsilon": value}) for step, value in enumerate(epsilons, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def certified(folder, *, noise=4.0, unpaid_runs=None, prior=(), public=None, resolution=8, **mechanism):
    """A certificate of full batches, which are priced in no time."""
    known = {"num_examples": 1437, "neighboring_relation": "zero_out", **mechanism}
    run = DPMechanism(sampling_prob=1.0, steps=4, expected_batch_size=1437, noise_multiplier=noise, **known)
    promise = make_promise(run, delta=3e-6, epsilon=None, unpaid_runs=unpaid_runs, prior=prior)
    return certificate(
        promise,
        clipping="automatic",
        gamma=0.00068,
        noise_multiplicity=3,
        public_inputs={
            "resolution": resolution,
            "image_channels": 1,
            "class_names": ["left", "right"],
            **(public or {}),
        },
        base={"name": "./tiny-base", "revision": "0123abcd", "sha256": "a" * 64},
        folder=folder,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny_base_folder(tmp_path_factory.mktemp("report") / "tiny-base")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, certificate and recipe of a run."""
    folder = write_folder(tmp_path_factory.mktemp("run") / "folder")
    recipe = Recipe(
        data=Data(dataset_name=PATH_TO_IMAGES, class_names=("left", "right")),
        adapter=Adapter(rank=2, target_modules=("to_q",)),
        privacy=Privacy(epsilon=3.0, gamma=0.01),
    )
    return folder, certified(folder), recipe


@pytest.fixture(scope="module")
def page(run, base):
    return Page(render_report(*run, base))


def altered(document, **sections):
    """A certificate with other values in some of its sections."""
    document = copy.deepcopy(document)
    for name, value in sections.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    return document


def test_every_number_of_the_promise_is_on_the_page(run, page):
    _, document, _ = run
    guarantee, mechanism, accounting = document["guarantee"], document["mechanism"], document["accounting"]
    assert document["statement"] in page.text
    for number in (
        f"epsilon {guarantee['epsilon']:g}",
        "3e-06 delta",
        f"{math.exp(guarantee['epsilon']):.4g} times as likely",
        f"mu {guarantee['mu_gdp']:g}, down to delta 1e-10",
        f"epsilon {accounting['epsilon_priced']:g} by privacy loss distributions (dp-accounting",
        f"{accounting['epsilon_rdp']:g} by the looser RDP",
        "gamma of clipping 0.00068",
        "noise draws of a record 3,",
        f"{mechanism['noise_multiplier']:g}",
        "0123abcd",
        "a" * 64,
        "1,437 images, their number being public",
        *(f"{100 * most:.4g} %" for most in guarantee["max_tpr_at_fpr"].values()),
        *(f"{name} {' '.join(value.split())}" for name, value in facts(document, run[2])),
    ):
        assert number in page.text, number
    for words in (*document["covers"], *document["excludes"], *document["assumptions"], *CANNOT_PROVE):
        assert words in page.text
    assert "lora of rank 2 on to_q" in page.text
    assert "so far as nobody can tell the noise of its cipher from true noise" in page.text
    assert "no estimate" not in page.text and "every attack" not in page.text
    assert "Everything here but the row “made with” comes from" in page.text
    assert "None listed." in page.text and "Undeclared:" in page.text and "Read this first" not in page.text


@pytest.mark.parametrize(("share", "dots"), [(0.01979, 2), (0.07, 7), (0.335, 34), (1.0, 100), (0.01, 1)])
def test_the_picture_shows_the_limit_rounded_up_and_never_one_more(run, base, share, dots):
    folder, document, recipe = run
    odds = {"max_tpr_at_fpr": {**document["guarantee"]["max_tpr_at_fpr"], "0.01": share}}
    text = render_report(folder, altered(document, guarantee=odds), recipe, base)
    mistaken, used = re.findall(r'<svg class="icons \w+".*?</svg>', text, re.DOTALL)
    assert (mistaken.count("<circle"), mistaken.count('class="found"')) == (100, 1)
    assert (used.count("<circle"), used.count('class="found"')) == (100, dots)
    assert f"<strong>{dots}</strong>" in text and f"<b>{dots} of 100</b>" in text
    assert f"{dots} of 100 dots are filled" in Page(used).text


@given(st.integers(0, 10_000))
def test_a_share_of_four_digits_is_rounded_up_exactly(ten_thousandths):
    assert of_100(ten_thousandths / 10_000) == -(-ten_thousandths // 100)


@pytest.mark.parametrize("mu", [0.05, 0.269, 1.0, 2.07, 6.0])
def test_right_guesses_are_those_of_the_best_guesser_between_two_gaussians(mu):
    x = np.linspace(-12, 12, 200_001)
    one, other = (np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (-mu / 2, mu / 2))
    best = 100 * np.trapezoid(np.maximum(one, other), x) / 2
    assert right_guesses(mu) == math.ceil(best)


def test_bars_are_as_long_as_the_odds(run, page):
    odds = run[1]["guarantee"]["max_tpr_at_fpr"]
    widths = [(float(rect["width"]), rect["class"]) for rect in page.all("rect")]
    assert [width for width, kind in widths if kind == "blind"] == [100 * float(rate) for rate in odds]
    assert [width for width, kind in widths if kind == "bound"] == pytest.approx([100 * most for most in odds.values()])
    assert [width for width, kind in widths if kind == "track"] == [100, 100, 100]


def heights(path, steps, top):
    """Epsilon on a path of stairs, at the end of each step."""
    at, level, found = 0.0, 0.0, {}
    for command, value in re.findall(r"([HV])([\d.]+)", path):
        if command == "V":
            level = (BOTTOM - float(value)) / (BOTTOM - TOP) * top
        else:
            until = (float(value) - LEFT) / (RIGHT - LEFT) * steps
            found |= {step: level for step in range(math.ceil(at + 0.5), math.floor(until + 0.5) + 1)}
            at = until
    return [found[step] for step in range(1, steps + 1)]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30), st.integers(1, 5))
def test_the_stairs_are_the_epsilon_of_every_step(raised, repeats):
    values = [value for value in np.cumsum(raised) for _ in range(repeats)]
    spent = list(enumerate(values, 1))
    drawn = spending_chart(spent, values[-1])
    assert heights(drawn.path, len(spent), values[-1]) == pytest.approx(values, abs=values[-1] / 500)
    assert drawn.promise == (RIGHT, TOP)


def test_many_steps_make_no_long_picture():
    spent = [(step, 10 * math.ceil(20 * step / 60_000) / 20) for step in range(1, 60_001)]
    drawn = spending_chart(spent, 10.0)
    assert len(drawn.path) < 600 and drawn.path.endswith(f"H{RIGHT:.1f}")
    assert [label for _, label in drawn.x_ticks] == ["0", "20,000", "40,000", "60,000"]


@pytest.mark.parametrize("delta", [1e-3, 3e-6, 1e-12])
def test_the_profile_is_drawn_where_its_axes_say(run, delta):
    points = run[1]["guarantee"]["profile"]
    drawn = profile_chart(points, 1.5, delta)
    top, last = max(1.5, *(point["epsilon"] for point in points)), min(1e-10, delta)
    for (x, y), point in zip([*drawn.dots, drawn.promise], [*points, {"epsilon": 1.5, "delta": delta}], strict=True):
        share = math.log10(point["delta"] / 1e-3) / math.log10(last / 1e-3)
        assert (x - LEFT) / (RIGHT - LEFT) == pytest.approx(share, abs=1e-3)
        assert (BOTTOM - y) / (BOTTOM - TOP) * top == pytest.approx(point["epsilon"], abs=top / 500)
    assert drawn.x_ticks[0] == (LEFT, "10⁻³") and drawn.x_ticks[2][1] == "10⁻⁵"
    assert len(drawn.x_ticks) == (10 if delta < 1e-11 else 8)


@given(st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(top):
    found = ticks(top)
    assert found[0] == 0 and found[-1] <= top * (1 + 1e-9) and 2 < len(found) <= 6
    assert f"{found[1]:e}"[0] in "125"


def test_the_page_carries_all_it_shows_and_runs_nothing(page):
    assert not page.open
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "use"}
    sources = [attributes[name] for _, attributes in page.tags for name in ("src", "srcset") if name in attributes]
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert {link["href"].split("/")[2] for link in page.all("a")} == {"doi.org", "arxiv.org"}
    assert "url(" not in page.styles[0] and "@import" not in page.styles[0]
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_picture_has_words(page):
    assert all(image["alt"] for image in page.all("img"))
    drawings = page.all("svg")
    assert len(drawings) == 7 and all(drawing["role"] == "img" for drawing in drawings)
    assert len(page.all("title")) == 1 + len(drawings)


@pytest.mark.parametrize("place", ["class_names", "prompts", "group_column"])
def test_what_somebody_typed_is_text_and_nothing_else(run, base, place):
    folder, document, recipe = run
    value = HOSTILE if place != "group_column" else HOSTILE[0]
    public = {place: list(value) if isinstance(value, tuple) else value}
    if place == "prompts":
        recipe = dataclasses.replace(recipe, sample=Sample(prompts=value))
    else:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **{place: value}))
    grouped = {"max_examples_per_group": 4} if place == "group_column" else {}
    text = render_report(folder, altered(document, public_inputs=public, mechanism=grouped), recipe, base)
    hostile = Page(text)
    for words in (value,) if isinstance(value, str) else value:
        assert hostile.text.count(words) == 2, "among the public inputs, and where it is spoken of"
    assert "script" not in {tag for tag, _ in hostile.tags} and "alert" not in hostile.styles[0]
    assert not [name for _, attributes in hostile.tags for name in attributes if name.startswith("on")]
    assert len(hostile.all("img")) == 3 and not hostile.open


def test_what_cannot_be_seen_turns_no_text_around(run, base):
    folder, document, recipe = run
    turned = {"class_names": ["abc\u202etxt", "x\u2066y"], "gamma_source": "a\u202bb"}
    page = render_report(folder, altered(document, public_inputs=turned), recipe, base)
    assert not {"\u202e", "\u2066", "\u202b"} & set(page) and "abc txt, x y" in page


def test_of_ten_thousand_classes_the_first_are_listed(run, base):
    folder, document, recipe = run
    names = [f"class-{k}" for k in range(10_000)]
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, class_names=tuple(names)))
    text = Page(render_report(folder, altered(document, public_inputs={"class_names": names}), recipe, base)).text
    assert "class-19 and 9,980 more" in text and "class-20" not in text
    assert "the classes are: " + ", ".join(names[:10]) + "." in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_source": "given"}, "Do not share this"),
        ({"key_after_export": "escrowed"}, "whoever holds it can take the noise off"),
        ({"gradient_check": "skipped"}, "NOT CHECKED before training"),
        ({"tuning": {"runs": 12, "priced": "no"}}, "12 earlier runs on these records, NOT paid for"),
    ],
)
def test_what_weakens_the_promise_stands_before_its_numbers(run, base, changes, words):
    folder, document, recipe = run
    text = Page(render_report(folder, {**document, **changes}, recipe, base)).text
    first = text.index("Read this first")
    assert first < text.index(words) < text.index("The promise in full")


def test_runs_that_are_paid_for_are_no_warning(run, base):
    folder, document, recipe = run
    text = Page(render_report(folder, {**document, "tuning": {"runs": 12, "priced": "composition"}}, recipe, base)).text
    assert "12 runs with this mechanism in all, every one of them paid for" in text and "Read this first" not in text


def test_a_private_number_of_images_stays_private(run, base):
    folder, _, recipe = run
    document = certified(folder, num_examples=None, neighboring_relation="add_or_remove_one")
    text = Page(render_report(folder, document, recipe, base)).text
    assert "private the number of images" in text and "The number of records is not public." in text
    assert "num examples" not in text and "replaced by another" not in text
    assert "With one image or without it" in text and "a coin decides between one image and none;" in text


def test_under_replace_one_the_others_are_those_that_were_replaced(run, base):
    folder, _, recipe = run
    document = certified(folder, neighboring_relation="replace_one", noise=8.0)
    text = Page(render_report(folder, document, recipe, base)).text
    assert "1 of 100 images that were replaced by another" in text and "not used" not in text
    assert "With one image or another in its place" in text and "a coin decides between one image and another;" in text
    assert "looser RDP" not in text


def test_a_promise_for_groups_speaks_of_groups(run, base):
    folder, _, recipe = run
    document = certified(folder, max_examples_per_group=4, noise=16.0, public={"group_column": "patient"})
    document["mechanism"]["truncated_batch_size"] = 99
    text = Page(render_report(folder, document, recipe, base)).text
    assert "records of an update at most 99" in text
    assert "What could somebody learn about one group?" in text and "A dot is one group." in text
    assert "by the column patient. At most 4 of them are used." in text
    assert f"epsilon for one image of a group {document['guarantee']['epsilon_per_image']:g}" in text


def test_earlier_releases_are_told_one_by_one(run, base):
    folder, _, recipe = run
    before = DPMechanism(sampling_prob=1.0, steps=7, expected_batch_size=1437, num_examples=1437, noise_multiplier=9.0)
    release = Release(mechanism=before, runs=2, source="certificate " + "b" * 64)
    text = Page(render_report(folder, certified(folder, prior=(release,)), recipe, base)).text
    assert "2 times 7 updates noise multiplier 9, sampling probability 1, certificate " + "b" * 64 in text


def test_a_whole_model_without_labels_and_metrics_has_a_page(tmp_path, base):
    folder = write_folder(tmp_path / "run", steps=(4,), epsilons=(None,) * 4)
    recipe = Recipe(data=Data(label_column=None), adapter=Adapter(kind="full"))
    without = Page(render_report(folder, certified(folder, public={"class_names": None}), recipe, base))
    assert "whole model" in without.text and "Column by column" not in without.text
    assert "Epsilon step by step" not in without.text and "class names" not in without.text
    assert "dp-peft train --config FOLDER/recipe.yaml Everything" in without.text, "builtin images need no place"
    (folder / "metrics.jsonl").unlink()
    assert "Epsilon step by step" not in render_report(folder, certified(folder), recipe, base)


def test_commands_say_what_the_folder_does_not_hold(run, base):
    folder, document, recipe = run
    model = dataclasses.replace(recipe.model, pretrained_model_name_or_path="./tiny-base")
    data = dataclasses.replace(recipe.data, caption_column="text", class_names=None)
    captioned = Page(render_report(folder, document, dataclasses.replace(recipe, model=model, data=data), base)).text
    assert "--num_images 64 --prompt 'a photo of ...' --base PATH/tiny-base" in captioned
    places = f"--dataset_name {PATH_TO_IMAGES} --pretrained_model_name_or_path PATH/tiny-base"
    assert f"dp-peft train --config FOLDER/recipe.yaml {places}" in captioned


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_strip_runs_from_before_to_after_training_in_order(tmp_path):
    folder = write_folder(tmp_path / "run", steps=(0, 10, 20, 500, 1000, 9000, 20000, 100000)) / "samples"
    strip = pictures.strip(folder, 8)
    assert [step for step, _ in strip] == [0, 20, 1000, 9000, 100000]
    assert [decoded(uri).size for _, uri in strip] == 4 * [(91, 10)] + [(91, 19)]


@pytest.mark.parametrize(("columns", "channels"), [(10, 1), (3, 3), (25, 1)])
def test_a_picture_has_the_very_pixels_of_the_first_images(tmp_path, columns, channels):
    images = torch.randint(256, (40, channels, 8, 8), dtype=torch.uint8)
    image_grid(images, columns).save(tmp_path / "step-0004.png")
    found = np.asarray(decoded(pictures.picture(tmp_path / "step-0004.png", 8, 2)))
    shown = min(columns, pictures.COLUMNS)
    rows = min(2, -(-40 // columns))
    assert found.shape[:2] == (9 * rows + 1, 9 * shown + 1)
    for index in (0, shown - 1, columns):
        top, left = 1 + 9 * (index // columns), 1 + 9 * (index % columns)
        cell = found[top : top + 8, left : left + 8].reshape(8, 8, channels)
        assert (cell == images[index].permute(1, 2, 0).numpy()).all()


def test_large_images_of_noise_still_make_a_small_page(tmp_path, base):
    folder = write_folder(tmp_path / "run", steps=(0, 4), resolution=96, columns=10, count=40, channels=3)
    page = render_report(folder, certified(folder, resolution=96), Recipe(data=Data(class_names=None)), base)
    before, after = (image["src"] for image in Page(page).all("img"))
    assert decoded(before).size == (pictures.WIDEST, 73) and decoded(after).size == (pictures.WIDEST, 288)
    assert after.startswith("data:image/jpeg") and len(after) + 4 * len(before) < 1_400_000
    assert 'class="strip"' in page, "what was made smaller is drawn smoothly"


def test_colours_can_be_told_apart_by_light_and_in_the_dark(page):
    for colours in re.findall(r":root \{(.*?)\}", page.styles[0], re.DOTALL):
        colour = dict(re.findall(r"--(\w+): #(\w{6})", colours))
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "calm", "found"):
                assert contrast(colour[ink], colour[ground]) >= 4.5, f"{ink} on {ground}"
        assert contrast(colour["ink"], colour["warned"]) >= 4.5
        for mark in ("found", "soft"):
            assert contrast(colour[mark], colour["rule"]) >= 3, f"{mark} on rule"


def contrast(one, other):
    """Of two colours, as WCAG 2 defines it."""
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="module")
def fullest(run, base):
    """A page with everything at its longest."""
    folder, _, recipe = run
    before = DPMechanism(sampling_prob=1.0, steps=7, expected_batch_size=1437, num_examples=1437, noise_multiplier=90.0)
    document = certified(
        folder,
        noise=1.2,
        unpaid_runs=12,
        prior=(Release(mechanism=before, runs=2, source="certificate " + "b" * 64),),
        public={"class_names": [LONGEST] * 2, "gamma_source": LONGEST},
    )
    document = altered(document, key_after_export="escrowed", gradient_check="skipped", base={"name": LONGEST})
    data = dataclasses.replace(recipe.data, class_names=(LONGEST,) * 2)
    return render_report(folder, document, dataclasses.replace(recipe, data=data), base)


@pytest.mark.parametrize(("width", "height", "scale"), [(1280, 5600, 1), (390, 844, 2)], ids=["desktop", "phone"])
def test_in_a_browser_the_page_fits_shows_its_pictures_and_asks_for_nothing(fullest, tmp_path, width, height, scale):
    seen = look_at(fullest, tmp_path, width, height, scale)
    assert seen.width == width, "nobody scrolls sideways"
    assert (seen.fetched, seen.console, seen.broken) == ([], [], 0)
    assert len(seen.pictures) == 3 + 7
    assert all(0 <= left < right <= width and top < bottom for left, top, right, bottom in seen.pictures)
    assert all(bottom <= 844 for _, _, _, bottom in seen.icons), "the first screen shows what the promise means"
    visible = [box for box in seen.pictures if box[3] <= height]
    assert len(visible) == (10 if width == 1280 else 2) and all(seen.shows(box) for box in visible)


def test_the_browser_tells_a_page_that_is_too_wide_calls_out_or_stays_blank(tmp_path):
    wide = (
        '<div style="width: 600px">.</div><svg width="50" height="50"></svg><script>console.error("planted")</script>'
    )
    seen = look_at(f'<!doctype html><img src="http://report.example/x.png">{wide}', tmp_path, 390, 844)
    assert seen.width > 390 and seen.broken == 1 and any("planted" in line for line in seen.console)
    assert seen.fetched == ["http://report.example/x.png"]
    assert not seen.shows(seen.pictures[-1])
