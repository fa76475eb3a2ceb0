import ast
import copy
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict
from tiny_bases import BASES

from dp_peft_diffusion.diffusion.adapters import inject_adapter, to_peft, whole_model
from dp_peft_diffusion.diffusion.base_model import load_base, save_base
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import make_promise
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, Adapter, Data, Model, Recipe, Sample
from dp_peft_diffusion.sharing import card as cards
from dp_peft_diffusion.sharing.card import render_card

README = Path(__file__).parents[2] / "README.md"
CLASSES = ("left", "right")
# family -> what its adapter is. `class_rows`: private classes in spare rows.
ADAPTERS = {
    "pixel": {},
    "pixel_classes": {"class_rows": (10, 11)},
    "edm": {"class_rows": (0, 1)},
    "latent": {"class_rows": (4, 5)},
    "stable_diffusion_1": {},
    "stable_diffusion_xl": {"kind": "ia3"},
}


@pytest.fixture(scope="module")
def promise():
    mechanism = DPMechanism(sampling_prob=0.5, steps=4, expected_batch_size=10, num_examples=20)
    return make_promise(mechanism, delta=1e-5, epsilon=3.0)


def recipe_of(base, **adapter):
    labelled = base.text is not None or "class_rows" in adapter
    return Recipe(
        model=Model(pretrained_model_name_or_path=f"./{Path(base.name).name}"),
        data=Data(dataset_name=PATH_TO_IMAGES, class_names=CLASSES if labelled else None),
        adapter=Adapter(rank=2, **({"target_modules": ("to_q",)} | adapter)),
        sample=Sample(guidance_scale=2.0, num_inference_steps=2),
    )


def certified(promise, base, folder):
    for name in ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml"):
        if not (folder / name).exists() and not (folder / "unet").exists():
            (folder / name).write_text("{}")
    if (folder / "unet").exists():
        (folder / "recipe.yaml").write_text("{}")
    return certificate.certificate(
        promise,
        clipping="flat",
        gamma=None,
        noise_multiplicity=1,
        public_inputs={"class_names": list(CLASSES)},
        base={"name": f"./{Path(base.name).name}", "revision": base.revision, "sha256": base.sha256},
        folder=folder,
    )


@pytest.fixture(scope="module", params=[*ADAPTERS, "whole"])
def carded(request, promise, tmp_path_factory):
    """(base, folder of its adapter, recipe, card) of one family, or of a whole model."""
    place, whole = tmp_path_factory.mktemp("card"), request.param == "whole"
    family = "pixel_classes" if whole else request.param
    base, folder = load_base(str(BASES[family](place / family))), place / "adapter"
    options = ADAPTERS[family] | ({"kind": "full", "target_modules": None} if whole else {})
    recipe = recipe_of(base, **options)
    adapter = inject_adapter(base, recipe.adapter, len(recipe.adapter.class_rows or ()))
    for parameter in adapter.trainable.values():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    if whole:
        save_base(folder, whole_model(base, adapter), base.scheduler, base.layout)
    else:
        stock = to_peft(base, adapter)
        stock.save_pretrained(folder, save_embedding_layers=False)
        if family == "stable_diffusion_1":
            layers = {name.removeprefix("base_model.model."): p for name, p in get_peft_model_state_dict(stock).items()}
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return base, folder, recipe, render_card(certified(promise, base, folder), recipe, base, "step-0004.png")


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.S | re.M)


def run(snippet, base, folder):
    """The names that a snippet leaves, once its places are those of a test."""
    code = snippet.replace(repr(f"./{Path(base.name).name}"), repr(base.name)).replace('"FOLDER"', repr(str(folder)))
    found: dict = {}
    exec(re.sub(r"(pipe\('.*?')\)", r"\1, num_inference_steps=2)", code), found)
    return found


