"""The strict form of adapter_config.json: what our adapter kinds write, and nothing that runs, loads or matches more.

peft takes patterns, module names to import and further files from this document. Here a name is a name: no regular
expression reaches `re`, no size reaches an allocation before it is known to be small.
"""

import math
from typing import Any

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy.strict_form import (
    Rule,
    check_keys,
    list_of,
    number,
    one_of,
    or_none,
    shown,
    table_of,
    text,
    whole,
)
from dp_peft_diffusion.recipe import MAX_SCALE

CONFIG_FILE = "adapter_config.json"
CLASS_TABLE = "class_embedding"  # what diffusers calls it
MAX_RANK = 256
MAX_NAMES = 2000
_NAME = text(r"[A-Za-z0-9_.\-]{1,200}")
_NEVER, _OFF, _EMPTY = one_of(None), one_of(None, False), one_of(None, {})
_RANK, _ALPHA = whole(1, MAX_RANK), number(math.ulp(0.0), MAX_SCALE * MAX_RANK)
_PATTERN = or_none(table_of(_NAME, _RANK, MAX_NAMES))
_ALPHAS = or_none(table_of(_NAME, _ALPHA, MAX_NAMES))
_TOKEN_ROWS = list_of(whole(0, 10_000_000), 100_000)


def _diffusers_class(value: Any) -> bool:
    """The class of the base, which AutoPeftModel would import: a model of diffusers and nothing else."""
    return (
        isinstance(value, dict)
        and set(value) == {"base_model_class", "parent_library"}
        and text(r"[A-Za-z0-9]{1,100}")(value["base_model_class"])
        and text(r"diffusers\.models(\.[a-z0-9_]{1,60}){1,4}")(value["parent_library"])
    )


_COMMON: dict[str, Rule] = {
    "peft_version": or_none(text(r"[A-Za-z0-9.+@_\-]{1,60}")),
    "base_model_name_or_path": or_none(text(r"[^\x00-\x1f\x7f]{1,1000}")),
    "revision": or_none(text(r"[A-Za-z0-9_./\-]{1,200}")),
    "inference_mode": one_of(True, False),
    "target_modules": list_of(_NAME, MAX_NAMES),
    "auto_mapping": or_none(_diffusers_class),
    "task_type": _NEVER,
    "exclude_modules": _NEVER,
    "modules_to_save": or_none(one_of([CLASS_TABLE])),
}
_SOME_LAYERS: dict[str, Rule] = {"layers_to_transform": _NEVER, "layers_pattern": _NEVER}
_PATTERNS: dict[str, Rule] = {"r": _RANK, "rank_pattern": _PATTERN, "alpha_pattern": _ALPHAS}

