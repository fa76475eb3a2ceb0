"""privacy.json: what a shareable folder promises; written, re-priced and verified without torch.

The certificate is computed from the mechanism (what was promised: all planned steps, invariant 16), never from what
happened. The form is strict: exactly these keys, types and ranges, so that nothing else can travel in it.
"""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.certificate_form import (
    ADAPTER_FILES,
    ALSO_HASHED,
    COVERS,
    EVENT,
    EXCLUDES,
    MODEL_FILES,
    SCHEMA,
    UNIT,
    check_form,
)
from dp_peft_diffusion.privacy.certificate_levels import LEVELS
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import guarantee, promised_epsilon, statement
from dp_peft_diffusion.privacy.untrusted import read_json, sha256_of

FILE_NAME = "privacy.json"
CANNOT_PROVE = (
    "that training ran with the parameters recorded here",
    "that the noise was random and its key stayed secret",
    "that one record is one person",
    "that nothing else was released from the same records",
    "that the base model had never seen the records",
    "that nothing leaked by other ways, such as logs or the private folder",
)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        ok: every level passed.
        epsilon: the promised epsilon; None when privacy.json could not be read.
        levels: (name, passed, sentence) in the order checked.
    """

    ok: bool
    epsilon: float | None
    levels: tuple[tuple[str, bool, str], ...]


def certificate(
    mechanism: DPMechanism,
    *,
    delta: float,
    epsilon: float | None,
    clipping: str,
    gamma: float | None,
    noise_multiplicity: int,
    public_inputs: dict[str, Any],
    base: dict[str, str | None],
    folder: Path,
    key_source: str = "os",
    gradient_check: str = "passed",
) -> dict[str, Any]:
    """The content of privacy.json for the files that lie in `folder`.

    Args:
        mechanism: with its noise multiplier; `steps` is the planned number.
        delta: of the promise.
        epsilon: asked for by the user; None states the price, rounded up.
        clipping: "flat" (gamma None) or "automatic".
        gamma: of automatic clipping, chosen from public images.
        noise_multiplicity: K.
        public_inputs: name -> text, number, bool, None or a list of these; N is added under zero_out.
        base: name, revision (None for a built-in) and sha256 of the base model.
        folder: holds `ADAPTER_FILES`, or `MODEL_FILES` where the whole net trained, and may hold `ALSO_HASHED`.
        key_source: "os", or "given" when somebody chose the key, which `verify` refuses.
        gradient_check: whether the start-up self-check of per-example gradients "passed" or was "skipped".

    Raises:
        UserError: the mechanism costs more than `epsilon`.
        PrivacyError: a file is missing.
    """
    figures = guarantee(mechanism, promised_epsilon(mechanism, delta, epsilon), delta)
    known_n = {} if mechanism.num_examples is None else {"num_examples": mechanism.num_examples}
    own_choices = {"clipping": clipping, "gamma": gamma, "noise_multiplicity": noise_multiplicity}
    return {
        "schema": SCHEMA,
        "statement": statement(figures, mechanism.neighboring_relation, mechanism.num_examples),
        "guarantee": figures,
        "unit": UNIT,
        "neighboring_relation": mechanism.neighboring_relation,
        "mechanism": _mechanism(mechanism) | own_choices,
        "accounting": _accounting(mechanism, delta),
        "public_inputs": {**public_inputs, **known_n},
        "tuning": "undeclared",
        "other_releases": [],
        "base": {"name": base["name"], "revision": base["revision"], "sha256": base["sha256"]},
        "key_source": key_source,
        "gradient_check": gradient_check,
        "covers": COVERS,
        "excludes": EXCLUDES,
        "sha256": _file_hashes(Path(folder)),
    }


def _mechanism(mechanism: DPMechanism) -> dict[str, Any]:
    return {
        "event": EVENT,
        "sampling_prob": mechanism.sampling_prob,
        "noise_multiplier": mechanism.noise_multiplier,
        "count": mechanism.steps,  # invariant 16: planned, whenever the run ended
        "max_grad_norm": mechanism.max_grad_norm,
        "expected_batch_size": mechanism.expected_batch_size,
    }


def _accounting(mechanism: DPMechanism, delta: float) -> dict[str, Any]:
    return {
        "accountant": "pld",
        "library": "dp-accounting",
        "version": importlib.metadata.version("dp-accounting"),
        "discretization_interval": accounting.DISCRETIZATION_INTERVAL,
        "epsilon_priced": mechanism.epsilon(delta),
        "epsilon_rdp": accounting.epsilon(mechanism.event, delta, mechanism.neighboring_relation, "rdp"),
    }


def _file_hashes(folder: Path) -> dict[str, str]:
    required = MODEL_FILES if (folder / MODEL_FILES[0]).exists() else ADAPTER_FILES
    names = [*required, *(name for name in ALSO_HASHED if (folder / name).exists())]
    return {name: sha256_of(folder / name) for name in names}


def write(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Write privacy.json into `folder`, whole or not at all, with the hashes of the files as they lie there now.

    So a model card may be made from `certificate(...)` and still be hashed.

    Returns:
        The document as written.

    Raises:
        PrivacyError: a file is missing, or `verify` would not read the document.
    """
    document = {**document, "sha256": _file_hashes(Path(folder))}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    check_form(json.loads(text))
    path = Path(folder) / FILE_NAME
    partial = path.with_name(FILE_NAME + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return document


def read(folder: Path) -> dict[str, Any]:
    """privacy.json of `folder`, in the strict form.

    Raises:
        PrivacyError: it is missing, or not in that form.
    """
    document = read_json(Path(folder) / FILE_NAME)
    check_form(document)
    return document


def verify(folder: str | Path) -> VerifyReport:
    """Check a shareable folder: form, hashes, weights, mechanism, epsilon re-priced, key. Never raises for bad content.

    What it cannot prove is in `CANNOT_PROVE`.
    """
    folder = Path(folder)
    try:
        document = read(folder)
    except PrivacyError as error:
        return VerifyReport(False, None, (("certificate", False, str(error)),))
    levels = [("certificate", True, f"{FILE_NAME} has the form {SCHEMA}.")]
    for name, check in LEVELS.items():
        try:
            levels.append((name, True, check(folder, document)))
        except (PrivacyError, UserError) as error:
            levels.append((name, False, str(error)))
    return VerifyReport(all(ok for _, ok, _ in levels), document["guarantee"]["epsilon"], tuple(levels))
