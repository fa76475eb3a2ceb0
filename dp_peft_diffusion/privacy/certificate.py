"""privacy.json: what a shareable folder promises; written, re-priced and verified without torch.

The certificate is computed from the mechanism (what was promised: all planned steps, invariant 16), never from what
happened. The form is strict: exactly these keys, types and ranges, so that nothing else can travel in it.
"""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.certificate_form import (
    ADAPTER_FILES,
    ALSO_HASHED,
    COVERS,
    EXCLUDES,
    FILE_NAME,
    MODEL_FILES,
    SCHEMA,
    assumptions,
    check_form,
    event_name,
    unit,
)
from dp_peft_diffusion.privacy.ranges import round_up
from dp_peft_diffusion.privacy.untrusted import read_json, sha256_of

if TYPE_CHECKING:
    from dp_peft_diffusion.privacy.mechanism import DPMechanism
    from dp_peft_diffusion.privacy.promise import Promise, Release

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
    promise: "Promise",
    *,
    clipping: str,
    gamma: float | None,
    noise_multiplicity: int,
    public_inputs: dict[str, Any],
    base: dict[str, str | None],
    folder: Path,
    key_source: str = "os",
    key_after_export: str = "deleted",
    gradient_check: str = "passed",
) -> dict[str, Any]:
    """The content of privacy.json for the files that lie in `folder`.

    Args:
        promise: from `make_promise`; its mechanism's `steps` is the planned number.
        clipping: "flat" (gamma None) or "automatic".
        gamma: of automatic clipping, chosen from public images.
        noise_multiplicity: K.
        public_inputs: of resolution, image_channels, class_names, gamma_source, grid_labels, group_column,
            caption_column, prompt_template and prompts, those that are known; N is added where it is public.
        base: name, revision (None for a built-in) and sha256 of the base model; parts_sha256 of what stands around its
            UNet, if anything does.
        folder: holds `ADAPTER_FILES`, or `MODEL_FILES` where the whole net trained, and may hold `ALSO_HASHED`.
        key_source: "os", or "given" when somebody chose the key, which `verify` refuses.
        key_after_export: "deleted", or "escrowed" when somebody keeps it for a replay.
        gradient_check: whether the start-up self-check of per-example gradients "passed" or was "skipped".

    Raises:
        PrivacyError: a file is missing.
    """
    from dp_peft_diffusion.privacy.promise import guarantee, statement

    figures, mechanism = guarantee(promise), promise.mechanism
    known_n = {} if mechanism.num_examples is None else {"num_examples": mechanism.num_examples}
    own_choices = {"clipping": clipping, "gamma": gamma, "noise_multiplicity": noise_multiplicity}
    other_releases = [_release(release) for release in promise.prior]
    return {
        "schema": SCHEMA,
        "statement": statement(promise, figures),
        "guarantee": figures,
        "unit": unit(mechanism.max_examples_per_group),
        "neighboring_relation": mechanism.neighboring_relation,
        "mechanism": recorded_mechanism(mechanism) | own_choices,
        "accounting": _accounting(promise),
        "public_inputs": {**public_inputs, **known_n},
        "tuning": _tuning(promise),
        "other_releases": other_releases,
        "assumptions": assumptions(other_releases),
        "base": {key: base.get(key) for key in ("name", "revision", "sha256", "parts_sha256")},
        "key_source": key_source,
        "key_after_export": key_after_export,
        "gradient_check": gradient_check,
        "covers": COVERS,
        "excludes": EXCLUDES,
        "sha256": _file_hashes(Path(folder)),
    }


def recorded_mechanism(mechanism: "DPMechanism") -> dict[str, Any]:
    """What a certificate says of the mechanism of a release; how gradients came about is not in it."""
    return {
        "event": event_name(mechanism.truncated_batch_size, mechanism.max_examples_per_group),
        "sampling_prob": mechanism.sampling_prob,
        "noise_multiplier": mechanism.noise_multiplier,
        "count": mechanism.steps,  # invariant 16: planned, whenever the run ended
        "max_grad_norm": mechanism.max_grad_norm,
        "expected_batch_size": mechanism.expected_batch_size,
        "truncated_batch_size": mechanism.truncated_batch_size,
        "max_examples_per_group": mechanism.max_examples_per_group,
    }


def _tuning(promise: "Promise") -> dict[str, Any] | str:
    if promise.unpaid_runs is not None:
        return {"runs": promise.unpaid_runs, "priced": "no"}
    return "undeclared" if promise.tuning_runs is None else {"runs": promise.tuning_runs, "priced": "composition"}


def _release(release: "Release") -> dict[str, Any]:
    return {
        "mechanism": recorded_mechanism(release.mechanism),
        "num_examples": release.mechanism.num_examples,
        "runs": release.runs,
        "source": release.source,
    }


def _accounting(promise: "Promise") -> dict[str, Any]:
    from dp_peft_diffusion.privacy import accounting

    by_rdp = promise.priced_by_rdp
    return {
        "accountant": "pld",
        "library": "dp-accounting",
        "version": importlib.metadata.version("dp-accounting"),
        "discretization_interval": accounting.interval_of(promise.event, promise.mechanism.neighboring_relation),
        "epsilon_priced": round_up(promise.priced, 6),
        "epsilon_rdp": None if by_rdp is None else round_up(by_rdp, 6),
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
    write_durably(Path(folder) / FILE_NAME, text.encode())
    return document


def read(folder: Path) -> dict[str, Any]:
    """privacy.json of `folder`, in the strict form.

    Raises:
        PrivacyError: it is missing, or not in that form.
    """
    document = read_json(Path(folder) / FILE_NAME)
    check_form(document)
    return document


def verify(folder: str | Path, base: str | Path | None = None, cross_check: bool = False) -> VerifyReport:
    """Check a shareable folder, level by level. Never raises for bad content, and imports no torch.

    What it cannot prove is in `CANNOT_PROVE`.

    Args:
        folder: what was shared.
        base: diffusers folder of the base, to see that the adapter fits; a built-in base is found without it.
        cross_check: price the promise once more by the PRV accountant of Opacus, in a process of its own.
    """
    folder = Path(folder)
    try:
        document = read(folder)
    except PrivacyError as error:
        return VerifyReport(False, None, (("certificate", False, str(error)),))
    from dp_peft_diffusion.privacy.adapter_files import check_adapter
    from dp_peft_diffusion.privacy.certificate_levels import LEVELS, cross_checked  # and the accountants, not before

    checks = dict(LEVELS)
    if base is not None:
        checks["adapter"] = lambda folder, _: check_adapter(folder, Path(base))
    if cross_check:
        checks["cross-check"] = cross_checked
    levels = [("certificate", True, f"{FILE_NAME} has the form {SCHEMA}.")]
    for name, check in checks.items():
        try:
            levels.append((name, True, check(folder, document)))
        except (PrivacyError, UserError) as error:
            levels.append((name, False, str(error)))
    return VerifyReport(all(ok for _, ok, _ in levels), document["guarantee"]["epsilon"], tuple(levels))