def test_the_stock_snippet_of_a_card_gives_the_adapted_model_and_images(carded):
    base, folder, recipe, card = carded
    found = run(snippets(card)[0], base, folder)
    net = found["pipe"].unet if base.text else found["unet"]
    before = dict(base.unet.named_parameters())
    moved = [name for name, p in net.named_parameters() if name not in before or not torch.equal(p, before[name])]
    assert any("to_q" in name for name in moved)
    if base.text is not None:
        assert found["image"].size == (16, 16)
    elif not base.is_latent:
        n = 2 if recipe.data.class_names else 8
        assert found["images"].shape == (n, base.image_channels, 16, 16) and found["images"].isfinite().all()
        stochastic = "sigma_data" not in base.scheduler.config and recipe.sample.scheduler in (None, "fidelity")
        assert ("eta=1.0" in card) == stochastic, "the sampler of the run's own grids"
    assert found.get("class_rows", []) == list(recipe.adapter.class_rows or [])


def test_the_snippet_for_this_toolkit_gives_the_same_network(carded):
    base, folder, recipe, card = carded
    if recipe.adapter.kind == "full":
        assert len(snippets(card)) == 1, "a whole model needs no merging"
        return
    stock, ours = (run(snippet, base, folder) for snippet in snippets(card))
    nets = [found["pipe"].unet if base.text else found["unet"] for found in (stock, ours)]
    x, t = torch.randn(2, *base.input_shape), torch.tensor([3, 500])
    told = base.text.encode(["left", "right"]) if base.text else {}
    told |= {"class_labels": torch.tensor(recipe.adapter.class_rows)} if recipe.adapter.class_rows else {}
    with torch.no_grad():
        one, other, bare = (base.predict(net, x, t, told) for net in (*nets, base.unet))
    assert torch.allclose(one, other, atol=1e-5) and not torch.allclose(one, bare, atol=1e-3)


def test_pipelines_load_the_file_of_diffusers_where_the_folder_has_one(carded):
    base, folder, _, card = carded
    (stock, *_) = snippets(card)
    assert ("load_lora_weights" in stock) == (folder / "pytorch_lora_weights.safetensors").is_file()
    if "load_lora_weights" in stock:
        assert "peft" not in stock and run(stock, base, folder)["pipe"].get_active_adapters()


def test_front_matter_is_what_the_hub_reads(carded):
    base, _, recipe, card = carded
    data, whole = ModelCard(card).data.to_dict(), recipe.adapter.kind == "full"
    assert data == ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    assert "differential-privacy" in data["tags"] and ((recipe.adapter.kind in data["tags"]) != whole)
    assert data["library_name"] == ("diffusers" if whole else "peft")
    assert data["base_model_relation"] == ("finetune" if whole else "adapter")
    assert data["pipeline_tag"] == ("text-to-image" if base.text else "unconditional-image-generation")
    assert "base_model" not in data and "license" not in data, "a folder has no name there, and no licence was given"


@pytest.fixture(scope="module")
def pixel(promise, tmp_path_factory):
    """(base, recipe, certificate) of one adapter, whose card tests render anew."""
    place = tmp_path_factory.mktemp("pixel")
    base = load_base(str(BASES["pixel_classes"](place / "base")))
    return base, recipe_of(base, class_rows=(10, 11)), certified(promise, base, place)


def with_base(pixel, name, revision=None, **model):
    """The card of an adapter of another base."""
    base, recipe, facts = copy.deepcopy(pixel)
    facts["base"] |= {"name": name, "revision": revision}
    recipe = dataclasses.replace(recipe, model=Model(pretrained_model_name_or_path=name, **model))
    return render_card(facts, recipe, dataclasses.replace(base, name=name, revision=revision), "step-0004.png")


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("stabilityai/some-model_v1.5", True),
        ("gpt2", True),
        ("builtin:handwriting", False),
        ("./mine", False),
        ("./my `base`", False),
        ("a/b/c", False),
    ],
)
def test_the_base_is_named_to_the_hub_only_by_a_name_that_it_can_have(pixel, name, listed):
    data = ModelCard(with_base(pixel, name)).data.to_dict()
    assert data.get("base_model") == (name if listed else None) and data["base_model_relation"] == "adapter"


