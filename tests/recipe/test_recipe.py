"""Recipes: strict YAML, flags over recipe over defaults, ranges, and a written form that loads back equal."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import (
    ADAPTER_KINDS,
    Adapter,
    Data,
    Model,
    PretrainRecipe,
    Privacy,
    Recipe,
    Sample,
    Train,
    load_pretrain_recipe,
    load_recipe,
    recipe_path,
    to_yaml,
    validate,
)
from dp_peft_diffusion.strict_yaml import read_table, write_line
from dp_peft_diffusion.typed_fields import options

EPSILON = {"privacy.epsilon": 1.0}


def load_text(tmp_path, text, overrides=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(tmp_path, text, *words, overrides=EPSILON):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, text, overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_defaults_are_those_of_the_specification():
    assert Model() == Model(
        pretrained_model_name_or_path="builtin:handwriting", revision=None, from_scratch=False, prediction_type=None
    )
    assert Adapter() == Adapter(kind="lora", rank=4, target_modules=None)
    assert (Privacy().delta, Privacy().max_grad_norm, Privacy().clipping) == (1e-5, 1.0, "automatic")
    assert (Train().train_batch_size, Train().max_train_steps, Train().seed) == (256, 100, 0)
    assert Train().noise_multiplicity == 4  # docs/explanation/ablations.md, as is the scheduler
    assert (Sample().every, Sample().num_images, Sample().scheduler) == (0, 80, None)


def test_every_field_has_help():
    for recipe in (Recipe(), PretrainRecipe(dataset_name="x")):
        for section, spec, _ in options(recipe):
            assert len(spec.metadata["help"]) > 5, (section, spec.name)


def test_recipes_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.seed = 1


def test_flags_stand_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    text = "privacy: {epsilon: 3}\ntrain: {seed: 5, max_train_steps: 7}\n"
    recipe = load_text(tmp_path, text, {"train.seed": 9})
    assert (recipe.train.seed, recipe.train.max_train_steps, recipe.train.train_batch_size) == (9, 7, 256)
    assert recipe.privacy.epsilon == 3.0 and isinstance(recipe.privacy.epsilon, float)


@pytest.mark.parametrize(
    "flag", [{"privacy.noise_multiplier": 2.0}, {"privacy.no_privacy": True, "data.declared_public": True}]
)
def test_a_promise_on_the_command_line_takes_the_place_of_the_recipes(tmp_path, flag):
    recipe = load_text(tmp_path, "privacy: {epsilon: 3}\n", flag)
    assert recipe.privacy.epsilon is None


def test_a_recipe_declares_its_own_images_public_and_no_others(tmp_path):
    text = "data: {dataset_name: theirs, declared_public: true}\nprivacy: {no_privacy: true}\n"
    assert load_text(tmp_path, text).data.declared_public
    refused(tmp_path, text, "--declared_public", overrides={"data.dataset_name": "mine"})
    assert load_text(tmp_path, text, {"data.dataset_name": "mine", "data.declared_public": True}).privacy.no_privacy


def test_an_empty_file_and_empty_sections_are_all_defaults(tmp_path):
    expected = Recipe(privacy=Privacy(epsilon=1.0))
    assert load_text(tmp_path, "", EPSILON) == load_text(tmp_path, "model:\ntrain:\n", EPSILON) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {seed: 1}", ["unknown key 'trian'", "Did you mean 'train'", "Valid keys: model, data"]),
        ("train: {sed: 1}", ["unknown key 'train.sed'", "Did you mean 'seed'", "learning_rate"]),
        ("epsilon: 1", ["unknown key 'epsilon'", "privacy.epsilon"]),
        ("privacy: {target_epsilon: 1}", ["'privacy.target_epsilon'", "Did you mean 'epsilon'"]),
        ("1: 2", ["unknown key '1'"]),
        ("train: {seed: one}", ["train.seed is 'one'", "a whole number"]),
        ("train: {seed: 1.0}", ["train.seed is 1.0", "a whole number"]),
        ("train: {seed: true}", ["train.seed is True", "a whole number"]),
        ("train: {seed: }", ["train.seed is None", "a whole number"]),
        ("train: {learning_rate: fast}", ["train.learning_rate is 'fast'", "a number"]),
        ("train: {learning_rate: true}", ["train.learning_rate is True", "a number"]),
        ("data: {center_crop: 1}", ["data.center_crop is 1", "true or false"]),
        ("data: {center_crop: yes}", ["data.center_crop is 'yes'", "true or false"]),
        ("data: {class_names: [0, 1]}", ["data.class_names, entry 1 is 0", "text", "quotes: '0'"]),
        ("data: {class_names: cats}", ["data.class_names is 'cats'", "a list"]),
        ("train: 3", ["train is 3", "key: value"]),
        ("[1, 2]", ["is not a recipe", "key: value"]),
        ("just words", ["is not a recipe"]),
        ("train: {seed: 1, seed: 2}", ["'seed' stands twice", "line 1"]),
        ("train: {seed: 1}\ntrain: {rank: 2}", ["'train' stands twice", "line 2"]),
        ("train: {seed: !!int '3'}", ["tags"]),
        ("train: {seed: !!python/object:os.system {}}", ["tags"]),
        ("train: {seed: &a 1}", ["anchors (&) have no place"]),
        ("train: {seed: *a}", ["aliases (*) have no place"]),
        ("#" * (1 << 18), ["larger than"]),
        ("train: {seed: 1", ["is not a recipe", "line"]),
        ("a: \x07", ["is not a recipe"]),
        ("? [a, b]\n: 1", ["is not a recipe"]),
        ("[" * 500, ["is not a recipe"]),
        ("train: {seed: " + "9" * 5000 + "}", ["whole number"]),
    ],
)
def test_a_bad_file_is_refused_with_what_where_and_how_to_mend_it(tmp_path, text, words):
    refused(tmp_path, text, str(tmp_path / "recipe.yaml"), *words)


def test_unreadable_files_are_refused(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_recipe(path)
    (tmp_path / "latin.yaml").write_bytes(b"data: {split: \xe9}")
    with pytest.raises(UserError, match="is not a recipe"):
        load_recipe(tmp_path / "latin.yaml")


def test_scalars_mean_what_they_look_like(tmp_path):
    text = "privacy: {delta: 1e-6}\ntrain: {mixed_precision: no, learning_rate: 1}\nmodel: {revision: on}\n"
    recipe = load_text(tmp_path, text, EPSILON)
    assert recipe.privacy.delta == 1e-6
    assert recipe.train.mixed_precision == "no"
    assert recipe.train.learning_rate == 1.0 and isinstance(recipe.train.learning_rate, float)
    assert recipe.model.revision == "on"


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("privacy.epsilon", value) for value in (0.0, -1.0, NAN, INF, -INF)],
        *[("privacy.delta", value) for value in (0.0, -1e-5, 1.0, NAN, INF)],
        *[("privacy.noise_multiplier", value) for value in (0.0, -1.0, NAN, INF)],
        *[("privacy.max_grad_norm", value) for value in (0.0, -1.0, NAN, INF)],
        *[("privacy.gamma", value) for value in (0.0, -1.0, NAN, INF)],
        ("privacy.clipping", "flatt"),
        ("privacy.neighboring_relation", "swap"),
        ("adapter.kind", "lorra"),
        ("adapter.rank", 0),
        ("adapter.lora_alpha", 0.0),
        ("adapter.target_modules", ()),
        ("adapter.target_modules", ("to_q", "to_q")),
        ("adapter.target_modules", ("",)),
        ("adapter.class_code_rank", 0),
        ("adapter.class_rows", (1, -1)),
        ("adapter.class_rows", (1, 1)),
        ("data.class_names", ("a", "a")),
        ("data.class_names", ()),
        ("data.dataset_name", ""),
        ("data.split", ""),
        ("model.pretrained_model_name_or_path", ""),
        ("train.train_batch_size", 0),
        ("train.max_train_steps", 0),
        ("train.noise_multiplicity", 0),
        ("train.micro_batch_size", 0),
        *[("train.learning_rate", value) for value in (0.0, -1.0, NAN, INF)],
        *[("train.label_dropout", value) for value in (-0.1, 1.0, NAN)],
        *[("train.ema_decay", value) for value in (-0.1, 1.0, NAN)],
        ("train.optimizer", "adamw"),
        ("train.mixed_precision", "fp16"),
        *[("adapter.license", value) for value in ("Apache 2.0", "", "x" * 41, "mit\nbase_model: x")],
        ("model.prediction_type", "flow"),
        ("data.prompt_template", "x" * 201),
        ("data.caption_column", "x" * 201),
        ("sample.prompts", ("a", "x" * 201)),
        ("data.augmentations", ("flip", "spin")),
        ("data.augmentation_variants", 0),
        ("train.momentum", 1.0),
        ("train.bias_correction_floor", 0.0),
        ("train.lr_scheduler", "polynomial"),
        ("train.lr_warmup_steps", -1),
        ("train.augmentation_multiplicity", 0),
        ("train.timestep_distribution", "sigmoid"),
        ("train.timestep_weights", (0.5, 0.0, 0.5)),
        *[("train.p_std", value) for value in (0.0, NAN)],
        *[("train.p_mean", value) for value in (NAN, INF)],
        ("train.snr_gamma", 0.0),
        ("train.seed", -1),
        ("train.seed", 2**32),
        ("sample.every", -1),
        ("sample.num_images", 0),
        ("sample.num_inference_steps", 0),
        ("sample.guidance_scale", NAN),
        ("sample.seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(key, value):
    with pytest.raises(UserError) as caught:
        load_recipe(None, {**({} if key == "privacy.noise_multiplier" else EPSILON), key: value})
    section, name = key.split(".")
    shown = {"kind": "--adapter"}.get(name, f"--sample_{name}" if section == "sample" else f"--{name}")
    assert shown in str(caught.value)


def test_edges_of_the_ranges_are_accepted():
    edges = {"adapter.rank": 1, "train.seed": 2**32 - 1, "train.label_dropout": 0.0, "sample.guidance_scale": 0.0}
    assert load_recipe(None, {**EPSILON, **edges, "privacy.clipping": "flat"}).train.seed == 2**32 - 1


def test_unknown_choices_get_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'flat'.*flat or automatic"):
        load_recipe(None, {**EPSILON, "privacy.clipping": "flatt"})


def test_exactly_one_promise_is_given():
    with pytest.raises(UserError, match="--epsilon 1"):
        load_recipe()
    with pytest.raises(UserError, match="--epsilon and --noise_multiplier are given"):
        load_recipe(None, {**EPSILON, "privacy.noise_multiplier": 1.0})
    with pytest.raises(UserError, match="--epsilon and --no_privacy are given"):
        load_recipe(None, {**EPSILON, "privacy.no_privacy": True, "data.declared_public": True})


def test_no_privacy_needs_images_declared_public():
    with pytest.raises(UserError, match="--declared_public"):
        load_recipe(None, {"privacy.no_privacy": True})
    assert load_recipe(None, {"privacy.no_privacy": True, "data.declared_public": True}).privacy.no_privacy


def test_gamma_without_automatic_clipping_is_refused():
    with pytest.raises(UserError, match="--gamma"):
        load_recipe(None, {**EPSILON, "privacy.gamma": 0.1, "privacy.clipping": "flat"})


def test_recipes_built_in_python_are_checked_too():
    with pytest.raises(UserError, match="--rank"):
        validate(Recipe(adapter=Adapter(rank=0), privacy=Privacy(epsilon=1.0)))


text = st.text(min_size=1, max_size=200).filter(lambda word: word.isprintable() or "\n" in word)
positive = st.floats(min_value=1e-300, max_value=1e300)
recipes = st.builds(
    Recipe,
    model=st.builds(Model, pretrained_model_name_or_path=text, revision=st.none() | text),
    data=st.builds(
        Data,
        dataset_name=text,
        label_column=st.none() | text,
        class_names=st.none() | st.lists(text, min_size=1, unique=True).map(tuple),
        center_crop=st.booleans(),
    ),
    adapter=st.builds(
        Adapter,
        rank=st.integers(1, 256),
        lora_alpha=st.none() | positive,
        class_rows=st.none() | st.lists(st.integers(0, 10**6), min_size=1, unique=True).map(tuple),
    ),
    privacy=st.builds(Privacy, epsilon=positive, delta=st.floats(1e-300, 0.5), max_grad_norm=positive),
    train=st.builds(Train, learning_rate=positive, seed=st.integers(0, 2**32 - 1)),
)


@settings(max_examples=40)
@given(recipe=recipes)
def test_a_written_recipe_loads_back_equal(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("written") / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert to_yaml(load_recipe(path)) == to_yaml(recipe)


@example(value="a\nb")
@example(value="\x85 \u2028")
@given(value=st.text() | st.integers(-(10**17), 10**17) | st.floats() | st.booleans() | st.none())
def test_every_scalar_survives_the_file(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("scalar") / "line.yaml"
    line = write_line("key", value)
    assert "\n" not in line
    path.write_text(line + "  # a comment\n", encoding="utf-8", newline="")
    read = read_table(path)["key"]
    assert type(read) is type(value) and (read == value or value != value)


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "null", "~", "", "010", "1e-5", "1:30", ".nan", "2020-01-01", "<<"]
)
def test_text_that_looks_like_something_else_stays_text_for_stock_yaml_too(word):
    import yaml

    assert yaml.safe_load(write_line("key", word)) == {"key": word}


def test_a_written_pretraining_recipe_loads_back_equal(tmp_path):
    recipe = PretrainRecipe(dataset_name="omniglot", block_out_channels=(8, 8), seed=3)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_pretrain_recipe(tmp_path / "recipe.yaml") == recipe
    assert to_yaml(recipe).startswith("# dp-peft pretrain --config")


def test_pretraining_needs_images_and_takes_flags_over_its_recipe():
    with pytest.raises(UserError, match="--dataset_name"):
        load_pretrain_recipe(recipe_path("handwriting"))
    recipe = load_pretrain_recipe(recipe_path("handwriting"), {"dataset_name": "x", "max_train_steps": 3})
    assert (recipe.dataset_name, recipe.max_train_steps) == ("x", 3)
    with pytest.raises(UserError, match="--resolution"):
        load_pretrain_recipe(recipe_path("handwriting"), {"dataset_name": "x", "resolution": 0})


@pytest.mark.parametrize("name", ["digits", "handwriting"])
def test_shipped_recipes_begin_with_their_command_and_name_every_key(name):
    path = recipe_path(name)
    assert path.read_text().startswith(f"# dp-peft {'train' if name == 'digits' else 'pretrain'} --recipe {name}")
    loaded = load_recipe(path) if name == "digits" else load_pretrain_recipe(path, {"dataset_name": "x"})
    table = read_table(path)
    for section, spec, _ in options(loaded):
        assert spec.name in (table[section] if section else {**table, "dataset_name": ""}), spec.name


def test_an_unknown_recipe_is_refused_with_the_nearest_and_all_others():
    with pytest.raises(UserError, match="Did you mean 'digits'.*digits, digits-captions.*handwriting.*--config"):
        recipe_path("digit")
    with pytest.raises(UserError, match="does not exist"):
        recipe_path("../recipes/digits")


def test_reading_recipes_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from dp_peft_diffusion.recipe import load_recipe, recipe_path; "
        "load_recipe(recipe_path('digits')); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_loha_is_refused_with_the_reason_and_what_to_use(tmp_path):
    refused(tmp_path, "adapter: {kind: loha}", "vmap", "layer rule", "--adapter lokr", "--adapter lora")


def test_any_other_unknown_kind_is_refused_with_the_list(tmp_path):
    refused(tmp_path, "adapter: {kind: dorra}", "Did you mean 'dora'", *ADAPTER_KINDS)


@pytest.mark.parametrize("kind", ["bitfit", "class_rows", "full"])
def test_a_kind_that_knows_what_it_trains_takes_no_target_modules(tmp_path, kind):
    refused(tmp_path, f"adapter: {{kind: {kind}, target_modules: [to_q]}}", "--target_modules", kind)


def test_a_rotation_of_one_number_is_refused(tmp_path):
    refused(tmp_path, "adapter: {kind: oft, rank: 1}", "--rank 1", "--rank 4")


def test_a_scale_that_no_reader_of_the_file_would_accept_is_refused(tmp_path):
    refused(tmp_path, "adapter: {kind: lokr, rank: 4, lora_alpha: 257}", "--lora_alpha", "64 times --rank")
    assert (
        load_recipe(overrides={"adapter.kind": "lokr", "adapter.lora_alpha": 256, **EPSILON}).adapter.lora_alpha == 256
    )


def test_another_kind_over_a_recipe_takes_its_own_targets():
    digits = recipe_path("digits")
    assert load_recipe(digits, {"adapter.kind": "lora"}) == load_recipe(digits)
    assert load_recipe(digits, {"adapter.kind": "dora"}).adapter.target_modules is None
    assert load_recipe(digits, {"adapter.kind": "ia3", "adapter.target_modules": ("to_q",)}).adapter.target_modules


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("data: {group_column: patient}", "--max_examples_per_group 4"),
        ("data: {max_examples_per_group: 4}", "--group_column patient"),
        ("privacy: {neighboring_relation: add_or_remove_one}", "--sampling_prob 0.01"),
        ("privacy: {sampling_prob: 0.01}", "Leave it out"),
        (
            "privacy: {neighboring_relation: add_or_remove_one, sampling_prob: 0.1, truncated_batch_size: 9}",
            "no cap|Le",
        ),
        (
            "data: {group_column: p, max_examples_per_group: 4}\nprivacy: {neighboring_relation: replace_one}",
            "no known price",
        ),
        ("data: {group_column: p, max_examples_per_group: 4}\nprivacy: {truncated_batch_size: 9}", "no known price"),
    ],
)
def test_relations_groups_and_caps_without_a_price_together_are_refused(tmp_path, text, advice):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=advice):
        load_recipe(tmp_path / "recipe.yaml", {"privacy.epsilon": 1.0})


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("model: {from_scratch: true}", "--adapter full"),
        ("train: {momentum: 0.9}", "--optimizer sgd"),
        ("train: {augmentation_multiplicity: 2}", "--augmentations flip,shift"),
        ("train: {lr_warmup_steps: 100}", "--max_train_steps 100"),
        ("data: {caption_column: text, class_names: [a]}", "Leave one of them out"),
        ("data: {prompt_template: 'a {thing}'}", "{label}"),
        ("data: {prompt_template: 'a {label} }'}", "{label}"),
        ("train: {timestep_range: [5]}", "0,600"),
        ("train: {timestep_range: [5, 5]}", "0,600"),
        ("train: {timestep_edges: [0, 600]}", "--timestep_edges 0,30,600,1000"),
        ("train: {timestep_edges: [0, 600, 30, 1000]}", "--timestep_edges 0,30,600,1000"),
        ("train: {timestep_weights: [0.2, 0.2, 0.2]}", "add up to 1"),
    ],
)
def test_options_of_training_that_contradict_each_other_are_refused(tmp_path, text, advice):
    refused(tmp_path, text, advice)


def test_a_template_with_and_without_a_label_is_accepted():
    for template in ("a chest x-ray", "{label}, {label}"):
        assert load_recipe(None, {**EPSILON, "data.prompt_template": template}).data.prompt_template == template
