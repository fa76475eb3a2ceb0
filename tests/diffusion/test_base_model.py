import copy
import fnmatch
import json
import shutil
from dataclasses import asdict, replace

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_bases import BASES, tiny_unet2d, write
from tiny_models import tiny_base_folder, tiny_unet

from dp_peft_diffusion.diffusion import base_folder
from dp_peft_diffusion.diffusion.base_model import BUILTIN_BASES, BaseLayout, fingerprint, load_base
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.model_files import read_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a family -> folder of its tiny base, which no test changes."""
    place = tmp_path_factory.mktemp("bases")
    return {name: make(place / name) for name, make in BASES.items()}


@pytest.fixture(scope="module")
def bases(folders):
    return {name: load_base(str(folder)) for name, folder in folders.items()}


@pytest.fixture
def copied(folders, tmp_path):
    """A function that gives a copy of a family's folder, to be changed."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def images_for(base, n=3):
    return torch.rand(n, base.image_channels, base.resolution, base.resolution) * 2 - 1


def parts_of(base):
    parts = (base.unet, base.vae, base.codes, *(base.text.encoders if base.text else ()))
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("family", BASES)
def test_images_of_every_family_become_what_its_network_denoises_and_images_again(bases, family):
    base = bases[family]
    inputs = base.encode(images_for(base))
    assert inputs.shape == (3, *base.input_shape) and inputs.dtype == torch.float32
    assert base.decode(inputs).shape == (3, base.image_channels, 16, 16) and base.resolution == 16
    conditions = {} if base.text is None else base.text.encode(["a cat", "dog", ""])
    if base.num_class_embeds:
        conditions = {"class_labels": torch.tensor([0, 1, 2])}
    predicted = base.predict(base.unet, inputs, torch.tensor([1, 20, 999]), conditions)
    assert predicted.shape == inputs.shape


@pytest.mark.parametrize("family", BASES)
def test_every_part_of_a_loaded_base_is_frozen_in_eval_mode_and_float32(bases, family):
    for part in parts_of(bases[family]):
        assert not part.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in part.parameters())


def test_decode_undoes_encode_of_pixels(bases):
    images = images_for(bases["pixel_classes"])
    assert torch.equal(bases["pixel_classes"].decode(bases["pixel_classes"].encode(images)), images)


@pytest.mark.parametrize("family", ["latent", "latent_vq"])
def test_latents_are_those_of_diffusers_scaled_by_the_config(bases, folders, family):
    base, part = bases[family], {"latent": "vae", "latent_vq": "vqvae"}[family]
    kind = diffusers.AutoencoderKL if family == "latent" else diffusers.VQModel
    stock, images = kind.from_pretrained(folders[family], subfolder=part), images_for(base, 1)
    with torch.no_grad():
        encoded = stock.encode(images)
        latents = (encoded.latent_dist.mode() if family == "latent" else encoded.latents) * stock.config.scaling_factor
        decoded = stock.decode(latents / stock.config.scaling_factor).sample
    assert torch.allclose(base.encode(images), latents, atol=1e-6)
    assert torch.allclose(base.decode(latents), decoded, atol=1e-5)


def test_a_shift_in_the_config_is_taken_off_before_scaling(bases, copied):
    folder = copied("latent")
    edit(folder / "vae" / "config.json", shift_factor=0.25)
    shifted, images = load_base(str(folder)), images_for(bases["latent"], 2)
    assert torch.allclose(shifted.encode(images), bases["latent"].encode(images) - 0.25 * 0.5, atol=1e-6)
    again = bases["latent"].decode(bases["latent"].encode(images))
    assert torch.allclose(shifted.decode(shifted.encode(images)), again, atol=1e-5)


@pytest.mark.parametrize("family", ["latent", "latent_vq"])
def test_an_image_has_the_same_latent_whatever_its_neighbours(bases, family):
    base = bases[family]
    images = images_for(base, 4)
    alone = torch.cat([base.encode(image[None]) for image in images])
    assert torch.equal(base.encode(images), alone)
    images[1:] = float("nan")
    assert torch.equal(base.encode(images)[0], alone[0])
    assert torch.equal(base.decode(alone)[2], base.decode(alone[2:3])[0])