def test_a_licence_that_was_given_stands_in_the_card_and_its_front_matter(pixel):
    base, recipe, facts = pixel
    recipe = dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, license="cc-by-4.0"))
    card = render_card(facts, recipe, base, "step-0004.png")
    assert ModelCard(card).data.license == "cc-by-4.0"
    assert "These weights: cc-by-4.0, within the licence of the base." in card and "states no licence" not in card


def test_a_net_from_scratch_has_no_base_on_the_hub(pixel):
    data = ModelCard(with_base(pixel, "somebody/net", from_scratch=True)).data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(data)


def test_a_base_from_the_hub_is_pinned_to_its_commit_in_every_snippet(pixel):
    card = with_base(pixel, "somebody/net", "c" * 40)
    calls = [line for snippet in snippets(card) for line in snippet.splitlines() if ".from_pretrained(" in line]
    of_base = [line for line in calls if "PeftModel" not in line]
    assert len(of_base) == 3 and all(f'revision="{"c" * 40}"' in line for line in of_base)
    assert f"commit {'c' * 40}" in card


NUMBERS = {
    ("guarantee", "epsilon"): (7.25, "| promise | epsilon 7.25, delta 1e-05 |"),
    ("guarantee", "delta"): (3e-7, "delta 3e-07 |"),
    ("guarantee", "epsilon_replace_one"): (9.125, "| epsilon for one record replaced by another | 9.125 |"),
    ("guarantee", "epsilon_per_image"): (2.375, "| epsilon for one image of a group | 2.375 |"),
    ("guarantee", "max_tpr_at_fpr", "0.001"): (0.0123, "1.23 % with 0.1 % false alarms"),
    ("guarantee", "max_tpr_at_fpr", "0.01"): (0.0707, "7.07 % with 1 % false alarms"),
    ("mechanism", "count"): (4321, "| noisy updates | 4321 |"),
    ("mechanism", "sampling_prob"): (0.0625, "| sampling probability | 0.0625 |"),
    ("mechanism", "noise_multiplier"): (17.5, "| noise multiplier | 17.5 |"),
    ("mechanism", "max_grad_norm"): (0.375, "| clipping | flat, bound 0.375 |"),
    ("mechanism", "expected_batch_size"): (512.0, "| expected batch size | 512 |"),
    ("public_inputs", "num_examples"): (98765, "| records | 98765, a public number |"),
    ("base", "sha256"): ("e" * 64, "e" * 64),
    ("statement",): ("It is so.", "**It is so.**"),
    ("tuning",): ({"runs": 17, "priced": "composition"}, "17 runs with this mechanism"),
    ("other_releases",): ([{"source": "certificate " + "d" * 64}], "certificate " + "d" * 64),
}


@pytest.mark.parametrize("place", NUMBERS, ids=".".join)
def test_every_figure_of_a_card_is_the_certificates(pixel, place):
    base, recipe, facts = copy.deepcopy(pixel)
    value, shown = NUMBERS[place]
    assert shown not in render_card(facts, recipe, base, "step-0004.png")
    *path, key = place
    inner = facts
    for name in path:
        inner = inner[name]
    inner[key] = value
    assert shown in render_card(facts, recipe, base, "step-0004.png")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_source": "given"}, "who can take the noise off. Do not share this."),
        ({"key_after_export": "escrowed"}, "kept in escrow: whoever holds it can take the noise off."),
        ({"gradient_check": "skipped"}, "NOT CHECKED before training (--skip\\_self\\_check)"),
        ({"tuning": {"runs": 12, "priced": "no"}}, "12 earlier runs on these records, NOT paid for"),
    ],
)
def test_what_weakens_the_promise_stands_before_it(pixel, changes, words):
    base, recipe, facts = pixel
    assert "Read this first" not in render_card(facts, recipe, base, "step-0004.png")
    paid = {**facts, "tuning": {"runs": 12, "priced": "composition"}}
    assert "Read this first" not in render_card(paid, recipe, base, "step-0004.png")
    card = render_card({**facts, **changes}, recipe, base, "step-0004.png")
    first = card.index("## Read this first")
    assert card.index("\n# ") < first < card.index(words) < card.index(facts["statement"])


