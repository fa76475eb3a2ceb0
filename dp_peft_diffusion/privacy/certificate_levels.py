"""The levels of `verify`: each takes a folder and its certificate, and returns a sentence or raises one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.certificate_form import ADAPTER_FILES, ALSO_HASHED, MODEL_FILES
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import guarantee, statement
from dp_peft_diffusion.privacy.untrusted import safetensors_header, sha256_of

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".onnx")
RECORDED_PRECISION = 1 - 1e-3  # of recorded figures against recomputed ones, across versions of the accountant


def mechanism_of(document: dict[str, Any]) -> DPMechanism:
    """The recorded mechanism.

    Raises:
        UserError: its numbers do not fit together.
    """
    recorded = document["mechanism"]
    return DPMechanism(
        sampling_prob=recorded["sampling_prob"],
        steps=recorded["count"],
        noise_multiplier=recorded["noise_multiplier"],
        max_grad_norm=recorded["max_grad_norm"],
        expected_batch_size=recorded["expected_batch_size"],
        num_examples=document["public_inputs"].get("num_examples"),
        neighboring_relation=document["neighboring_relation"],
    )


def _check_files(folder: Path, document: dict[str, Any]) -> str:
    recorded = document["sha256"]
    for name, digest in recorded.items():
        if sha256_of(folder / name) != digest:
            raise PrivacyError(f"{name} is not the file that was certified: its SHA-256 differs.")
    for path in sorted(folder.rglob("*")):
        name, weights = path.relative_to(folder).as_posix(), path.suffix.lower() in WEIGHT_SUFFIXES
        if (weights or name in (*ADAPTER_FILES, *MODEL_FILES, *ALSO_HASHED)) and name not in recorded:
            raise PrivacyError(f"{name[:80]!r} lies in the folder, but was not certified. Remove it.")
    return f"{', '.join(recorded)}: as certified. Other files are not hashed."


def _check_weights(folder: Path, document: dict[str, Any]) -> str:
    counts = []
    for name in document["sha256"]:
        if name.endswith(".safetensors"):
            counts.append(f"{name} holds {len(safetensors_header(folder / name).tensors)} tensors")
    return f"{'; '.join(counts)}, well formed, without other metadata."


def _check_mechanism(folder: Path, document: dict[str, Any]) -> str:
    mechanism = mechanism_of(document)
    if mechanism.num_examples is None:
        return "The number of records is private; sampling probability and expected batch size were given."
    return (
        f"sampling_prob * num_examples is expected_batch_size: "
        f"{mechanism.sampling_prob:.6g} * {mechanism.num_examples} = {mechanism.expected_batch_size:g}."
    )


def _check_epsilon(folder: Path, document: dict[str, Any]) -> str:
    mechanism = mechanism_of(document)
    epsilon, delta = document["guarantee"]["epsilon"], document["guarantee"]["delta"]
    priced = mechanism.epsilon(delta)
    if not priced <= epsilon:
        raise PrivacyError(f"The recorded mechanism costs epsilon {priced:.6g} at delta {delta:g}, not {epsilon:g}.")
    looser = accounting.epsilon(mechanism.event, delta, mechanism.neighboring_relation, "rdp")
    return (
        f"The recorded mechanism costs epsilon {priced:.6g} at delta {delta:g} (PLD; {looser:.4g} by the looser RDP), "
        f"at most the promised {epsilon:g}."
    )


def _check_figures(folder: Path, document: dict[str, Any]) -> str:
    mechanism, recorded = mechanism_of(document), document["guarantee"]
    known = guarantee(mechanism, recorded["epsilon"], recorded["delta"])
    pairs = [("mu_gdp", recorded["mu_gdp"], known["mu_gdp"])]
    for rate, odds in known["max_tpr_at_fpr"].items():
        pairs.append((f"max_tpr_at_fpr at {rate}", recorded["max_tpr_at_fpr"][rate], odds))
    for point, true_point in zip(recorded["profile"], known["profile"], strict=True):
        pairs.append((f"profile at delta {point['delta']:g}", point["epsilon"], true_point["epsilon"]))
    pairs.append(("epsilon_priced", document["accounting"]["epsilon_priced"], mechanism.epsilon(recorded["delta"])))
    for name, stated, recomputed in pairs:
        if not stated >= recomputed * RECORDED_PRECISION:
            raise PrivacyError(f"{name} is stated as {stated:g}; the recorded mechanism gives {recomputed:g}.")
    if document["statement"] != statement(recorded, mechanism.neighboring_relation, mechanism.num_examples):
        raise PrivacyError("The statement does not say what the numbers say.")
    return "mu-GDP, profile, attack odds and statement follow from the recorded mechanism."


def _check_key(folder: Path, document: dict[str, Any]) -> str:
    if document["key_source"] != "os":
        raise PrivacyError("The key of the noise was given by somebody, who can take the noise off. Do not share this.")
    return "The key of the noise is recorded as drawn from the operating system."


def _check_gradients(folder: Path, document: dict[str, Any]) -> str:
    if document["gradient_check"] == "skipped":
        return "NOT CHECKED before training (--skip_self_check): that the clip bound held on this model."
    return "Recorded: before training, per-example gradients of this model equalled those of examples one by one."


LEVELS: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "files": _check_files,
    "weights": _check_weights,
    "mechanism": _check_mechanism,
    "epsilon": _check_epsilon,
    "figures": _check_figures,
    "key": _check_key,
    "gradients": _check_gradients,
}
