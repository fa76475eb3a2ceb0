"""The strict form of privacy.json: exactly these keys, types and ranges, so that nothing else can travel in it."""

import math
from typing import Any

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy import ranges
from dp_peft_diffusion.privacy.strict_form import Rule, list_of, number, one_of, or_none, shown, text, whole
from dp_peft_diffusion.recipe import NEIGHBORING_RELATIONS

FILE_NAME = "privacy.json"
SCHEMA = "dp-peft/privacy/2"
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
PROFILE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
INTERVALS = (  # of the discretized privacy loss
    1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2, 2.56e-2, 5.12e-2, 1.024e-1,
)  # fmt: skip
POISSON = "self-composed Poisson-sampled Gaussian"
TRUNCATED = "self-composed truncated Poisson-sampled Gaussian"
GROUPS = "self-composed mixture of Gaussians, of Poisson-sampled groups"
EARLIER_ATTEMPT = "an earlier attempt of this run"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml")
MODEL_FILES = (  # where the whole net trained
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "dp_peft_base.json",
    "recipe.yaml",
)
LORA_FILE = "pytorch_lora_weights.safetensors"  # by this name diffusers looks for it
ALSO_HASHED = (LORA_FILE, "README.md", "report.html")
COVERS = [
    "the weights in this folder",
    "every image sampled from them, those in samples/ included",
    "metrics.jsonl",
]
EXCLUDES = [
    "the base model, and whatever it was trained on",
    "anything released from the same records and not listed here",
    "options chosen by looking at runs on the same records that tuning does not count",
    "records of one person beyond the unit stated here",
    "the public inputs listed here",
]
COMPUTATIONAL = (
    "The guarantee is computational: the noise comes from Philox, keyed by HKDF-SHA256 from a secret key, and no proof "
    "says that nobody can tell it from true noise."
)
KEY_FATE = (
    "What became of the key after export is declared by whoever trained. A deleted key may live on: neither "
    "solid-state drives nor backups forget."
)
# A commit, branch or tag. huggingface_hub looks for a file of this name in its cache: nothing here may lead out of it.
REVISION = r"(?=.{1,200}\Z)[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)*"
NOT_CHOSEN = "The parameters of each release were fixed without looking at the releases that are composed with it."

_SHA256 = text("[0-9a-f]{64}")


def _profile(value: Any) -> bool:
    """Points (epsilon, delta) at exactly the deltas of `PROFILE_DELTAS`."""
    epsilon = number(0, 1e6)
    return (
        isinstance(value, list)
        and all(isinstance(point, dict) and set(point) == {"epsilon", "delta"} for point in value)
        and [point["delta"] for point in value] == list(PROFILE_DELTAS)
        and all(epsilon(point["epsilon"]) for point in value)
    )


def _public_inputs(value: Any) -> bool:
    """Some of `_PUBLIC`, and nothing else."""
    return isinstance(value, dict) and all(name in _PUBLIC and _PUBLIC[name](item) for name, item in value.items())


def _base(value: Any) -> bool:
    """`_BASE`; certificates of before have no `parts_sha256`."""
    return (
        isinstance(value, dict)
        and set(value) | {"parts_sha256"} == set(_BASE)
        and all(_BASE[key](item) for key, item in value.items())
    )


def _file_hashes(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(set(files) <= set(value) <= {*files, *ALSO_HASHED} for files in (ADAPTER_FILES, MODEL_FILES))
        and all(map(_SHA256, value.values()))
    )


def _runs(value: Any) -> bool:
    return value == "undeclared" or (
        isinstance(value, dict)
        and set(value) == {"runs", "priced"}
        and whole(1, ranges.MAX_RUNS)(value["runs"])
        and value["priced"] in ("composition", "no")
    )