def test_xl_is_told_sizes_and_pooled_text_as_its_pipeline_tells_it(bases, folders):
    base, n = bases["stable_diffusion_xl"], 3
    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["stable_diffusion_xl"])
    text, noisy, times = base.text.encode(["a cat", "dog", ""]), torch.randn(n, 4, 8, 8), torch.tensor([3, 500, 999])
    sizes = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=6)
    with torch.no_grad():
        told = {"text_embeds": text["text_embeds"], "time_ids": sizes.repeat(n, 1)}
        wanted = pipeline.unet(noisy, times, text["encoder_hidden_states"], added_cond_kwargs=told).sample
        assert torch.equal(base.predict(pipeline.unet, noisy, times, text), wanted)
    own = base.unet.state_dict()  # two nets round alike only where their weights lie alike in memory
    assert all(torch.equal(own[name], value) for name, value in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("family", BASES)
def test_the_schedule_is_that_of_the_bases_own_scheduler(bases, folders, family):
    schedule = bases[family].scheduler
    name = json.loads((folders[family] / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    stock = getattr(diffusers, name).from_pretrained(folders[family], subfolder="scheduler")
    assert schedule.config.prediction_type == stock.config.prediction_type
    if family == "edm":
        assert schedule.config.sigma_data == stock.config.sigma_data
    else:
        assert type(schedule) is DDPMScheduler and torch.equal(schedule.alphas_cumprod, stock.alphas_cumprod)
        assert schedule.config.clip_sample == family.startswith("pixel")


def test_a_faster_sampler_of_edm_is_read_as_edm(copied):
    folder = copied("edm")
    EDMDPMSolverMultistepScheduler(sigma_data=0.7).save_pretrained(folder / "scheduler")
    assert load_base(str(folder)).scheduler.config.sigma_data == 0.7


def test_what_a_net_predicts_is_its_own_unless_it_is_from_scratch(folders):
    assert load_base(str(folders["pixel"]), prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"
    assert load_base(str(folders["edm"]), prediction_type="edm").scheduler.config.sigma_data == 0.5
    for family, wanted, own in (
        ("pixel", "v_prediction", "epsilon"),
        ("pixel", "edm", "epsilon"),
        ("edm", "epsilon", "edm"),
    ):
        with pytest.raises(UserError, match=f"--prediction_type {wanted}.*the base predicts {own}.*--from_scratch"):
            load_base(str(folders[family]), prediction_type=wanted)
    scratch = {"from_scratch": True}
    latent_v = load_base(str(folders["latent"]), prediction_type="v_prediction", **scratch).scheduler
    discrete = load_base(str(folders["edm"]), prediction_type="epsilon", **scratch).scheduler
    assert latent_v.config.prediction_type == "v_prediction" and latent_v.config.beta_start == 0.0015
    assert type(discrete) is DDPMScheduler and discrete.config.prediction_type == "epsilon"


def test_a_schedule_from_scratch_is_that_of_latents_where_the_base_is_latent(folders, copied):
    scratch, latent = {"from_scratch": True}, copied("latent")
    assert load_base(str(latent), prediction_type="edm", **scratch).scheduler.config.sigma_data == 1.0
    assert load_base(str(folders["pixel"]), prediction_type="edm", **scratch).scheduler.config.sigma_data == 0.5
    EDMEulerScheduler(sigma_data=0.5).save_pretrained(latent / "scheduler")
    for place, clipped in ((latent, False), (folders["edm"], True)):
        found = load_base(str(place), prediction_type="v_prediction", **scratch).scheduler.config
        assert found.clip_sample == clipped and found.prediction_type == "v_prediction"


def test_a_net_on_latents_is_never_taken_for_one_on_pixels(copied):
    folder = copied("latent_vq")
    (folder / "dp_peft_base.json").write_text(json.dumps(asdict(BaseLayout(latent=True))))
    assert load_base(str(folder)).is_latent
    (folder / "vqvae").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="latent_vq' denoises latents and has no autoencoder.*copy.*--base"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("null", "spare", "rows"),
    [(None, (0, 0), range(12)), (3, (4, 12), range(3)), (0, (4, 12), range(1, 4)), (11, (0, 11), range(11))],
)
def test_public_rows_are_neither_the_null_row_nor_spare(bases, null, spare, rows):
    layout = BaseLayout(null_class=null, spare_classes=spare)
    assert replace(bases["latent"], layout=layout).public_rows == list(rows)
    assert bases["pixel"].public_rows == []


def test_weights_from_scratch_come_from_the_public_seed_alone(folders):
    state = torch.get_rng_state()
    first, again = (load_base(str(folders["latent"]), from_scratch=True, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other, loaded = load_base(str(folders["latent"]), from_scratch=True, seed=4), load_base(str(folders["latent"]))
    assert first.sha256 == again.sha256 and len({first.sha256, other.sha256, loaded.sha256}) == 3
    assert fingerprint(first.vae) == fingerprint(loaded.vae) and first.layout == loaded.layout
    assert first.name == f"from scratch: {folders['latent']}" and not any(
        p.requires_grad for p in first.unet.parameters()
    )


@pytest.mark.parametrize(
    ("name", "paper", "ours"), [("mnist", 1_753_345, 1_774_401), ("celeba32", 1_804_451, 1_857_987)]
)
def test_dpdms_networks_are_built_in_without_weights(name, paper, ours):
    """Counts of the papers' networks follow from their code; why ours differ stands in the README of each."""
    with pytest.raises(UserError, match=f"builtin:dpdm_{name}' is an architecture.*--from_scratch --adapter full"):
        load_base(f"builtin:dpdm_{name}")
    base = load_base(f"builtin:dpdm_{name}", from_scratch=True)
    assert sum(p.numel() for p in base.unet.parameters()) == ours
    readme = (BUILTIN_BASES / f"dpdm_{name}" / "README.md").read_text()
    named = [int(number.replace(",", "")) for number in ("+33,536", "+1,056", "+67,072", "-13,536") if number in readme]
    assert paper + sum(named) == ours and f"{ours:,}" in readme and f"{paper:,}" in readme
    assert base.scheduler.config.sigma_data == pytest.approx(3**-0.5) and base.resolution == {"mnist": 28}.get(name, 32)
    assert base.num_class_embeds == (11 if name == "mnist" else None)


def test_a_base_has_the_same_digest_wherever_it_lies(bases, copied):
    for family in ("edm", "latent_vq", "stable_diffusion_xl"):
        assert load_base(str(copied(family))).digest == bases[family].digest


CHANGES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "first encoder": "text_encoder/model.safetensors",
    "second encoder": "text_encoder_2/model.safetensors",
    "scaling": ("vae/config.json", {"scaling_factor": 0.4}),
    "schedule": ("scheduler/scheduler_config.json", {"beta_end": 0.03}),
    "null": ("model_index.json", {"force_zeros_for_empty_prompt": False}),
    "layout": ("dp_peft_base.json", {"pixel_packing": 1, "null_class": 1, "spare_classes": [0, 0]}),
    "tokenizer": ("tokenizer_2/merges.txt", "#version: 0.2\nd o\n"),
    "length": ("text_encoder_2/config.json", {"eos_token_id": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_of_a_base_covers_every_part_of_it(bases, copied, change):
    folder, what = copied("stable_diffusion_xl"), CHANGES[change]
    if isinstance(what, str):
        tensors = load_file(folder / what)
        name = max(tensors)
        tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
        save_file(tensors, folder / what, {"format": "pt"})
    elif isinstance(what[1], str):
        (folder / what[0]).write_text(what[1])
    else:
        path = folder / what[0]
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | what[1]))
    changed = load_base(str(folder))
    assert changed.digest != bases["stable_diffusion_xl"].digest
    around = changed.parts_digest != bases["stable_diffusion_xl"].parts_digest
    assert around == (change not in ("unet", "schedule", "layout", "tokenizer"))
    assert (changed.sha256 == bases["stable_diffusion_xl"].sha256) == (change != "unet")


def test_what_stands_around_a_network_has_a_digest_that_later_libraries_give_it_too(bases):
    assert [family for family in BASES if bases[family].parts_digest is None] == ["pixel", "pixel_classes", "edm"]
    encoder = bases["stable_diffusion_1"].text.encoders[0]
    assert fingerprint(torch.nn.ModuleDict({"text_model": encoder})) == fingerprint(encoder)
    base = replace(bases["latent"], vae=copy.deepcopy(bases["latent"].vae))
    base.vae.register_to_config(added_by_a_later_version=1)
    assert base.parts_digest == bases["latent"].parts_digest and base.digest != bases["latent"].digest


def test_the_fingerprint_changes_with_any_weight():
    unet = tiny_unet()
    before = fingerprint(unet)
    unet.conv_out.bias.data[0] += 1e-6
    assert fingerprint(unet) != before


def test_a_plain_diffusers_folder_without_our_layout_file_loads(tmp_path):
    tiny_unet(None).save_pretrained(tmp_path / "plain")
    DDPMScheduler().save_pretrained(tmp_path / "plain")
    base = load_base(str(tmp_path / "plain"))
    assert base.layout.pixel_packing == 1 and base.num_class_embeds is None and base.resolution == 8
    assert base.subfolder is None and read_base(tmp_path / "plain").sha256 == base.sha256


@pytest.mark.parametrize("family", ["pixel", "stable_diffusion_1"])
def test_weights_in_several_files_are_the_same_base(bases, copied, family):
    folder = copied(family)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    bases[family].unet.save_pretrained(folder / "unet", max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert load_base(str(folder)).sha256 == bases[family].sha256 == read_base(folder).sha256


def test_what_is_fetched_from_the_hub_is_all_that_a_base_needs_and_no_half_precision(folders, tmp_path, monkeypatch):
    def fetch(repo, revision, allow_patterns):
        assert revision == "main"
        target = tmp_path / repo.replace("/", "-")
        for path in folders[repo.split("/")[1]].rglob("*"):
            name = str(path.relative_to(folders[repo.split("/")[1]]))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        for unwanted in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"):
            assert not any(fnmatch.fnmatch(unwanted, pattern) for pattern in allow_patterns)
        return str(target)

    monkeypatch.setattr(base_folder, "snapshot_download", fetch)
    for family in ("pixel_codes", "latent_vq", "stable_diffusion_xl"):
        base = load_base(f"somebody/{family}", "main")
        assert base.name == f"somebody/{family}" and base.digest == load_base(str(folders[family])).digest


def test_no_pickle_and_no_code_of_a_base_is_ever_fetched():
    kinds = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    kinds += ("added_tokens.json",)
    tokenizer = [f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in kinds]
    parts = ("", "unet/", "vae/", "text_encoder/", "tokenizer/", "tokenizer_2/", "tokenizer/x/", "tokenizers/")
    hostile = ("pytorch_model.bin", "vocab.pkl", "tokenization.py", "evil.so", "model.ckpt", "a.model", "x.json.py")
    unwanted = [part + name for part in parts for name in hostile]
    found = list(filter_repo_objects([*tokenizer, *unwanted], allow_patterns=base_folder._FILES))
    assert found == tokenizer


STRANGE = (
    "",
    "..",
    "../main",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "a//b",
    "a/",
    ".hidden",
    "a b",
    "a\n",
)


@pytest.mark.parametrize("revision", [*STRANGE, "-x", "a/.git", "a\\b", "a" * 201])
def test_a_revision_that_is_no_plain_name_is_refused_before_anything_is_looked_up(revision, monkeypatch):
    monkeypatch.setattr(base_folder, "snapshot_download", lambda *_, **__: pytest.fail("it was looked up"))
    with pytest.raises(UserError, match="is no revision.*commit"):
        load_base("somebody/tiny", revision)


@pytest.mark.parametrize("revision", ["1" * 40, "main", "v1.0", "refs/pr/1", "feature/a_b-c.d", None])
def test_commits_branches_tags_and_pull_requests_are_revisions(revision, monkeypatch, folders):
    monkeypatch.setattr(base_folder, "snapshot_download", lambda *_, **__: str(folders["pixel"]))
    load_base("somebody/tiny", revision)


@pytest.fixture
def hub_cache(folders, tmp_path, monkeypatch):
    """The cache of huggingface_hub with two commits of somebody/tiny, as two families; main is the second."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    commits = {f"{number}" * 40: family for number, family in ((1, "edm"), (2, "pixel_classes"))}
    for commit, family in commits.items():
        shutil.copytree(folders[family], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return commits


@pytest.mark.parametrize("asked", [None, "main", "2" * 40])
def test_a_base_from_the_hub_records_its_commit_and_is_found_by_it_when_the_branch_has_moved_on(
    hub_cache, bases, asked, tmp_path
):
    base = load_base("somebody/tiny", asked)
    assert base.revision == "2" * 40 and base.sha256 == bases["pixel_classes"].sha256
    (tmp_path / "hub" / "models--somebody--tiny" / "refs" / "main").write_text("1" * 40)
    assert load_base("somebody/tiny", base.revision).sha256 == base.sha256
    assert load_base("somebody/tiny").revision == "1" * 40


def test_a_base_from_the_hub_is_no_other_when_trained_from_scratch(hub_cache):
    assert load_base("somebody/tiny", from_scratch=True).revision == "2" * 40


@pytest.mark.parametrize("asked", [None, "main"])
def test_a_base_that_lies_here_has_no_commit(hub_cache, folders, tmp_path, asked):
    assert load_base("builtin:handwriting", asked).revision is None
    assert load_base(str(folders["pixel"]), asked).revision is None
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / ("1" * 40)
    assert load_base(str(snapshot), asked).revision is None, "nobody else could find it by that name"


def test_a_hub_behind_a_broken_proxy_gives_a_clear_error(monkeypatch):
    def fail(*_, **__):
        raise HTTPError("proxy refused")

    monkeypatch.setattr(base_folder, "snapshot_download", fail)
    with pytest.raises(UserError, match="proxy refused.*Check the name and the network"):
        load_base("somebody/tiny")


@pytest.mark.parametrize(
    "name", ["builtin:nothing", "builtin:handwriting_features", "./no/such/folder", "/no/such/folder"]
)
def test_an_unknown_base_is_refused_by_name(name):
    with pytest.raises(UserError, match=name.split("/")[-1]):
        load_base(name)


def test_a_hub_name_without_network_gives_a_clear_error():
    with pytest.raises(UserError, match="nobody/nothing.*Check the name and the network"):
        load_base("nobody/nothing")


@pytest.mark.parametrize("text", ["", "{}", '{"spare_classes": 3}', '{"spare_classes": [0, 0], "colour": 1}'])
def test_a_broken_layout_file_is_told_by_name(tmp_path, text):
    folder = tiny_base_folder(tmp_path / "base")
    (folder / "dp_peft_base.json").write_text(text)
    with pytest.raises(UserError, match="dp_peft_base.json"):
        load_base(str(folder))


def inpainting(folder):
    wide = {
        "in_channels": 9,
        "out_channels": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    wide |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    write(folder, unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8,), **wide))


def lose_a_weight(folder, part="unet/diffusion_pytorch_model.safetensors"):
    tensors = load_file(folder / part)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / part, {"format": "pt"})


def only_half_precision(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def write_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def set_config(part, **changes):
    return lambda folder: edit(folder / part / "config.json", **changes)


REFUSED = {
    "a transformer": (set_config("unet", _class_name="FluxTransformer2DModel"), "Flux"),
    "no network": (lambda f: (f / "unet" / "config.json").unlink(), "no base of this version"),
    "inpainting": (inpainting, "takes 9 channels and gives 4"),
    "flow matching": (lambda f: FlowMatchEulerDiscreteScheduler().save_pretrained(f / "scheduler"), "FlowMatchEuler"),
    "no schedule": (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler/scheduler_config.json"),
    "a schedule that is no JSON": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"),
        "is not JSON",
    ),
    "another autoencoder": (set_config("vae", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "means of latents": (set_config("vae", latents_mean=[0.0] * 4), "latents_mean"),
    "latents of other widths": (lambda f: write(f, unet=tiny_unet2d(3)), "its UNet takes 3"),
    "packed latents": (write_text("dp_peft_base.json", '{"pixel_packing": 2, "spare_classes": [0, 0]}'), "packs"),
    "another text encoder": (
        lambda f: edit(f / "text_encoder" / "config.json", architectures=["T5EncoderModel"]),
        "T5",
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder folder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "an image prompt": (
        lambda f: edit(f / "unet" / "config.json", encoder_hid_dim_type="image_proj"),
        "encoder_hid_dim",
    ),
    "an oblong": (set_config("unet", sample_size=[8, 16]), "square"),
    "half precision alone": (only_half_precision, "fp16"),
    "no weights": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "is an architecture"),
    "a weight missing": (lose_a_weight, "lacks weights"),
    "a weight of the autoencoder missing": (
        lambda f: lose_a_weight(f, "vae/diffusion_pytorch_model.safetensors"),
        "lacks weights",
    ),
    "a weight of the text encoder missing": (
        lambda f: lose_a_weight(f, "text_encoder/model.safetensors"),
        "lacks weights",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_this_version_cannot_train_is_refused_by_name(copied, fault):
    folder, (change, message) = copied("stable_diffusion_1"), REFUSED[fault]
    change(folder)
    with pytest.raises(UserError, match=message):
        load_base(str(folder))


def test_the_second_encoder_must_be_what_the_network_was_made_for(copied):
    folder = copied("stable_diffusion_xl")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match="wants more than"):
        load_base(str(folder))


def test_the_builtin_base_is_small_loads_with_stock_diffusers_and_has_spare_rows():
    folder = BUILTIN_BASES / "handwriting"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    base = load_base("builtin:handwriting")
    assert unet.config.num_class_embeds == base.layout.spare_classes[1]
    assert base.layout.spare_classes[1] - base.layout.spare_classes[0] == 64
    null = base.unet.class_embedding.weight[base.layout.null_class]
    assert all(torch.equal(base.unet.class_embedding.weight[row], null) for row in range(*base.layout.spare_classes))
