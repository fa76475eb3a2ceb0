"""Every command that the README and the pages show, run: on small stand-ins, with options that make it short.

Those at the head of a recipe are run in tests/recipe. So are the Python blocks, but for those that run elsewhere.
"""

import re
import shlex

import pytest
import torchvision
from PIL import Image
from stand_ins import HUB_BASE, StandIns, lead_to_stand_ins, type_in
from test_documentation import PAGES, ROOT, command_lines, fenced

from dp_peft_diffusion import training

# A command -> what has to be typed before it, since no stand-in can be made otherwise.
AFTER = {
    "dp-peft pretrain --recipe handwriting-captions --dataset_name PATH_TO_OMNIGLOT": (
        "dp-peft pretrain --recipe handwriting-captions-vae --dataset_name PATH_TO_OMNIGLOT"
    ),
    "dp-peft pretrain --recipe handwriting-codes --dataset_name PATH_TO_OMNIGLOT"
    " --features runs/handwriting-codes-features/features": (
        "dp-peft pretrain --recipe handwriting-codes-features --dataset_name PATH_TO_OMNIGLOT"
    ),
    "dp-peft pretrain --kind codes --dataset_name PATH_TO_PUBLIC_IMAGES --features runs/images-features/features": (
        "dp-peft pretrain --kind features --dataset_name PATH_TO_PUBLIC_IMAGES --output_dir runs/images-features"
    ),
    "dp-peft train --adapter full --pretrained_model_name_or_path runs/omniglot-colour-base/base --dataset_name"
    " PATH_TO_CIFAR10 --epsilon 10 --train_batch_size 2048 --max_train_steps 24 --noise_multiplicity 2 --learning_rate"
    " 0.003 --label_dropout 0 --ema_decay 0.8 --micro_batch_size 32 --output_dir runs/cifar10-eps10": (
        "dp-peft pretrain --kind pixel --dataset_name PATH_TO_OMNIGLOT --image_channels 3 --pixel_packing 2"
        " --output_dir runs/omniglot-colour-base"
    ),
    "dp-peft verify runs/audited --escrow_key ../keys/audited.json --dataset_name builtin:digits": (
        "dp-peft train --recipe digits --output_dir runs/audited --escrow_key ../keys/audited.json"
    ),
}
# The same, but what is typed before is stopped after its first saved state.
AFTER_A_STOP = {
    "dp-peft train --config mine.yaml --output_dir runs/mine --new_attempt": (
        "dp-peft train --config mine.yaml --output_dir runs/mine"
    ),
}
# What a sentence says of a command in short -> a command that does it.
IN_SHORT = {
    "dp-peft pretrain --kind captions": (
        "dp-peft pretrain --kind captions --dataset_name PATH_TO_PUBLIC_IMAGES --vae PATH_TO_AUTOENCODER"
    ),
    "dp-peft pretrain --kind codes": (
        "dp-peft pretrain --kind codes --dataset_name PATH_TO_PUBLIC_IMAGES --features runs/images-features/features"
    ),
    "dp-peft pretrain --kind features": "dp-peft pretrain --kind features --dataset_name PATH_TO_PUBLIC_IMAGES",
    "dp-peft sample --relabel": "dp-peft sample --adapter runs/mnist-eps1 --relabel",
    "dp-peft train --pretrained_model_name_or_path merged": (
        "dp-peft train --pretrained_model_name_or_path merged --dataset_name path/to/images --epsilon 8"
    ),
}
# A word of a command -> why it takes long.
SLOW = {
    "bench": "every method that it compares is timed in several processes",
    "--membership": "an attack wants thousands of losses; tests/cli/test_evaluation.py has fewer images",
    "--private_classifier": "120 private steps on 1,437 images; tests/cli/test_evaluation.py takes two on 80",
}
# Words of a Python block -> why it is not run here.
ELSEWHERE = {
    "torch.arange(1937": "tests/invariants/test_readme.py runs it on the real base",
    "StableDiffusionXLPipeline.from_pretrained": "tests/diffusion/test_merging.py does the same with small pipelines",
    'Case("unet2d-4.6m"': "a measurement of minutes; tests/evaluation/test_benchmark.py measures less",
    'load_lora_weights("adapters/': "tests/sharing/test_gallery.py runs it on the real base",
    "inject_into(transformer": "a line of a larger program; tests/diffusion/test_adapter_kinds.py does the same",
}
TUTORIALS = ROOT / "docs" / "tutorials"  # tests/test_tutorials.py runs them as they stand
# What a Python block asks of a machine, a network or a user's patience.
SHORTER_PYTHON = {
    HUB_BASE: "PATH_TO_BASE",
    'device="cuda"': 'device="cpu"',
    "num_inference_steps=100": "num_inference_steps=2",
}


