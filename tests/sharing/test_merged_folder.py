"""Merged folders: stock from_pretrained opens them, they answer as merged, and they certify nothing themselves."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMPipeline, LDMPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_adapters import shared
from tiny_bases import BASES

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import null_conditions
from dp_peft_diffusion.diffusion.merging import merge_adapter
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy.certificate import read, verify
from dp_peft_diffusion.recipe import Adapter, Data
from dp_peft_diffusion.sharing.card import markdown
from dp_peft_diffusion.sharing.merged_folder import write_merged

UNLABELLED = Data(label_column=None, prompt_template="a cat")
PIPELINES = {
    "pixel": DDPMPipeline,
    "latent_vq": LDMPipeline,
    "stable_diffusion_1": StableDiffusionPipeline,
    "stable_diffusion_xl": StableDiffusionXLPipeline,
}


@torch.no_grad()
def answer(base, net):
    x = torch.randn(2, *base.input_shape, generator=torch.Generator().manual_seed(0))
    return base.predict(net, x, torch.tensor([0.2, 0.9]) * 900, null_conditions(base, 2))


@pytest.mark.parametrize("family", ["pixel", "pixel_classes", "edm", "latent", *list(PIPELINES)[1:]])
def test_a_merged_folder_is_a_base_for_stock_diffusers_and_for_this_tool(family, tmp_path):
    made = BASES[family](tmp_path / "bases" / family)
    if family == "stable_diffusion_1":  # as on the Hub, of which settings are fetched, and no checker's weights
        for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
            (made / name).parent.mkdir()
            (made / name).write_text("{}")
        index = json.loads((made / "model_index.json").read_text())
        absent = {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "requires_safety_checker": True,
        }
        absent |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
        (made / "model_index.json").write_text(json.dumps(index | absent))
    rows = {"pixel_classes": (10, 11), "edm": (0, 1), "latent": (4, 5)}.get(family)
    data = UNLABELLED if rows is None else Data(class_names=("cat", "dog"))
    folder = shared(tmp_path / "run", made, Adapter(rank=2, class_rows=rows), data, certified=True)
    opened = write_merged(tmp_path / "merged", [folder], [0.5], str(made))
    base, merged = load_base(str(made)), load_base(str(tmp_path / "merged"))
    wanted = answer(base, merge_adapter(copy.deepcopy(base.unet), folder, 0.5))
    if family == "stable_diffusion_1":
        index = json.loads((tmp_path / "merged" / "model_index.json").read_text())
        assert index["safety_checker"] == index["feature_extractor"] == [None, None]
        assert not {"safety_checker", "feature_extractor"} & {path.name for path in (tmp_path / "merged").iterdir()}
    if family in PIPELINES:
        stock = PIPELINES[family].from_pretrained(tmp_path / "merged")
        assert opened == f'{PIPELINES[family].__name__}.from_pretrained("FOLDER")'
        if base.text is not None:
            stock.set_progress_bar_config(disable=True)
            stock("a cat", height=16, width=16, num_inference_steps=1)
        net = stock.unet
    else:
        assert opened == 'UNet2DModel.from_pretrained("FOLDER", subfolder="unet")'
        net = UNet2DModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    for found in (answer(base, net.eval()), answer(merged, merged.unet)):
        assert (found - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    assert (wanted - answer(base, base.unet)).abs().max() > 1e-4
    assert merged.parts_digest == base.parts_digest and merged.scheduler.config == base.scheduler.config
    if rows is not None:
        assert merged.layout.spare_classes[0] == rows[-1] + 1, "the rows of its classes are spare no more"


def test_a_merged_folder_tells_its_promises_and_no_place_and_certifies_nothing(tmp_path):
    made = BASES["latent"](tmp_path / "secret place" / "base")
    for name in ("vae/config.json", "scheduler/scheduler_config.json"):  # as save_pretrained writes it of a fetched one
        config = json.loads((made / name).read_text())
        (made / name).write_text(json.dumps(config | {"_name_or_path": str(made)}))
    folders = [shared(tmp_path / n, made, data=UNLABELLED, seed=ord(n), certified=n == "a") for n in "ab"]
    write_merged(tmp_path / "merged", folders, [1.0, 0.25], str(made))
    text = (tmp_path / "merged" / "README.md").read_text()
    assert markdown(read(folders[0])["statement"]) in text and "## Source 2: b, at weight 0.25" in text
    assert "No certificate belongs to this adapter" in text and "their losses of privacy add up" in text
    copied = tmp_path / "merged" / "privacy-of-source-1.json"
    assert copied.read_bytes() == (folders[0] / "privacy.json").read_bytes()
    assert not (tmp_path / "merged" / "privacy.json").exists() and not verify(tmp_path / "merged").ok
    for path in (tmp_path / "merged").rglob("*"):
        assert path.is_dir() or b"secret place" not in path.read_bytes(), path


def test_a_merged_folder_is_whole_or_not_there_and_never_mixed_with_another(tmp_path):
    made = BASES["pixel"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, Adapter(rank=2, target_modules=("to_q", "conv_in")), UNLABELLED)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="merged is not empty"):
        write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    with pytest.raises(UserError, match="does not fit conv_in of this model"):
        write_merged(tmp_path / "other", [folder], [1.0], str(BASES["latent"](tmp_path / "latent")))
    assert not (tmp_path / "other").exists()


def test_a_promise_that_does_not_verify_is_quoted_nowhere(tmp_path):
    made = BASES["pixel"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, data=UNLABELLED, certified=True)
    document = json.loads((folder / "privacy.json").read_text())
    statement = document["statement"].replace("epsilon 1,", "epsilon 0.1,")
    assert statement != document["statement"]
    (folder / "privacy.json").write_text(json.dumps(document | {"statement": statement, "key_source": "given"}))
    with pytest.raises(PrivacyError, match=r"\(figures, key\).*type: dp-peft verify .*run"):
        write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    assert not (tmp_path / "merged").exists()


def test_names_that_strangers_chose_are_shown_and_not_obeyed(tmp_path):
    made = BASES["pixel"](tmp_path / "a`b<img>")
    folder = shared(tmp_path / "[x](http://a.b)".replace("/", ""), made, data=UNLABELLED, base_name="./base")
    write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "Source 1: \\[x\\](http:a.b)" in text and "Base: `` ./a`b<img> ``" in text
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps(index | {"_class_name": "```\n# Safe\n"}))
    with pytest.raises(UserError, match="names no pipeline"):
        write_merged(tmp_path / "other", [folder], [1.0], str(made))


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    made = BASES["pixel"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, data=UNLABELLED)

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
    with pytest.raises(RunError, match=r"No space left on device.*make room"):
        write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_nothing_is_merged_into_a_shareable_folder(tmp_path):
    made = BASES["pixel"](tmp_path / "base")
    plain = shared(tmp_path / "plain", made, data=UNLABELLED)
    other = shared(tmp_path / "other", made, data=UNLABELLED, certified=True)
    for place in (other / "deep" / "merged", plain / "merged"):
        with pytest.raises(UserError, match=r"--output_dir .*merged lies in .*(other|plain), whose certificate"):
            write_merged(place, [plain], [1.0], str(made))
    assert verify(other).ok


def test_a_pickle_and_weights_of_another_precision_stay_behind(tmp_path):
    made = BASES["latent_vq"](tmp_path / "base")
    (made / "vqvae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (made / "vqvae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    folder = shared(tmp_path / "run", made, data=UNLABELLED)
    write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    assert sorted(path.name for path in (tmp_path / "merged" / "vqvae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_whole_model_on_latents_is_merged_with_its_autoencoder(tmp_path):
    made = BASES["latent_vq"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, Adapter(kind="full"), UNLABELLED)
    write_merged(tmp_path / "merged", [folder], [1.0], str(made))
    stock = LDMPipeline.from_pretrained(tmp_path / "merged")
    trained = UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in stock.unet.state_dict().items())


def test_the_command_merges_warns_and_says_how_to_go_on(tmp_path):
    made = BASES["pixel"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, data=UNLABELLED, certified=True)
    other = BASES["pixel"](tmp_path / "other")
    unet = UNet2DModel.from_pretrained(other, subfolder="unet")
    unet.conv_in.weight.data += 1
    unet.save_pretrained(other / "unet")
    words = ["--adapter", folder, "--adapter_weight", 0.01, "--base", other, "--output_dir", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(word) for word in ["merge", *words, "--dtype", "bfloat16"]])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2 and "is another base: weights" in lines[0] and "rounding to bfloat16" in lines[1]
    assert "merged: " in result.stdout and "DDPMPipeline.from_pretrained" in result.stderr
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    assert "no certificate" not in result.stderr.lower()
    (folder / "privacy.json").unlink()
    words[-1] = tmp_path / "uncertified"
    result = CliRunner().invoke(main, ["merge", *map(str, words)])
    assert result.exit_code == 0 and f"warning: {folder} has no privacy.json. No certificate" in result.stderr
    kept = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
