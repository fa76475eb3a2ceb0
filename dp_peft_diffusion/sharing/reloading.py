"""The exported files, loaded again with stock tools in a fresh process, against the trained network (invariant 14)."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from dp_peft_diffusion.diffusion.adapters import Adapter
from dp_peft_diffusion.diffusion.base_folder import find_folder
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.class_rows import CLASS_TABLE
from dp_peft_diffusion.diffusion.conditions import ConditionTable
from dp_peft_diffusion.diffusion.merging import load_whole_model
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy.adapter_files import read_adapter
from dp_peft_diffusion.privacy.adapter_form import matches
from dp_peft_diffusion.privacy.adapter_layers import check_fit
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE
from dp_peft_diffusion.privacy.lora_files import check_lora_file
from dp_peft_diffusion.privacy.model_files import MODEL_FOLDER, read_base
from dp_peft_diffusion.sharing import stock_reload

ROWS = 64  # conditions that the re-loaded adapter is tried on
TOLERANCE = 1e-5  # largest difference of outputs between the trained and the re-loaded adapter
NAMES = {"peft": "stock peft", "diffusers": "stock diffusers", "whole": "stock diffusers"}
# Of this process's environment: where Python, its packages and its libraries lie, and how many threads it may use.
KEPT = (
    "PATH", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "SYSTEMROOT", "HF_HOME",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
)  # fmt: skip
NOT_LOST = "Nothing was published and nothing is lost: the same command tries again."


@dataclass(frozen=True)
class Reloaded:
    """What stock tools made of the exported files.

    layers: loader -> layers it injected. difference: of outputs, from the trained network. change: from the base.
    """

    layers: dict[str, int]
    difference: float
    change: float

    @property
    def sentence(self) -> str:
        """All of it in words."""
        counts = [
            NAMES[name] + ("" if name == "whole" else f": {count} layer{'s' * (count != 1)}")
            for name, count in self.layers.items()
        ]
        what = "training" if "whole" in self.layers else "the adapter"
        return (
            f"reloaded with {'; '.join(counts)}; outputs differ by {self.difference:.1g} from the trained; {what} "
            f"moves them by {self.change:.2g}"
        )


def check_reload(
    base: BaseModel, adapter: Adapter, conditions: ConditionTable, folder: Path, document: dict[str, Any] | None
) -> Reloaded:
    """Load the folder with stock tools, after our own checks of strangers' files, and compare. This is invariant 14.

    conditions: what the network is told of each class. document: the certificate, if there is one.

    Raises:
        RunError: the files would be refused, do not load, inject other layers than trained, answer otherwise, or do
            nothing.
    """
    place = check_files(base, adapter, folder, document)
    given = made_up_inputs(base, conditions)
    for name, copied in (
        ("before", lambda: copy.deepcopy(base.unet)),
        ("trained", lambda: as_float32_holds_it(adapter)),
    ):
        given[name] = stock_reload.answers(copied().cpu(), given).contiguous()  # one copy at a time
    loaders = ["whole"] if adapter.config is None else ["peft"]
    if (folder / LORA_FILE).is_file():
        loaders.append("diffusers")
    with tempfile.TemporaryDirectory(prefix="dp-peft-reload-") as scratch:
        tensors = Path(scratch) / "tensors.safetensors"
        save_file(given, tensors)
        job = {"network": type(base.unet).__name__, "base": place, "adapter": str(folder.resolve())}
        found = in_fresh_process({**job, "loaders": loaders, "tensors": str(tensors)})
    for name in loaders:
        judge(NAMES[name], found[name], None if name == "whole" else len(layers_that_train(base, adapter)), given)
    if adapter.class_rows is not None and len(adapter.class_rows.rows) > min(conditions.null, ROWS - 1):
        check_class_table(base, adapter, folder)
    return Reloaded(
        layers={name: found[name]["layers"] for name in loaders},
        difference=max(found[name]["difference"] for name in loaders),
        change=found[loaders[0]]["change"],
    )


@torch.no_grad()
def as_float32_holds_it(adapter: Adapter) -> nn.Module:
    """A copy of the trained net, with class rows that travel whole, and alpha folded into B, as float32 has them.

    Outputs are compared in float64, in which the trained net would go without these two roundings of its export, and
    large weights would magnify the difference. Both are computed here from the layers that trained, not from the
    files, which remain what is checked.
    """
    unet = copy.deepcopy(adapter.unet)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight *= layer.scaling["default"]
            layer.scaling["default"] = 1.0
    as_lora = isinstance(adapter.config, LoraConfig) and CLASS_TABLE in adapter.config.rank_pattern
    if adapter.class_rows is not None and not as_lora:
        rows = unet.get_submodule(CLASS_TABLE)  # not adapter.class_rows, which the exporter reads
        every = torch.arange(adapter.class_rows.table.num_embeddings, device=adapter.class_rows.rows.device)
        unet.class_embedding = nn.Embedding.from_pretrained(rows(every))
    return unet


def check_class_table(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """Every row of the class table, number by number: of more rows than `ROWS` the outputs do not tell of each.

    Raises:
        RunError: a row came back otherwise than it trained.
    """
    if adapter.config is None:
        network: Any = load_whole_model(folder).unet
    else:
        network = PeftModel.from_pretrained(copy.deepcopy(base.unet).cpu(), str(folder), use_safetensors=True)
    every = torch.arange(base.num_class_embeds or 0)
    with torch.no_grad():
        found = network.class_embedding(every)
        trained = copy.deepcopy(adapter.unet.get_submodule(CLASS_TABLE)).cpu()(every)
    difference = (found - trained).abs().amax(dim=1)
    row = int(difference.argmax())  # of a NaN too
    if not difference[row] <= TOLERANCE * max(1.0, trained.abs().max().item()):
        raise RunError(
            f"row {row} of the class table in the exported weights differs from the trained by {difference[row]:.3g}. "
            f"{NOT_LOST}"
        )


def check_files(base: BaseModel, adapter: Adapter, folder: Path, document: dict[str, Any] | None) -> str | None:
    """Our own checks, as of a stranger's files; return where the base's network lies, None where none is needed.

    Raises:
        RunError: the files would be refused, or the base is another one now.
    """
    try:
        if adapter.config is None:
            load_whole_model(folder)
            return None
        files, place = read_adapter(folder), find_folder(base.name, base.revision)
        found = read_base(place)
        if (folder / LORA_FILE).is_file() and document is not None:
            check_lora_file(folder, document)
        if found.sha256 == base.sha256:
            check_fit(files.config, files.layers, found.shapes, base.name)
    except (PrivacyError, UserError) as error:
        raise RunError(f"the exported weights would be refused: {error} {NOT_LOST}") from error
    if found.sha256 != base.sha256:
        raise RunError(f"the base {base.name} has changed since the run began. Put it back. {NOT_LOST}")
    return str((place / MODEL_FOLDER if (place / MODEL_FOLDER).is_dir() else place).resolve())


def made_up_inputs(base: BaseModel, conditions: ConditionTable) -> dict[str, torch.Tensor]:
    """What `stock_reload.answers` takes: noise, all times, and up to `ROWS` conditions in turn; floats as float64."""
    n, last = max(8, min(ROWS, conditions.null + 1)), conditions.null
    rows = torch.linspace(0, last, n).round().long() if last >= n else torch.arange(n) % (last + 1)
    told = {f"told.{name}": value.cpu() for name, value in conditions.take(rows).items()}
    if "told.text_embeds" in told:  # XL is told sizes besides: original, crop and target
        side = base.resolution
        told["told.time_ids"] = torch.tensor([side, side, 0, 0, side, side]).double().repeat(n, 1)
    told = {name: value.double() if value.is_floating_point() else value for name, value in told.items()}
    times = torch.linspace(1, base.scheduler.config.num_train_timesteps - 1, n).long()
    noise = torch.randn(n, *base.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"sample": noise, "timestep": times, **{name: value.contiguous() for name, value in told.items()}}


def layers_that_train(base: BaseModel, adapter: Adapter) -> list[str]:
    """Paths of the base's layers that stock peft has to replace: the targets of the adapter, and the class table."""
    assert adapter.config is not None
    targets = [*adapter.config.target_modules, *([CLASS_TABLE] if adapter.class_rows else [])]
    names = [name for name, _ in base.unet.named_modules()]
    return [name for name in names if any(matches(name, target) for target in targets)]


