"""Folders that somebody hands over, made without torch: one good adapter, and ways to spoil it."""

import json
import struct
from pathlib import Path

import numpy as np

from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES, read_base
from dp_peft_diffusion.privacy.promise import make_promise

HANDWRITING = BUILTIN_BASES / "handwriting"
HANDWRITING_SHA256 = read_base(HANDWRITING).sha256
ATTENTION = "mid_block.attentions.0"
TARGETS = ["to_k", "to_out.0", "to_q", "to_v"]
A, B = (f"base_model.model.{ATTENTION}.to_q.lora_{end}.weight" for end in "AB")
MODEL_JSON = ("unet/config.json", "scheduler/scheduler_config.json", "dp_peft_base.json")


def config(**changes):
    """adapter_config.json of a LoRA of rank 2 on the attention of builtin:handwriting."""
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": TARGETS, "bias": "none"}
    return {**document, "base_model_name_or_path": "builtin:handwriting", "inference_mode": True, **changes}


def tensors(rank=2, width=96):
    rng = np.random.default_rng(0)
    shapes = {"lora_A.weight": (rank, width), "lora_B.weight": (width, rank)}
    return {
        f"base_model.model.{ATTENTION}.{target}.{end}": rng.normal(size=shape).astype(np.float32)
        for target in TARGETS
        for end, shape in shapes.items()
    }


def safetensors(arrays, metadata=None, dtypes=None):
    """A file by the format's description; dtypes: name -> what to call an array's type, for types numpy lacks."""
    header, position = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, array in arrays.items():
        dtype = (dtypes or {}).get(name, {"f": "F", "u": "U"}[array.dtype.kind] + str(8 * array.dtype.itemsize))
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values())


def write_config(folder, document):
    (folder / "adapter_config.json").write_text(json.dumps(document))


def write_tensors(folder, arrays, **named):
    (folder / "adapter_model.safetensors").write_bytes(safetensors(arrays, **named))


def write_base_of(folder, name="builtin:handwriting", sha256=HANDWRITING_SHA256):
    """As much of privacy.json as says which base an adapter is for."""
    (folder / "privacy.json").write_text(json.dumps({"base": {"name": name, "revision": None, "sha256": sha256}}))


def write_adapter(folder):
    """A good adapter of builtin:handwriting, without a certificate."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    write_config(folder, config())
    write_tensors(folder, tensors())
    return folder


def write_model(folder):
    """A whole model: a copy of builtin:handwriting."""
    for name in (*MODEL_JSON, "unet/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((HANDWRITING / name).read_bytes())
    return folder


def certify(folder):
    """Write privacy.json for the files in a folder, whatever they hold, as a run of 200 steps would."""
    (folder / "recipe.yaml").write_text("train: {}\n")
    fields = {"sampling_prob": 500 / 1797, "steps": 200, "expected_batch_size": 500, "num_examples": 1797}
    promise = make_promise(DPMechanism(noise_multiplier=14.78, **fields), delta=1e-5, epsilon=1.0)
    base = {"name": "builtin:handwriting", "revision": None, "sha256": HANDWRITING_SHA256}
    said = {"clipping": "flat", "gamma": None, "noise_multiplicity": 1, "public_inputs": {"class_names": ["déjà vu"]}}
    return certificate.write(folder, certificate.certificate(promise, base=base, folder=folder, **said))