def test_no_figure_stands_in_a_card_that_certificate_and_recipe_do_not_hold(pixel):
    base, recipe, facts = pixel
    table = re.findall(r"^\| (.+) \| (.+) \|$", render_card(facts, recipe, base, "x.png"), re.M)
    known = [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", str(facts))] + [recipe.adapter.rank, 10, 11]
    known += [100 * value for value in known]  # as percentages
    for name, value in table:
        for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w.])", value):
            assert any(float(number) == pytest.approx(n, rel=1e-3) for n in known), (name, number)


EVIL = ("a|b", "`x`", "x\n```\n# pwned\n", "<script>alert(1)</script>", "[x](http://evil)", "\u202eesrever", "'''")


def test_names_that_somebody_typed_stay_text(pixel):
    base, recipe, facts = pixel
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, class_names=EVIL))
    recipe = dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, target_modules=EVIL))
    facts = copy.deepcopy(facts)
    facts["base"]["name"] = "./" + "".join(EVIL)
    card = render_card(facts, recipe, base, "step-0004.png")
    prose, code = re.sub(r"^```.*?^```", "", card, flags=re.S | re.M), snippets(card)
    assert len(code) == 2 and card.count("\n```") == 6 and "\n# pwned" not in card and "\u202e" not in card
    assert all(ast.parse(snippet) for snippet in code)
    (listed,) = re.findall(r"^class_rows = .*?  # of (.*)$", code[0], re.M)
    assert tuple(ast.literal_eval(listed)) == EVIL
    for row in re.findall(r"^\|.*$", prose, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row
    for mark in ("`", "<", "["):
        assert not re.search(rf"^\| (?:base|trained) .*(?<!\\){re.escape(mark)}", prose, re.M), mark


@pytest.mark.parametrize("name", ["./plain", "./two words", "./it's `odd`", "./a\nb", "./$(reboot)"])
def test_the_commands_of_a_card_are_one_line_and_one_word_for_each_name(pixel, name):
    card = with_base(pixel, name)
    shown = [line for line in card.splitlines() if "dp-peft sample" in line or "dp-peft train" in line]
    commands = [re.fullmatch(r"(`+) ?(.*?) ?\1", line) for line in shown]
    assert len(commands) == 2 and all(commands)
    assert not any(command[1] in re.findall("`+", command[2]) for command in commands), "it would end there"
    place = "PATH/" + name.removeprefix("./").replace("\n", " ")
    for command, option in zip(commands, ("--base", "--pretrained_model_name_or_path"), strict=True):
        words = shlex.split(command[2])
        assert words[words.index(option) + 1 :] == [place]


def test_a_card_cites_what_the_readme_cites():
    assert (cards.TEMPLATES / "citation.bib").read_text() in README.read_text()


def test_prompts_in_a_card_are_public(carded):
    base, folder, recipe, _ = carded
    if base.text is None:
        return
    captions = dataclasses.replace(recipe, data=Data(caption_column="text", class_names=None))
    assert cards.example_prompt(captions) == "a photo of ..."
    assert cards.example_prompt(recipe) == "a photo of left"
    given = dataclasses.replace(captions, sample=Sample(prompts=('it\'s "quoted"', "b")))
    assert cards.example_prompt(given) == 'it\'s "quoted"'


def test_a_builtin_base_is_found_in_the_package(pixel):
    card = with_base(pixel, "builtin:handwriting")
    for snippet in snippets(card):
        found: dict = {}
        lines = [line for line in snippet.splitlines() if "unet =" not in line or "UNet2DModel" in line]
        exec("\n".join(lines).split("scheduler = ")[0], found)
        assert isinstance(found["unet"], UNet2DModel)
