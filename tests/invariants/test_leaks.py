"""Nothing private outside the private folder: the commands run for real, then everything they left is searched."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from leak_scan import Number, find
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tiny_bases import stable_diffusion_1
from tiny_models import tiny_base_folder, tiny_image_folder

from dp_peft_diffusion import preparation, training
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, Train

ROOT = Path(__file__).resolve().parents[2]
N = 4127
PIXELS = np.random.default_rng(77).integers(1, 255, 16, dtype=np.uint8)
TEXTS = {
    "folder": "zanzibar-clinic-qx71",
    "file": "ward-vk93-scan",
    "caption": "caption-hy62-tibia",
    "owner": "owner-jw58-smith",
    "label": "label-pz44-sarcoma",
    "note": "pngtext-ub27-mrn",
}
SMALL = [
    "--target_modules", "to_q,to_out.0", "--max_train_steps", "2", "--micro_batch_size", "8", "--noise_multiplier", "4",
    "--noise_multiplicity", "1", "--sample_num_images", "4", "--sample_num_inference_steps", "2",
]  # fmt: skip
HIDDEN = [
    "--neighboring_relation", "add_or_remove_one", "--sampling_prob", "0.001", "--train_batch_size", "10",
    "--group_column", "owner", "--max_examples_per_group", "2", "--class_names", "red,blue", "--gamma", "0.01",
]  # fmt: skip
KNOWN = ["--train_batch_size", "3", "--gamma", "0.01"]
TOLD = [
    "--train_batch_size", "3", "--caption_column", "caption", "--sample_prompts", "a cat", "--augmentations", "shift",
    "--gamma", "0.01", "--output_dir", "runs/told",
]  # fmt: skip
SPY = """
import json, os, shutil, sys
from pathlib import Path

place, control = Path(sys.argv[1]), Path(sys.argv[2])
kept, busy = control / "removed", False
kept.mkdir()

def watch(event, arguments):
    # What is removed or overwritten was on the disk for a while: it is kept for the search.
    global busy
    if busy or event not in ("os.remove", "shutil.rmtree", "os.rename", "open"):
        return
    busy = True
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) and isinstance(path, str) and path != os.devnull:
            if place not in Path(path).absolute().parents:
                with open(control / "elsewhere", "a") as file:
                    file.write(path + "\\n")
    else:
        path = Path(os.fsdecode(arguments[event == "os.rename"]))
        if path.exists() and not any(part.endswith(".private") for part in path.absolute().parts):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, kept / f"{len(list(kept.iterdir()))}-{path.name}")
    busy = False

sys.addaudithook(watch)
from dp_peft_diffusion.privacy import randomness

def spied(original):
    def call(*arguments):
        global busy
        key, busy = original(*arguments), True
        with open(control / "keys", "a") as file:
            file.write(key.hex() + "\\n")
        busy = False
        return key
    return call

randomness.new_key, randomness.attempt_key = spied(randomness.new_key), spied(randomness.attempt_key)
from dp_peft_diffusion.cli import main
from dp_peft_diffusion.sharing import reloading

def once(job, original=reloading.in_fresh_process):
    # The first run is loaded again in a fresh process, which takes seconds to begin; the others in this one.
    reloading.in_fresh_process = reloading.stock_reload.reload
    return original(job)

reloading.in_fresh_process = once

