"""The levels of `verify`: each takes a folder and its certificate, and returns a sentence or raises one."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import check_adapter
from dp_peft_diffusion.privacy.certificate_form import ADAPTER_FILES, ALSO_HASHED, LORA_FILE, MODEL_FILES
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.cross_check import cross_check
from dp_peft_diffusion.privacy.lora_files import check_lora_file
from dp_peft_diffusion.privacy.promise import guarantee, statement
from dp_peft_diffusion.privacy.ranges import round_up
from dp_peft_diffusion.privacy.untrusted import file_names, safetensors_header, sha256_of

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".onnx")
OTHER_SUFFIXES = (".gguf", ".msgpack", ".index.json", ".tar", ".zip", ".gz", ".py")  # more weights, archives, code
# Recorded figures over recomputed ones: at least, by floating point alone and by versions of the accountant; at most.
SAME_VERSION, OTHER_VERSION, LONG = 1 - 1e-9, 1 - 1e-3, 1 + 2e-2


def _check_files(folder: Path, document: dict[str, Any]) -> str:
    recorded = document["sha256"]
    for name, digest in recorded.items():
        if sha256_of(folder / name) != digest:
            raise PrivacyError(f"{name} is not the file that was certified: its SHA-256 differs.")
    for name in file_names(folder):
        weights = name.lower().endswith(WEIGHT_SUFFIXES + OTHER_SUFFIXES)
        if (weights or name in (*ADAPTER_FILES, *MODEL_FILES, *ALSO_HASHED)) and name not in recorded:
            raise PrivacyError(f"{name[:80]!r} lies in the folder, but was not certified. Remove it.")
    return f"{', '.join(recorded)}: as certified. Other files are not hashed."


def _check_weights(folder: Path, document: dict[str, Any]) -> str:
    names = [name for name in document["sha256"] if name.endswith(".safetensors") and name != LORA_FILE]
    counts = [f"{name} holds {len(safetensors_header(folder / name).tensors)} tensors" for name in names]
    told = f"{'; '.join(counts)}, well formed, without other metadata."
    if LORA_FILE not in document["sha256"]:
        return told
    count = check_lora_file(folder, document)
    return f"{told} {LORA_FILE} holds the same {count}, bit for bit, and says what the other files say."


def _check_adapter(folder: Path, document: dict[str, Any]) -> str:
    return check_adapter(folder)


def _check_mechanism(folder: Path, document: dict[str, Any]) -> str:
    mechanism = promise_of(document).mechanism
    if mechanism.num_examples is None:
        return "The number of records is private; sampling probability and expected batch size were given."
    return (
        f"sampling_prob * num_examples is expected_batch_size: "
        f"{mechanism.sampling_prob:.6g} * {mechanism.num_examples} = {mechanism.expected_batch_size:g}."
    )


def _check_epsilon(folder: Path, document: dict[str, Any]) -> str:
    promise = promise_of(document)
    promise.mechanism.check_delta(promise.delta)
    priced, delta = promise.priced, promise.delta
    composed = ", composed as stated," if promise.tuning_runs or promise.prior else ""
    if not priced <= promise.epsilon:
        raise PrivacyError(
            f"The recorded mechanism{composed} costs epsilon {priced:.6g} at delta {delta:g}, not {promise.epsilon:g}."
        )
    by_rdp = promise.priced_by_rdp
    beside = "RDP has no price for it" if by_rdp is None else f"{round_up(by_rdp):g} by the looser RDP"
    return (
        f"The recorded mechanism{composed} costs epsilon {round_up(priced, 6):g} at delta {delta:g} (PLD; {beside}), "
        f"at most the promised {promise.epsilon:g}."
    )


def _check_figures(folder: Path, document: dict[str, Any]) -> str:
    """At the version of the accountant that is installed, nothing may be stated smaller than it is recomputed."""
    promise, recorded = promise_of(document), document["guarantee"]
    known, priced = guarantee(promise), document["accounting"]
    version = importlib.metadata.version("dp-accounting")
    shortest = SAME_VERSION if priced["version"] == version else OTHER_VERSION
    pairs = [("mu_gdp", recorded["mu_gdp"], known["mu_gdp"])]
    pairs += [(name, recorded[name], known[name]) for name in ("epsilon_replace_one", "epsilon_per_image")]
    for rate, odds in known["max_tpr_at_fpr"].items():
        pairs.append((f"max_tpr_at_fpr at {rate}", recorded["max_tpr_at_fpr"][rate], odds))
    for point, true_point in zip(recorded["profile"], known["profile"], strict=True):
        pairs.append((f"profile at delta {point['delta']:g}", point["epsilon"], true_point["epsilon"]))
    pairs.append(("epsilon_priced", priced["epsilon_priced"], promise.priced))
    pairs.append(("epsilon_rdp", priced["epsilon_rdp"], promise.priced_by_rdp))
    for name, stated, recomputed in pairs:
        if not _follows(stated, recomputed, shortest):
            raise PrivacyError(f"{name} is stated as {stated}; the recorded mechanism gives {recomputed}.")
    if document["statement"] != statement(promise, recorded):
        raise PrivacyError("The statement does not say what the numbers say.")
    follow = "mu-GDP, profile, attack odds, other units and statement follow from the recorded mechanism"
    if shortest == SAME_VERSION:
        return f"{follow}."
    return (
        f"{follow}, to within {1 - OTHER_VERSION:.1%}: they were computed by dp-accounting "
        f"{ascii(priced['version'])}, and here is {version}."
    )


def _follows(stated: float | None, recomputed: float | None, shortest: float) -> bool:
    """Whether a stated figure is the recomputed one, rounded up."""
    if stated is None or recomputed is None:
        return stated is recomputed
    return recomputed * shortest <= stated <= recomputed * LONG


def _check_tuning(folder: Path, document: dict[str, Any]) -> str:
    if document["tuning"] == "undeclared":
        return "Undeclared: earlier runs on these records, from which options were chosen, would cost more."
    if document["tuning"]["priced"] == "no":
        return f"Declared: {document['tuning']['runs']} earlier runs on these records, NOT paid for by this epsilon."
    return f"Declared: {document['tuning']['runs']} runs with this mechanism in all, every one of them paid for."


def _check_releases(folder: Path, document: dict[str, Any]) -> str:
    others = document["other_releases"]
    if not others:
        return "None listed. Whatever else was released from these records costs more."
    sources = "; ".join(release["source"] for release in others)
    return f"{len(others)} earlier, paid for within the promised epsilon: {sources}."


def _check_key(folder: Path, document: dict[str, Any]) -> str:
    if document["key_source"] != "os":
        raise PrivacyError("The key of the noise was given by somebody, who can take the noise off. Do not share this.")
    fate = {
        "deleted": "deleted after export; that is declared, and neither solid-state drives nor backups forget.",
        "escrowed": "kept in escrow: whoever holds it can take the noise off.",
    }
    return f"Recorded: drawn from the operating system, {fate[document['key_after_export']]}"


def _check_gradients(folder: Path, document: dict[str, Any]) -> str:
    if document["gradient_check"] == "skipped":
        return "NOT CHECKED before training (--skip_self_check): that the clip bound held on this model."
    return "Recorded: before training, per-example gradients of this model equalled those of examples one by one."


def cross_checked(folder: Path, document: dict[str, Any]) -> str:
    """The level "cross-check", which runs only when asked for."""
    try:
        return cross_check(promise_of(document))
    except UserError as error:  # no opinion is no contradiction
        return f"NOT CHECKED: {error}"


LEVELS: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "files": _check_files,
    "weights": _check_weights,
    "adapter": _check_adapter,
    "mechanism": _check_mechanism,
    "epsilon": _check_epsilon,
    "figures": _check_figures,
    "tuning": _check_tuning,
    "releases": _check_releases,
    "key": _check_key,
    "gradients": _check_gradients,
}