def documented() -> list[str]:
    return sorted({line for page in PAGES for line in command_lines(page.read_text())})


def is_slow(line: str) -> bool:
    words = shlex.split(line, comments=True)
    return len(words) > 2 and bool(SLOW.keys() & set(words))


def python_pages() -> list:
    pages = [page for page in PAGES if TUTORIALS not in page.parents and blocks(page)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def blocks(page) -> list[str]:
    found = [content for language, content in fenced(page.read_text()) if language == "python"]
    return [content for content in found if not any(words in content for words in ELSEWHERE)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to type in, with a folder for keys beside it, and no ledgers."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # the ledgers of data sets
    (tmp_path / "keys").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def lay_out(line: str, stand_ins: StandIns, workplace) -> None:
    """Put there what a command names, but for the folder that it makes."""
    words = shlex.split(line, comments=True)
    made = {word for option, word in zip(words, words[1:], strict=False) if option == "--output_dir"}
    for name in dict.fromkeys(word for word in words if word not in made and not (workplace / word).exists()):
        stand_ins.put(name, workplace, with_captions="--caption_column" in words)


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line, marks=[pytest.mark.slow] if is_slow(line) else []) for line in documented()]
)
def test_every_documented_command_runs(line, stand_ins, workplace, monkeypatch):
    lead_to_stand_ins(monkeypatch, stand_ins, builtin="adapters/" not in line)
    line = IN_SHORT.get(line, line)
    lay_out(line, stand_ins, workplace)
    if line in AFTER:
        lay_out(AFTER[line], stand_ins, workplace)
        assert type_in(AFTER[line]).exit_code == 0
    if line in AFTER_A_STOP:
        stop(AFTER_A_STOP[line], monkeypatch)
    result = type_in(line)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def stop(line: str, monkeypatch) -> None:
    """Type a command and stop it when its first state is saved."""
    save = training.save_state

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save_and_stop)
        assert type_in(line).exit_code == 130


@pytest.mark.parametrize("page", python_pages())
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, stand_ins, workplace, monkeypatch):
    lead_to_stand_ins(monkeypatch, stand_ins)
    monkeypatch.setattr(torchvision.datasets, "MNIST", SmallMnist)
    code = "\n".join(blocks(page))
    for long, short in SHORTER_PYTHON.items():
        code = code.replace(long, short)
    for name in sorted(set(re.findall(r'"([\w./-]+)"', code))):
        stand_ins.put(name.removesuffix("/ann-1.png"), workplace)
    exec(compile(code, str(page), "exec"), {})


class SmallMnist(list):
    """What torchvision's MNIST is like, without the download."""

    classes = ("0 - zero", "1 - one")

    def __init__(self, root: str, train: bool, download: bool):
        super().__init__([(Image.new("L", (28, 28)), 0), (Image.new("L", (28, 28)), 1)])


@pytest.mark.parametrize("line", ["dp-peft verify runs/nowhere", "dp-peft sample --adapter runs/nowhere"])
def test_a_command_that_names_what_nobody_has_fails(line, stand_ins, workplace, monkeypatch):
    lead_to_stand_ins(monkeypatch, stand_ins)
    lay_out(line, stand_ins, workplace)
    assert type_in(line).exit_code == 2


def test_what_is_said_of_commands_and_blocks_here_is_said_of_documented_ones():
    assert {*AFTER, *AFTER_A_STOP, *IN_SHORT} <= set(documented())
    slow = [set(line.split()) for line in documented() if is_slow(line)]
    assert all(any(word in line for line in slow) for word in SLOW)
    text = "\n".join(page.read_text() for page in PAGES)
    assert [words for words in ELSEWHERE if words not in text] == []