for words in json.loads(sys.argv[3]):
    try:
        main(words, prog_name="dp-peft")
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def private_images(place: Path) -> tuple[Path, Path]:
    """A parquet file of N rows with groups, captions and bad labels; and a folder of images, one of them broken."""
    rng, encoded = np.random.default_rng(0), []
    folder = place / TEXTS["folder"] / "images"
    for index in range(8):
        pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        pixels[4] = PIXELS
        info = PngInfo()
        info.add_text("Comment", TEXTS["note"])
        path = folder / ("red", "blue")[index % 2] / f"{TEXTS['file']}-{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, pnginfo=info)
        encoded.append(path.read_bytes())
    (folder / "red" / f"{TEXTS['file']}-broken.png").write_bytes(PIXELS.tobytes())
    columns = {
        "image": pa.array([encoded[index % 8] for index in range(N)]),
        "label": pa.array(["red", "blue", TEXTS["label"]] * (N // 3) + ["red"] * (N % 3)),
        "owner": pa.array([f"{TEXTS['owner']}-{index // 5}" for index in range(N)]),
        "caption": pa.array([f"{TEXTS['caption']}-{index}" for index in range(N)]),
    }
    table = place / TEXTS["folder"] / f"{TEXTS['file']}.parquet"
    pq.write_table(pa.table(columns), table, compression="none", use_dictionary=False)
    return table, folder


class Left(NamedTuple):
    """What the commands left behind."""

    place: Path  # everything they could write to, without the private folders
    private: Path
    removed: Path  # what they removed again
    elsewhere: str  # paths written to outside `place`
    output: str
    data: Path
    secrets: dict[str, object]


def run_commands(commands: list[list[str]], place: Path, control: Path) -> str:
    """Run commands one after the other in a process of its own, home and temporary folder in `place`; their output."""
    homes = {name: str(place / name) for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    for home in homes.values():
        Path(home).mkdir()
    settings = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SPY, str(place), str(control), json.dumps(commands)]
    done = subprocess.run(words, env=os.environ | homes | settings, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """After a group run that hides N, a run on an image folder, one on captions, and the commands that follow."""
    place, control = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("control")
    base = str(tiny_base_folder(tmp_path_factory.mktemp("base") / "base"))
    table, folder = private_images(tmp_path_factory.mktemp("data"))
    train = ["train", "--pretrained_model_name_or_path", base, *SMALL]
    hidden = [*train, "--dataset_name", str(table), "--output_dir", "runs/hidden", *HIDDEN]
    known = [*train, "--dataset_name", str(folder), "--output_dir", "runs/known", *KNOWN]
    text_base = str(stable_diffusion_1(tmp_path_factory.mktemp("text") / "base"))
    captioned = table.with_name("captioned.parquet")
    pq.write_table(pq.read_table(table).slice(0, 8), captioned)
    told = ["train", "--pretrained_model_name_or_path", text_base, *SMALL, "--dataset_name", str(captioned), *TOLD]
    sample = ["sample", "--adapter", "runs/hidden", "--base", base, "--num_images", "4", "--output_dir", "images"]
    follow = [told, sample, ["verify", "runs/hidden"], ["inspect", "runs/known"], ["spent"]]
    output = run_commands([hidden, hidden, known, *follow], place, control)
    keys = [bytes.fromhex(key) for key in (control / "keys").read_text().split()]
    assert len(keys) == 6, "of each run, its key and that of its streams"
    secrets = TEXTS | {"pixels": PIXELS, "N": Number(N)} | {f"key {index}": key for index, key in enumerate(keys)}
    grouped = {"group_column": "owner", "max_examples_per_group": 2, "class_names": ("red", "blue")}
    for name, data in (("table", Data(dataset_name=str(table), **grouped)), ("folder", Data(dataset_name=str(folder)))):
        images = open_examples(data, PixelEncoder(16, 1), None)
        secrets |= {f"{name} source": images.source_digest, f"{name} content": images.content_digest}
    wanted = Data(dataset_name=str(captioned), caption_column="caption", augmentations=("shift",))
    encoded = open_examples(wanted, load_base(text_base), None)
    latents, _, _, captions = encoded.read([2])
    secrets |= {"latent": latents[0, 0, 0, 0].numpy().tobytes(), "told content": encoded.content_digest}
    secrets["embedding"] = captions["encoder_hidden_states"][0, 1].half().numpy().tobytes()
    (control / "private").mkdir()
    for private in (place / "runs").glob("*.private"):
        private.rename(control / "private" / private.name)
    elsewhere = (control / "elsewhere").read_text() if (control / "elsewhere").exists() else ""
    return Left(place, control / "private", control / "removed", elsewhere, output, table.parent, secrets)


def test_nothing_private_leaves_the_private_folder(left):
    assert {"hidden", "known", "told"} == {path.parent.name for path in left.place.rglob("privacy.json")}
    assert find(left.secrets, left.place, left.removed, left.output) == set()
    assert left.elsewhere == ""


def test_the_ledger_of_spending_is_for_its_owner_alone(left):
    ledgers = left.place / "XDG_STATE_HOME" / "dp-peft"
    assert len(list(ledgers.glob("*.jsonl"))) == 3
    assert ledgers.stat().st_mode & 0o077 == 0


def test_the_same_search_finds_the_secrets_where_they_do_lie(left):
    assert {name for name, _ in find(left.secrets, left.data)} >= {*TEXTS, "pixels"} - {"folder"}
    assert {name for name, _ in find(left.secrets, left.private)} >= {
        "folder", "file", "label", "folder content", "table content", "told content",
    }  # fmt: skip


# The search itself

KEY = bytes(range(140, 156))
GRID = np.random.default_rng(1).integers(0, 256, (48, 48), dtype=np.uint8)
GRID[20, 16:32] = PIXELS
PICTURE = GRID[16:32, 16:32]


def png(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def comment() -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", "by pt-4471-muller", zip=True)
    return info


def packed(picture: np.ndarray, dtype: torch.dtype) -> bytes:
    """A picture as a network sees it, in a safetensors file."""
    clean = torch.tensor(picture)[None, None].float() / 127.5 - 1
    return save({"clean": torch.nn.functional.pixel_unshuffle(clean, 2).to(dtype)})


HIDINGS = {
    "text": {
        "utf-8": b"see pt-4471-muller.png",
        "utf-16": "see pt-4471-muller.png".encode("utf-16"),
        "hex": b"see pt-4471-muller.png".hex().encode(),
        "base64": base64.b64encode(b"see pt-4471-muller.png"),
        "image.png": png(GRID.T, pnginfo=comment()),
        "pt-4471-muller.txt": b"",
        "pt-4471-muller/any": b"",
    },
    "key": {
        "raw": b"....." + KEY + b".",
        "hex": KEY.hex().upper().encode(),
        "base64": base64.b64encode(b".." + KEY),
        "file.safetensors": save({"key": torch.tensor(list(KEY), dtype=torch.uint8)}),
    },
    "pixels": {
        "raw": PICTURE.tobytes(),
        "text": json.dumps(PICTURE.tolist()).encode(),
        "grid.png": png(GRID),
        "enlarged.png": png(GRID.repeat(2, 0).repeat(2, 1)),
        "grid-rgb.png": png(np.repeat(GRID[..., None], 3, 2)),
        "file.safetensors": save({"x": torch.tensor(PICTURE).float() / 255}),
        "packed.safetensors": packed(PICTURE, torch.float32),
        "bfloat16.safetensors": packed(PICTURE, torch.bfloat16),
    },
    "N": {
        "words": b"trained on 4,127 images.",
        "json": b'{"rows":[3,4127]}',
        "file.safetensors": save({"n": torch.tensor([N])}),
        "4127.csv": b"",
    },
}
INNOCENT = b"0.4127 41270 14127 a4127b 4.127 4128 pt-4471-mullex " + KEY[:-1] + PIXELS[:-2].tobytes()


@pytest.mark.parametrize(("secret", "name"), [(secret, name) for secret, names in HIDINGS.items() for name in names])
def test_the_search_finds_each_secret_in_each_kind_of_file(tmp_path, secret, name):
    secrets = {"text": "pt-4471-muller", "key": KEY, "pixels": PIXELS, "N": Number(N)}
    (tmp_path / "innocent").write_bytes(INNOCENT)
    (tmp_path / "innocent.png").write_bytes(png(GRID.T))
    assert find(secrets, tmp_path) == set()
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(HIDINGS[secret][name])
    assert {found for found, _ in find(secrets, tmp_path)} == {secret}


def test_the_search_finds_secrets_in_output():
    assert find({"folder": "zanzibar", "N": Number(N)}, "Images  /data/zanzibar (train), 4,127 rows") == {
        ("folder", "text"),
        ("N", "text"),
    }


# N under add_or_remove_one


def test_under_add_or_remove_one_neither_plan_nor_files_depend_on_the_number_of_images(tmp_path, monkeypatch):
    """What a run says and writes, but for noisy weights and what hangs on them, with 8 images and with 80."""
    monkeypatch.setattr(preparation, "measure_micro_batch", lambda *arguments: (0.5, 10**8))
    base, seen = tiny_base_folder(tmp_path / "base"), []
    for count in (8, 80):
        folder = tmp_path / str(count)
        images = tiny_image_folder(folder / "images", {"dark": 20, "light": 220}, count // 2)
        recipe = Recipe(
            model=Model(pretrained_model_name_or_path=str(base)),
            data=Data(dataset_name=str(images)),
            adapter=Adapter(target_modules=("to_q",)),
            privacy=Privacy(epsilon=8.0, neighboring_relation="add_or_remove_one", sampling_prob=0.2, gamma=0.1),
            train=Train(train_batch_size=20, max_train_steps=2),
            sample=Sample(num_images=4, num_inference_steps=2),
        )
        prepared = training.prepare(recipe, folder / "run")
        plan = training.plan_text(prepared).replace(str(folder), "")
        result = training.run(prepared)
        certificate = {name: value for name, value in result.certificate.items() if name != "sha256"}
        names = sorted(path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*"))
        texts = [(result.folder / name).read_text() for name in ("README.md", "recipe.yaml", "adapter_config.json")]
        sizes = [(result.folder / name).stat().st_size for name in names if name.endswith("safetensors")]
        seen.append((plan, certificate, names, texts, sizes))
    assert seen[0] == seen[1]
