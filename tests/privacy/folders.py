"""Shareable folders for the tests, made without torch."""

import json
import struct

from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import make_promise
from tests.privacy.strangers import HANDWRITING_SHA256, write_adapter

BATCH, N = 500, 1797


def safetensors_bytes(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


def two_tensors():
    header = {
        "__metadata__": {"format": "pt"},
        "base_model.model.to_q.lora_A.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "base_model.model.to_q.lora_B.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [24, 48]},
    }
    return header, bytes(48)


def mechanism(**changes):
    fields = {
        "sampling_prob": BATCH / N,
        "steps": 200,
        "noise_multiplier": 14.78,
        "expected_batch_size": BATCH,
        "num_examples": N,
    }
    return DPMechanism(**{**fields, **changes})


def promise(epsilon=1.0, delta=1e-5, tuning_runs=None, unpaid_runs=None, prior=(), **changes):
    told = {"tuning_runs": tuning_runs, "unpaid_runs": unpaid_runs, "prior": prior}
    return make_promise(mechanism(**changes), delta=delta, epsilon=epsilon, **told)


def make_folder(folder, **changes):
    """A folder with its certificate written, as a run leaves it. Returns the certificate."""
    write_adapter(folder)
    (folder / "recipe.yaml").write_text("train: {}\n")
    arguments = {
        "promise": changes.pop("promise", None) or promise(),
        "clipping": "automatic",
        "gamma": 0.01,
        "noise_multiplicity": 4,
        "public_inputs": {"class_names": ["0", "1", "déjà vu"], "resolution": 32},
        "base": {"name": "builtin:handwriting", "revision": None, "sha256": HANDWRITING_SHA256},
        "folder": folder,
    }
    document = certificate.certificate(**{**arguments, **changes})
    (folder / "README.md").write_text(document["statement"])
    return certificate.write(folder, document)