_SHORT = text(r"(?s).{0,200}")
_PUBLIC: dict[str, Rule] = {
    "num_examples": whole(1, ranges.MAX_EXAMPLES),
    "resolution": whole(1, 1 << 16),
    "image_channels": whole(1, 1 << 10),
    "class_names": or_none(list_of(_SHORT, 10_000)),
    "gamma_source": or_none(_SHORT),
    "grid_labels": or_none(_SHORT),
    "group_column": or_none(_SHORT),
    "caption_column": or_none(_SHORT),
    "prompt_template": or_none(_SHORT),
    "prompts": or_none(list_of(_SHORT, 1000)),
}
_BASE: dict[str, Rule] = {
    "name": text(r"(?s).{1,1000}"),
    "revision": or_none(text(REVISION)),
    "sha256": _SHA256,
    "parts_sha256": or_none(_SHA256),
}
_PRICED: dict[str, Any] = {  # what a price is computed from
    "event": one_of(POISSON, TRUNCATED, GROUPS),
    "sampling_prob": number(*ranges.SAMPLING_PROBS),
    "noise_multiplier": number(*ranges.NOISE_MULTIPLIERS),
    "count": whole(1, ranges.MAX_STEPS),
    "max_grad_norm": number(1e-9, 1e9),
    "expected_batch_size": number(1e-9, 1e12),
    "truncated_batch_size": or_none(whole(1, ranges.MAX_EXAMPLES)),
    "max_examples_per_group": whole(1, ranges.MAX_EXAMPLES_PER_GROUP),
}
_RELEASE: dict[str, Any] = {
    "mechanism": _PRICED,
    "num_examples": or_none(whole(1, ranges.MAX_EXAMPLES)),
    "runs": whole(1, ranges.MAX_RUNS),
    "source": text(rf"{EARLIER_ATTEMPT}|(an earlier attempt of )?certificate [0-9a-f]{{64}}"),
}
_FORM: dict[str, Any] = {
    "schema": one_of(SCHEMA),
    "statement": text(r"(?s).{1,4000}"),
    "guarantee": {
        "epsilon": number(0, ranges.EPSILONS[1]),
        "delta": number(*ranges.DELTAS),
        "mu_gdp": number(0, 1e3),
        "mu_gdp_smallest_delta": one_of(PROFILE_DELTAS[-1]),
        "profile": _profile,
        "max_tpr_at_fpr": {f"{rate:g}": number(0, 1) for rate in FALSE_POSITIVE_RATES},
        "epsilon_replace_one": or_none(number(0, 1e6)),
        "epsilon_per_image": or_none(number(0, 1e6)),
    },
    "unit": text(r"(?s).{1,200}"),
    "neighboring_relation": one_of(*NEIGHBORING_RELATIONS),
    "mechanism": {
        **_PRICED,
        "clipping": one_of("flat", "automatic"),
        "gamma": or_none(number(math.ulp(0.0), 1e9)),
        "noise_multiplicity": whole(1, 1_000_000),
    },
    "accounting": {
        "accountant": one_of("pld"),
        "library": one_of("dp-accounting"),
        "version": text(r"(?s).{1,40}"),
        "discretization_interval": one_of(*INTERVALS),
        "epsilon_priced": number(0, ranges.EPSILONS[1]),
        "epsilon_rdp": or_none(number(0, 1e6)),
    },
    "public_inputs": _public_inputs,
    "tuning": _runs,
    "other_releases": lambda value: isinstance(value, list) and len(value) <= ranges.MAX_RELEASES,
    "assumptions": lambda value: isinstance(value, list),
    "base": _base,
    "key_source": one_of("os", "given"),
    "key_after_export": one_of("deleted", "escrowed"),
    "gradient_check": one_of("passed", "skipped"),
    "covers": one_of(COVERS),
    "excludes": one_of(EXCLUDES),
    "sha256": _file_hashes,
}


def event_name(truncated_batch_size: int | None, max_examples_per_group: int) -> str:
    """What is priced, in words."""
    if truncated_batch_size is not None:
        return TRUNCATED
    return GROUPS if max_examples_per_group > 1 else POISSON


def unit(max_examples_per_group: int) -> str:
    """What the promise is for, in words."""
    if max_examples_per_group == 1:
        return "one record: one image with its label or caption"
    images = "all images of one owner with their labels or captions"
    return f"one group: {images}, of which at most {max_examples_per_group} are used"


def assumptions(other_releases: list[Any]) -> list[str]:
    """What the promise rests on beside mathematics."""
    return [COMPUTATIONAL, KEY_FATE, *([NOT_CHOSEN] if other_releases else [])]


def check_form(document: Any) -> None:
    """Exactly the keys, types and ranges of `SCHEMA`.

    Raises:
        PrivacyError: anything differs; the message names the first difference.
    """
    _check(document, _FORM, "")
    for index, release in enumerate(document["other_releases"]):
        _check(release, _RELEASE, f"other_releases.{index}")
    mechanism = document["mechanism"]
    automatic = mechanism["clipping"] == "automatic"
    if automatic != (mechanism["gamma"] is not None):
        raise PrivacyError("privacy.json: gamma belongs to automatic clipping, and to no other.")
    for priced in (mechanism, *(release["mechanism"] for release in document["other_releases"])):
        if priced["event"] != event_name(priced["truncated_batch_size"], priced["max_examples_per_group"]):
            raise PrivacyError(f"privacy.json: the event {priced['event']!r} is not what its parameters say.")
    for name, words in (
        ("unit", unit(mechanism["max_examples_per_group"])),
        ("assumptions", assumptions(document["other_releases"])),
    ):
        if document[name] != words:
            raise PrivacyError(f"privacy.json at {name}: not the words that belong to this certificate.")


def _check(value: Any, rule: Any, path: str) -> None:
    where = f"privacy.json{path and ' at '}{path}"
    if not isinstance(rule, dict):
        if not rule(value):
            raise PrivacyError(f"{where}: {shown(value)} is not allowed there.")
        return
    if not isinstance(value, dict):
        raise PrivacyError(f"{where} is not a JSON object.")
    if set(value) != set(rule):
        differing = ", ".join(repr(key[:40]) for key in sorted(set(value) ^ set(rule))[:5])
        raise PrivacyError(f"{where} does not have exactly the keys of {SCHEMA}; these differ: {differing}.")
    for key, inner in rule.items():
        _check(value[key], inner, f"{path}.{key}".lstrip("."))