def judge(tool: str, found: dict[str, Any], layers: int | None, given: dict[str, torch.Tensor]) -> None:
    """Whether one loader gave back what trained.

    layers: that trained; None where the whole net did.

    Raises:
        RunError: it did not.
    """
    if "error" in found:
        raise RunError(f"{tool} cannot load the exported weights: {found['error']} {NOT_LOST}")
    if layers not in (None, found["layers"]):
        raise RunError(f"{tool} injects {found['layers']} layers of the export, and {layers} trained. {NOT_LOST}")
    if not found["difference"] <= TOLERANCE * max(1.0, given["trained"].abs().max().item()):
        raise RunError(
            f"the exported weights, loaded with {tool}, differ from the trained by {found['difference']:.3g}. "
            f"{NOT_LOST}"
        )
    if found["change"] == 0.0:
        raise RunError("the exported weights change nothing: no step moved them. Try a larger --learning_rate.")


def in_fresh_process(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `stock_reload.reload` answers in a process that has nothing of this one but where its packages lie.

    Raises:
        RunError: the process failed, or was killed.
    """
    file = Path(job["tensors"]).with_name("job.json")
    file.write_text(json.dumps(job))
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    ended = subprocess.run(
        # Not -I, by which packages that were installed with `pip install --user` would not be found.
        [sys.executable, "-P", stock_reload.__file__, str(file)],
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    told = " ".join(ended.stderr.split())[-1000:] or "it left no message"
    how = f"ended with exit code {ended.returncode}"
    if ended.returncode < 0:
        how = f"was killed by signal {-ended.returncode} (is there memory enough?)"
    raise RunError(f"the process that loads the exported weights again {how}: {told} {NOT_LOST}")
