"""Folders made to do harm: refused for the right reason, quickly, in little memory, with nothing run or unpickled."""

import contextlib
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import check_adapter, check_weights_of
from tests.privacy import strangers
from tests.privacy.strangers import A, B

ROOT = Path(__file__).resolve().parents[2]
BOMB = r"(([a-z_])+)+\.\d+X"
MAX_SECONDS, MAX_BYTES = 10, 500e6


def configured(**changes):
    return lambda folder: strangers.write_config(folder, strangers.config(**changes))


def with_tensors(change):
    def plant(folder):
        arrays = strangers.tensors()
        change(arrays)
        strangers.write_tensors(folder, arrays)

    return plant


def with_number(value, index=0):
    return with_tensors(lambda arrays: arrays[A].__setitem__((0, index), value))


def renamed(old, new):
    return with_tensors(lambda arrays: arrays.__setitem__(new, arrays.pop(old)))


def bfloat16_infinity(folder):
    arrays = {name: np.zeros(array.shape, "<u2") for name, array in strangers.tensors().items()}
    arrays[B][-1, -1] = 0xFF80  # -inf
    strangers.write_tensors(folder, arrays, dtypes=dict.fromkeys(arrays, "BF16"))


def typed(kind, dtype):
    def plant(folder):
        arrays = {name: np.zeros(array.shape, kind) for name, array in strangers.tensors().items()}
        strangers.write_tensors(folder, arrays, dtypes=dict.fromkeys(arrays, dtype))

    return plant


def many_tensors(folder):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{n}":{entry}' for n in range(200_000)) + "}").encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def too_many_tensors(folder):
    strangers.write_tensors(folder, {f"t{n}": np.zeros(0, np.float32) for n in range(2001)})


def sparse(folder):
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(300 << 20)


def header_length(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + path.read_bytes()[8:])