# What peft 0.17 to 0.21 writes of each type. A key that says nothing is allowed at the value that says nothing.
_FORMS: dict[str, dict[str, Rule]] = {
    "LORA": {
        **_COMMON,
        **_SOME_LAYERS,
        **_PATTERNS,
        "lora_alpha": _ALPHA,
        "use_rslora": one_of(True, False),
        "use_dora": one_of(True, False),
        "bias": one_of("none", "all"),
        "trainable_token_indices": or_none(
            lambda value: isinstance(value, dict) and set(value) == {CLASS_TABLE} and _TOKEN_ROWS(value[CLASS_TABLE])
        ),
        "modules_to_save": _NEVER,
        "lora_dropout": one_of(0, 0.0),
        "init_lora_weights": one_of(True, False),
        "megatron_core": one_of(None, "megatron.core"),
        "qalora_group_size": one_of(None, 16),
        "loftq_config": _EMPTY,
        **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "ensure_weight_tying"), _OFF),
        **dict.fromkeys(("megatron_config", "eva_config", "corda_config", "arrow_config", "kasa_config"), _NEVER),
        **dict.fromkeys(("lora_ga_config", "velora_config", "monteclora_config", "layer_replication"), _NEVER),
        **dict.fromkeys(("alora_invocation_tokens", "target_parameters"), _NEVER),
    },
    "IA3": {
        **_COMMON,
        "feedforward_modules": one_of([]),
        "fan_in_fan_out": _OFF,
        "init_ia3_weights": one_of(True, False),
    },
    "LOKR": {
        **_COMMON,
        **_SOME_LAYERS,
        **_PATTERNS,
        "alpha": _ALPHA,
        "rank_dropout": one_of(0, 0.0),
        "module_dropout": one_of(0, 0.0),
        "use_effective_conv2d": _OFF,
        "decompose_both": _OFF,
        "decompose_factor": one_of(-1),
        "rank_dropout_scale": _OFF,
        "init_weights": one_of(True, False),
    },
    "OFT": {
        **_COMMON,
        **_SOME_LAYERS,
        "r": one_of(0),
        "oft_block_size": whole(2, MAX_RANK),
        "module_dropout": one_of(0, 0.0),
        "eps": number(0, 1),
        "num_cayley_neumann_terms": whole(1, 100),
        "use_cayley_neumann": one_of(True, False),
        "bias": one_of("none"),
        "init_weights": one_of(True, False),
        **dict.fromkeys(("fan_in_fan_out", "coft", "block_share"), _OFF),
    },
    "VERA": {
        **_COMMON,
        **_SOME_LAYERS,
        "r": _RANK,
        "projection_prng_key": whole(0, 1 << 32),
        "save_projection": one_of(True),
        "d_initial": number(-1e3, 1e3),
        "vera_dropout": one_of(0, 0.0),
        "bias": one_of("none"),
        "init_weights": one_of(True, False),
        "fan_in_fan_out": _OFF,
    },
    "LN_TUNING": {**_COMMON, "modules_to_save": _NEVER},
}
FORMS = {kind: {"peft_type": one_of(kind), **form} for kind, form in _FORMS.items()}
_RANKS = f"a whole number from 1 to {MAX_RANK}"
_WANTED = {
    "target_modules": f"a list of at most {MAX_NAMES} plain module names",
    "exclude_modules": "null",
    "modules_to_save": f'null, or ["{CLASS_TABLE}"] with peft types other than LORA',
    "auto_mapping": "null, or a model class of diffusers",
    "r": f"a rank, {_RANKS}",
    "oft_block_size": f"a block size, {_RANKS}",
    "rank_pattern": f"ranks by plain module name, each {_RANKS}",
    "alpha_pattern": "positive numbers by plain module name",
    "lora_alpha": f"a positive number of at most {MAX_SCALE} times the rank",
    "alpha": f"a positive number of at most {MAX_SCALE} times the rank",
    "trainable_token_indices": f"rows of {CLASS_TABLE}",
}
_REQUIRED = {
    "LORA": {"r", "lora_alpha"},
    "IA3": {"feedforward_modules"},
    "LOKR": {"r", "alpha"},
    "OFT": {"r", "oft_block_size"},
    "VERA": {"r", "projection_prng_key", "save_projection"},
    "LN_TUNING": set[str](),
}


def check_config(document: Any) -> dict[str, Any]:
    """adapter_config.json, already parsed, in the form of its peft type.

    Raises:
        PrivacyError: a type, a key or a value that our kinds never write; the message names it.
    """
    kind = document.get("peft_type") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in FORMS:
        raise PrivacyError(f"{CONFIG_FILE}: peft_type {shown(kind)}; this version opens {', '.join(FORMS)}.")
    check_keys(document, FORMS[kind], {"target_modules", *_REQUIRED[kind]}, CONFIG_FILE, _WANTED)
    targets = document["target_modules"]
    if not targets:
        raise PrivacyError(f"{CONFIG_FILE}: target_modules is empty, so the adapter is none.")
    ranks, alphas = document.get("rank_pattern") or {}, document.get("alpha_pattern") or {}
    if unknown := sorted({*ranks, *alphas} - set(targets)):
        raise PrivacyError(f"{CONFIG_FILE}: {unknown[0]} has a rank or an alpha of its own, but is no target.")
    for name in ("", *ranks, *alphas):
        rank = ranks.get(name, document.get("r"))
        alpha = alphas.get(name, document.get("lora_alpha", document.get("alpha")))
        if alpha is not None and alpha > MAX_SCALE * rank:
            raise PrivacyError(f"{CONFIG_FILE}: an alpha of {alpha:g} is more than {MAX_SCALE} times the rank {rank}.")
    return document


def rank_of(config: dict[str, Any], module: str) -> int:
    """The rank of a module, which its own name or the end of it may set in rank_pattern."""
    ranks = config.get("rank_pattern") or {}
    return next((rank for name, rank in ranks.items() if matches(module, name)), config["r"])


def matches(module: str, target: str) -> bool:
    """Whether a name in target_modules means this module of the base, as peft matches lists."""
    return module == target or module.endswith(f".{target}")
