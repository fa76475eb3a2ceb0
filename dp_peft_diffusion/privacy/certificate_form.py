"""The strict form of privacy.json: exactly these keys, types and ranges, so that nothing else can travel in it."""

import math
import re
from collections.abc import Callable
from typing import Any

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.promise import FALSE_POSITIVE_RATES, PROFILE_DELTAS

SCHEMA = "dp-peft/privacy/1"
UNIT = "one record: one image with its label"
EVENT = "self-composed Poisson-sampled Gaussian"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml")
MODEL_FILES = (  # where the whole net trained
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "dp_peft_base.json",
    "recipe.yaml",
)
ALSO_HASHED = ("pytorch_lora_weights.safetensors", "README.md")
COVERS = [
    "the weights in this folder",
    "every image sampled from them, those in samples/ included",
    "metrics.jsonl",
]
EXCLUDES = [
    "the base model, and whatever it was trained on",
    "anything else released from the same records",
    "options chosen by looking at earlier runs on the same records",
    "several records of one person: each is protected by itself only",
    "the public inputs listed here",
]

Rule = Callable[[Any], bool]


def _number(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _count(high: int) -> Rule:
    return lambda value: type(value) is int and 1 <= value <= high


def _one_of(*allowed: object) -> Rule:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _text(longest: int) -> Rule:
    return lambda value: isinstance(value, str) and 0 < len(value) <= longest


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _profile(value: Any) -> bool:
    """Points (epsilon, delta) at exactly the deltas of `PROFILE_DELTAS`."""
    epsilon = _number(0, 1e6)
    return (
        isinstance(value, list)
        and all(isinstance(point, dict) and set(point) == {"epsilon", "delta"} for point in value)
        and [point["delta"] for point in value] == list(PROFILE_DELTAS)
        and all(epsilon(point["epsilon"]) for point in value)
    )


def _public_inputs(value: Any) -> bool:
    """Name -> text, number, bool, None, or a list of these."""

    def scalar(item: Any) -> bool:
        return item is None or isinstance(item, str | int | float)

    return (
        isinstance(value, dict)
        and len(value) <= 64
        and all(_text(64)(name) for name in value)
        and all(all(map(scalar, item)) if isinstance(item, list) else scalar(item) for item in value.values())
    )


def _file_hashes(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(set(files) <= set(value) <= {*files, *ALSO_HASHED} for files in (ADAPTER_FILES, MODEL_FILES))
        and all(map(_sha256, value.values()))
    )


_FORM: dict[str, Any] = {
    "schema": _one_of(SCHEMA),
    "statement": _text(4000),
    "guarantee": {
        "epsilon": _number(0, accounting.EPSILONS[1]),
        "delta": _number(*accounting.DELTAS),
        "mu_gdp": _number(0, 1e3),
        "profile": _profile,
        "max_tpr_at_fpr": {f"{rate:g}": _number(0, 1) for rate in FALSE_POSITIVE_RATES},
    },
    "unit": _one_of(UNIT),
    "neighboring_relation": _one_of(*accounting.NEIGHBORING_RELATIONS),
    "mechanism": {
        "event": _one_of(EVENT),
        "sampling_prob": _number(*accounting.SAMPLING_PROBS),
        "noise_multiplier": _number(*accounting.NOISE_MULTIPLIERS),
        "count": _count(accounting.MAX_STEPS),
        "max_grad_norm": _number(1e-9, 1e9),
        "expected_batch_size": _number(1e-9, 1e12),
        "clipping": _one_of("flat", "automatic"),
        "gamma": _or_none(_number(math.ulp(0.0), 1e9)),
        "noise_multiplicity": _count(1_000_000),
    },
    "accounting": {
        "accountant": _one_of("pld"),
        "library": _one_of("dp-accounting"),
        "version": _text(40),
        "discretization_interval": _one_of(accounting.DISCRETIZATION_INTERVAL),
        "epsilon_priced": _number(0, accounting.EPSILONS[1]),
        "epsilon_rdp": _number(0, 1e6),
    },
    "public_inputs": _public_inputs,
    "tuning": _one_of("undeclared"),
    "other_releases": _one_of([]),
    "base": {"name": _text(1000), "revision": _or_none(_text(200)), "sha256": _sha256},
    "key_source": _one_of("os", "given"),
    "gradient_check": _one_of("passed", "skipped"),
    "covers": _one_of(COVERS),
    "excludes": _one_of(EXCLUDES),
    "sha256": _file_hashes,
}


def check_form(document: Any) -> None:
    """Exactly the keys, types and ranges of `SCHEMA`.

    Raises:
        PrivacyError: anything differs; the message names the first difference.
    """
    _check(document, _FORM, "")
    automatic = document["mechanism"]["clipping"] == "automatic"
    if automatic != (document["mechanism"]["gamma"] is not None):
        raise PrivacyError("privacy.json: gamma belongs to automatic clipping, and to no other.")


def _check(value: Any, rule: Any, path: str) -> None:
    where = f"privacy.json{path and ' at '}{path}"
    if not isinstance(rule, dict):
        if not rule(value):
            raise PrivacyError(f"{where}: {str(value)[:60]!r} is not allowed there.")
        return
    if not isinstance(value, dict):
        raise PrivacyError(f"{where} is not a JSON object.")
    if set(value) != set(rule):
        differing = ", ".join(repr(key[:40]) for key in sorted(set(value) ^ set(rule))[:5])
        raise PrivacyError(f"{where} does not have exactly the keys of {SCHEMA}; these differ: {differing}.")
    for key, inner in rule.items():
        _check(value[key], inner, f"{path}.{key}".lstrip("."))