def overlapping(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[768, 1536]", b"[ 76, 1536]"))


def huge_shape(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[2, 96]", b"[-1, 9]", 1))


def raw_config(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def appended(folder):
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"secret")


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def metadata(folder):
    strangers.write_tensors(folder, strangers.tensors(), metadata={"format": "pt", "note": "x" * 60_000})


def large_metadata(folder):
    strangers.write_tensors(folder, strangers.tensors(), metadata={"format": "x" * 50_000_000})


def wrong_base(folder):
    strangers.write_base_of(folder, sha256="0" * 64)


def base_elsewhere(folder):
    strangers.write_base_of(folder, name="builtin:../bases/handwriting")


def no_base(folder):
    strangers.write_base_of(folder, name="builtin:handwriting_features")


def pipe(folder):
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def token_rows(rows, count):
    def plant(folder):
        strangers.write_config(folder, strangers.config(trainable_token_indices={"class_embedding": rows}))
        name = "base_model.model.class_embedding.token_adapter.trainable_tokens_delta"
        strangers.write_tensors(folder, strangers.tensors() | {name: np.zeros((count, 128), np.float32)})

    return plant


def of_another_width(folder):
    strangers.write_tensors(folder, strangers.tensors(width=64))


# Each is a good folder but for one thing: (what is planted, the reason that must be given).
HOSTILE = {
    "a pattern that hangs a matcher": (configured(target_modules=BOMB), "target_modules is '.*plain module names"),
    "the same in a list": (configured(target_modules=[BOMB]), "target_modules is .*plain module names"),
    "the same as an exclusion": (configured(exclude_modules=BOMB), "exclude_modules is .*not null"),
    "the same as a layer pattern": (configured(layers_pattern=BOMB, layers_to_transform=[0]), "layers_"),
    "the same in rank_pattern": (configured(rank_pattern={BOMB: 2}), "rank_pattern is .*plain module name"),
    "the same in alpha_pattern": (configured(alpha_pattern={BOMB: 2}), "alpha_pattern is .*plain module name"),
    "the same for parameters": (configured(target_parameters=[BOMB]), "target_parameters is"),
    "every linear layer": (configured(target_modules="all-linear"), "target_modules is 'all-linear'"),
    "no target": (configured(target_modules=[]), "target_modules is empty"),
    "200,000 targets": (configured(target_modules=["to_q"] * 200_000), "larger than 1048576 bytes"),
    "a layer that is no target": (
        configured(target_modules=["to_q", "to_v", "to_k"]),
        "to_out.0, which target_modules",
    ),
    "a target without tensors": (
        configured(target_modules=[*strangers.TARGETS, "conv1"]),
        "conv1, for which there are",
    ),
    "a rank of two million": (configured(r=2_000_000), "r is 2000000, and not a rank.* 1 to 256"),
    "the same for one layer": (configured(rank_pattern={"to_q": 2_000_000}), "rank_pattern is .*1 to 256"),
    "a rank of 4,000 digits": (raw_config(json.dumps(strangers.config()).replace("2", "9" * 4000, 1)), "a number of 4"),
    "rank 0": (configured(r=0), "r is 0, and not a rank"),
    "rank true": (configured(r=True), "r is True, and not a rank"),
    "rank 2.0": (configured(r=2.0), "r is 2.0, and not a rank"),
    "a rank other than the tensors'": (configured(r=4, lora_alpha=4), "are not of rank 4"),
    "a rank of a layer that is none": (configured(rank_pattern={"conv1": 2}), "conv1 has a rank .* no target"),
    "alpha 1e38": (configured(lora_alpha=1e38), "lora_alpha is 1e.38, and not a positive number"),
    "alpha 0": (configured(lora_alpha=0), "lora_alpha is 0, and not a positive number"),
    "alpha -2": (configured(lora_alpha=-2), "lora_alpha is -2, and not a positive number"),
    "alpha a hundred times the rank": (configured(lora_alpha=200), "an alpha of 200 is more than 64 times the rank 2"),
    "the same for one layer by pattern": (configured(alpha_pattern={"to_q": 200}), "an alpha of 200 is more than"),
    "alpha NaN": (raw_config('{"peft_type": "LORA", "lora_alpha": NaN}'), "not strict JSON: NaN is not a number"),
    "alpha 1e999": (raw_config('{"peft_type": "LORA", "lora_alpha": 1e999}'), "not strict JSON: 1e999 is too large"),
    "a key twice": (raw_config('{"peft_type": "LORA", "r": 2, "r": 2000000}'), "not strict JSON: a key appears twice"),
    "nesting": (raw_config("[" * 500_000), "not strict JSON: maximum recursion depth"),
    "an integer of a million digits": (raw_config("9" * 1_000_000), "not strict JSON: Exceeds the limit"),
    "a lone surrogate": (raw_config(r'{"peft_type": "LORA", "revision": "\ud800"}'), "not strict JSON: .*surrogates"),
    "no object": (raw_config("[]"), "peft_type None; this version opens LORA"),
    "a config of 2 MB": (raw_config(" " * (2 << 20)), "adapter_config.json is larger than 1048576 bytes"),
    "a config that is a pipe": (pipe, "no adapter_config.json there"),
    "another peft type": (configured(peft_type="PREFIX_TUNING"), "peft_type 'PREFIX_TUNING'; this version opens"),
    "a peft type that is a list": (configured(peft_type=["LORA"]), r"peft_type \['LORA'\]; this version opens"),
    "an import by megatron": (configured(megatron_config={"a": 1}, megatron_core="os"), "megatron_config is"),
    "an import of a module": (configured(megatron_core="os.path"), "megatron_core is 'os.path'"),
    "an import by auto_mapping": (
        configured(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        "auto_mapping is .*null, or a model class of diffusers",
    ),
    "a relative import by auto_mapping": (
        configured(auto_mapping={"base_model_class": "x", "parent_library": "diffusers.models..os"}),
        "auto_mapping is",
    ),
    "arguments for a tokenizer": (configured(tokenizer_kwargs={"trust_remote_code": True}), "says 'tokenizer_kwargs'"),
    "a task with code of its own": (configured(task_type="CAUSAL_LM"), "task_type is 'CAUSAL_LM'"),
    "a second model to load": (configured(modules_to_save=["conv_in"]), "modules_to_save is"),
    "weights from data (EVA)": (configured(eva_config={"rho": 2}), "eva_config is"),
    "weights from data (CorDA)": (configured(corda_config={"cache_file": "/etc/passwd"}), "corda_config is"),
    "other weights than the file's": (configured(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "quantised weights": (configured(loftq_config={"loftq_bits": 4}), "loftq_config is"),
    "dropout": (configured(lora_dropout=0.5), "lora_dropout is 0.5"),
    "layers copied a thousand times": (configured(layer_replication=[[0, 1000]]), "layer_replication is"),
    "biases of the layers": (configured(bias="lora_only"), "bias is 'lora_only'"),
    "class rows beyond the table": (token_rows([0, 9_000_000], 2), "trainable_tokens_delta does not fit"),
    "more class rows than named": (token_rows([0, 1], 3), "2 class rows are named, and their tensor is of shape"),
    "a class row twice": (token_rows([1, 1], 2), "2 class rows are named"),
    "NaN": (with_number(np.nan), "lora_A.weight holds numbers that are not finite"),
    "infinity at the end": (with_number(np.inf, -1), "lora_A.weight holds numbers that are not finite"),
    "bfloat16 infinity": (bfloat16_infinity, "lora_B.weight holds numbers that are not finite"),
    "whole numbers for weights": (typed("<u4", "I32"), "is of type I32, which no weights are"),
    "200,000 tensors": (many_tensors, "header is cut off or above 1048576 bytes"),
    "2,001 tensors": (too_many_tensors, "holds 2001 tensors; at most 2000"),
    "a file of 300 MB": (sparse, "larger than 268435456 bytes"),
    "a header of a terabyte": (header_length, "header is cut off or above"),
    "tensors that overlap": (overlapping, "overlaps another, leaves a gap"),
    "a negative shape": (huge_shape, "shape or the offsets of tensor .* are not whole numbers"),
    "bytes after the end": (appended, "has bytes that belong to no tensor"),
    "a file cut off": (cut, "is cut off, or has bytes"),
    "60 kB of metadata": (metadata, "holds metadata other than"),
    "50 MB of metadata": (large_metadata, "header is cut off or above"),
    "a path for a name": (renamed(A, "../../../etc/passwd"), "unusual name '../../../etc/passwd'"),
    "a name that steers a terminal": (renamed(A, "\x1b[2J"), "unusual name"),
    "a missing tensor": (with_tensors(lambda arrays: arrays.pop(A)), "to_q has lora_B.weight and not the whole group"),
    "a tensor too many": (renamed(A, "base_model.model.x.y"), "is none of an adapter of this type"),
    "a tensor of no base": (renamed(A, "nowhere.lora_A.weight"), "belongs to no layer of a base"),
    "tensors of another base": (of_another_width, "does not fit mid_block.attentions.0.to_"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors there",
    ),
}
AGAINST_A_CERTIFICATE = {
    "another base than certified": (wrong_base, "trained on builtin:handwriting with weights 000000000000"),
    "a base outside the package": (base_elsewhere, "is no base of this version"),
    "a net for features as its base": (no_base, "is no base of this version"),
    "a certificate of no base": (lambda f: (f / "privacy.json").write_text("{}"), "privacy.json names no base"),
    "a certificate that is a list": (lambda f: (f / "privacy.json").write_text("[]"), "privacy.json names no base"),
    "a base without a hash": (lambda f: strangers.write_base_of(f, sha256=None), "no SHA-256 of the base"),
}


def test_there_are_enough_of_them():
    assert len(HOSTILE | AGAINST_A_CERTIFICATE) >= 40


@pytest.mark.parametrize("case", HOSTILE | AGAINST_A_CERTIFICATE)
def test_a_hostile_folder_is_refused_for_its_reason(tmp_path, case):
    strangers.write_base_of(strangers.write_adapter(tmp_path))
    plant, reason = (HOSTILE | AGAINST_A_CERTIFICATE)[case]
    check_adapter(tmp_path)
    plant(tmp_path)
    with pytest.raises((PrivacyError, UserError), match=reason):
        check_adapter(tmp_path)


@pytest.fixture(scope="module")
def handwriting():
    from dp_peft_diffusion.diffusion.base_model import load_base

    return load_base("builtin:handwriting").unet


@pytest.mark.parametrize("case", HOSTILE)
def test_no_hostile_folder_reaches_stock_peft(handwriting, tmp_path, case, monkeypatch):
    from dp_peft_diffusion.diffusion import merging

    monkeypatch.setattr(merging.PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("stock peft was asked"))
    strangers.write_adapter(tmp_path)
    plant, reason = HOSTILE[case]
    plant(tmp_path)
    with pytest.raises((PrivacyError, UserError), match=reason):
        merging.load_adapter(handwriting, tmp_path)


def test_the_folder_that_is_spoiled_above_loads_when_it_is_not_spoiled(handwriting, tmp_path):
    from dp_peft_diffusion.diffusion.merging import load_adapter

    loaded = load_adapter(copy.deepcopy(handwriting), strangers.write_adapter(tmp_path))
    weight = loaded.base_model.model.get_submodule(strangers.ATTENTION).to_q.lora_A["default"].weight
    assert np.array_equal(weight.detach().numpy(), strangers.tensors()[A])


COMMANDS = {  # that open an adapter; {} is its folder, and what they make lies beside it
    "sample": "sample --adapter {} --num_images 1 --output_dir {}-out",
    "sample, unmerged, beside a good one": "sample --adapter {}-good --adapter {} --unmerged --output_dir {}-out",
    "merge": "merge --adapter {} --output_dir {}-out",
    "evaluate": "evaluate {} --dataset_name builtin:digits --num_images 1",
    "export": "export {} --format kohya --output {}-out.safetensors",
    "push": "push {} somebody/something --dry_run",
    "verify": "verify {}",
}
RECIPE = "data: {class_names: [a]}\nadapter: {class_rows: [1937]}\nprivacy: {epsilon: 1}\n"


@pytest.mark.parametrize("case", HOSTILE)
def test_every_command_that_opens_an_adapter_refuses_a_hostile_one_in_one_line(tmp_path, case, monkeypatch):
    from dp_peft_diffusion.diffusion import merging

    monkeypatch.setattr(merging.PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("stock peft was asked"))
    for name in ("run", "run-good"):
        (strangers.write_adapter(tmp_path / name) / "recipe.yaml").write_text(RECIPE)
    plant, reason = HOSTILE[case]
    plant(tmp_path / "run")
    with contextlib.suppress(PrivacyError):  # what is missing or too large for a hash keeps no certificate
        strangers.certify(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    for name, words in COMMANDS.items():
        if name == "export" and case in ("tensors of another base", "class rows beyond the table"):
            continue  # which only the base can tell
        result = CliRunner().invoke(main, words.format(*[tmp_path / "run"] * words.count("{}")).split())
        assert result.exit_code in (2, 3), (name, result.output, result.exception)
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ") and isinstance(result.exception, SystemExit), (name, result.output)
        assert name in ("verify", "push") or re.search(reason, last), (name, last)  # which look at all files at once
    looked = CliRunner().invoke(main, ["inspect", str(tmp_path / "run")])  # which shows what is there
    assert looked.exit_code in (0, 2, 3) and isinstance(looked.exception, SystemExit | None), looked.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-good"], "nothing was made"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-run",)


PICKLES = ("adapter_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.pt")


def write_pickles(folder):
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Evil()))


# Audit hooks cannot be taken off again, so each use is a process of its own.
WATCHED = """
import sys, time
from pathlib import Path
seen = []
NEVER = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec")

def hook(event, arguments):
    opened = str(arguments[0]) if event == "open" else ""
    if event in NEVER or opened.endswith((".bin", ".pt", ".py", ".pkl")) and opened.startswith(FOLDERS):
        seen.append((event, str(arguments)))

FOLDERS, how = sys.argv[2], sys.argv[1]
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import check_adapter
from dp_peft_diffusion.privacy.certificate import verify
if how == "load":
    from dp_peft_diffusion.diffusion.merging import load_adapter
    from dp_peft_diffusion.diffusion.base_model import load_base
    unet = load_base("builtin:handwriting").unet
def verify_or_raise(folder):
    report = verify(folder)
    if not report.ok:
        raise PrivacyError(str(report.levels))

deeds = {"check": check_adapter, "verify": verify_or_raise, "load": lambda folder: load_adapter(unet, folder)}
sys.addaudithook(hook)
slowest = 0.0
for folder in sorted(Path(FOLDERS).iterdir()):
    begin = time.perf_counter()
    try:
        deeds[how](folder)
        assert folder.name == "good", folder
    except (PrivacyError, UserError) as error:
        assert folder.name != "good", error
    slowest = max(slowest, time.perf_counter() - begin)
assert not seen, seen
assert how == "load" or "torch" not in sys.modules
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(slowest, 1024 * int(peak))  # not ru_maxrss, which counts what the parent had
"""


@pytest.fixture(scope="module")
def hostile_folders(tmp_path_factory):
    above = tmp_path_factory.mktemp("hostile")
    for number, (plant, _) in enumerate(HOSTILE.values()):
        folder = strangers.write_adapter(above / f"{number:03d}")
        strangers.write_base_of(folder)
        write_pickles(folder)
        plant(folder)
    strangers.write_base_of(strangers.write_adapter(above / "good"))
    write_pickles(above / "good")
    return above


def watched(how, folders):
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, how, folders], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert not (ROOT / "evil-was-run").exists()
    return map(float, result.stdout.split())


def test_checking_needs_little_time_and_memory_runs_nothing_and_opens_no_pickle(hostile_folders):
    slowest, memory = watched("check", hostile_folders)
    assert slowest < MAX_SECONDS and memory < MAX_BYTES


def test_loading_runs_nothing_opens_no_pickle_and_asks_no_network(hostile_folders):
    slowest, _ = watched("load", hostile_folders)
    assert slowest < MAX_SECONDS


@pytest.fixture(scope="module")
def certified_hostile_folders(hostile_folders):
    """The same with the hashes of what was planted, so that every file is as certified; pickles are found by name."""
    for folder in hostile_folders.iterdir():
        for name in PICKLES:
            (folder / name).unlink()
        with contextlib.suppress(PrivacyError):  # what is missing or too large for a hash keeps no certificate
            strangers.certify(folder)
    return hostile_folders


def test_verify_refuses_what_is_certified_but_hostile_in_little_time_and_memory(certified_hostile_folders):
    slowest, memory = watched("verify", certified_hostile_folders)
    assert slowest < MAX_SECONDS and memory < MAX_BYTES


@pytest.mark.parametrize("case", ["a pattern that hangs a matcher", "NaN", "tensors of another base"])
def test_verify_on_the_command_line_says_why_and_exits_3(tmp_path, case):
    plant, reason = HOSTILE[case]
    plant(strangers.write_adapter(tmp_path))
    strangers.certify(tmp_path)
    result = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert result.exit_code == 3 and re.search(reason, result.stdout), result.output


def test_the_watch_would_see_a_pickle_and_a_connection(tmp_path):
    for deed in (
        "import pickle; pickle.loads(b'cos\\ngetcwd\\n.')",
        "import socket; socket.socket().connect_ex(('127.0.0.1', 9))",
        "open(FOLDERS + '/adapter_model.bin', 'rb')",
    ):
        write_pickles(strangers.write_adapter(tmp_path / "good"))
        code = WATCHED.replace("slowest = 0.0\n", f"slowest = 0.0\n{deed}\n")
        command = [sys.executable, "-c", code, "check", str(tmp_path / "good")]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0, deed


def model_changed(name, **changes):
    def plant(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return plant


HOSTILE_MODELS = {
    "a net that fills the memory": (
        model_changed("unet/config.json", block_out_channels=[8192] * 3),
        "config.json promises conv_in.weight",
    ),
    "a million layers": (model_changed("unet/config.json", layers_per_block=10**6), "layers_per_block is 1000000"),
    "64 layers": (model_changed("unet/config.json", layers_per_block=64), "promises down_blocks.0.resnets.1"),
    "a table of ten million rows": (
        model_changed("unet/config.json", num_class_embeds=10**7),
        "promises class_embedding",
    ),
    "a time table": (model_changed("unet/config.json", time_embedding_dim=30_000), "promises time_embedding.linear_1"),
    "no blocks": (model_changed("unet/config.json", block_out_channels=[]), "block_out_channels is empty"),
    "another class": (model_changed("unet/config.json", _class_name="Anything"), "_class_name is 'Anything'"),
    "a quantiser to import": (model_changed("unet/config.json", quantization_config={}), "'quantization_config'"),
    "a million timesteps": (
        model_changed("scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "num_train_timesteps is 1000000000",
    ),
    "negative packing": (model_changed("dp_peft_base.json", pixel_packing=-2), "pixel_packing is -2"),
    "no object": (
        lambda folder: (folder / "dp_peft_base.json").write_text("[]"),
        "dp_peft_base.json is not a JSON object",
    ),
    "no layout": (lambda folder: (folder / "dp_peft_base.json").unlink(), "dp_peft_base.json is missing"),
    "pickled weights": (
        lambda folder: next(folder.glob("unet/*.safetensors")).rename(folder / "unet/diffusion_pytorch_model.bin"),
        "diffusion_pytorch_model.safetensors is missing",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_MODELS)
def test_a_hostile_whole_model_is_refused_for_its_reason_before_diffusers_builds_it(tmp_path, case, monkeypatch):
    from dp_peft_diffusion.diffusion import merging

    monkeypatch.setattr(merging, "load_parts", lambda *_: pytest.fail("diffusers was asked"))
    strangers.write_base_of(strangers.write_model(tmp_path))
    plant, reason = HOSTILE_MODELS[case]
    assert "Fits builtin:handwriting" in check_adapter(tmp_path)
    plant(tmp_path)
    for check in (check_adapter, check_weights_of, merging.load_whole_model):
        with pytest.raises(PrivacyError, match=reason):
            check(tmp_path)


@pytest.mark.parametrize(("change", "reason"), [("lacks", "lacks weights: conv_norm_out.bias"), ("has", "not exactly")])
def test_a_whole_model_with_a_weight_too_few_or_too_many_is_refused(tmp_path, change, reason):
    from dp_peft_diffusion.diffusion.merging import load_whole_model

    strangers.write_base_of(strangers.write_model(tmp_path))
    path = next(tmp_path.glob("unet/*.safetensors"))
    arrays = load_file(path)
    if change == "lacks":
        del arrays["conv_norm_out.bias"]
    else:
        arrays["hidden"] = np.zeros(3, np.float32)
    save_file(arrays, path, {"format": "pt"})
    with pytest.raises(UserError, match="not of the shape of"):
        check_adapter(tmp_path)
    with pytest.raises((PrivacyError, UserError), match=reason):
        load_whole_model(tmp_path)
