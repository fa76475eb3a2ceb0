"""Adapters of tiny bases as a run leaves them on disk, with numbers large enough to see."""

import copy

import torch
from tiny_bases import BASES

from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import condition_table
from dp_peft_diffusion.recipe import Adapter
from dp_peft_diffusion.sharing.export import write_other_files, write_weights

CLASSES = ("cat", "dog")
LORA_KINDS = ("lora", "lora_conv", "ffa_lora", "rslora", "dora")  # what `load_lora_weights` of diffusers takes
DOCUMENT = {  # as much of privacy.json as goes into a file of weights
    "statement": "No image is recognised.",
    "guarantee": {"epsilon": 1.0, "delta": 1e-5},
    "base": {"name": "./base", "revision": None, "sha256": "0" * 64},
    "sha256": {},
}


def load(folder, family, **settings):
    """The tiny base of a family, made in `folder` unless it is there."""
    place = folder / family
    return load_base(str(place if place.is_dir() else BASES[family](place)), **settings)


def trained(base, spec, size=0.1):
    """An adapter whose numbers have moved by about `size`, and what the network is told of two classes."""
    labelled = base.num_class_embeds is not None
    adapter = inject_adapter(base, spec, len(CLASSES) if labelled else 0)
    torch.manual_seed(0)
    for parameter in adapter.trainable.values():
        parameter.data += size * torch.randn_like(parameter)
    rows = adapter.class_rows.rows.tolist()[: len(CLASSES)] if labelled else None
    return adapter, condition_table(base, rows, CLASSES, "{label}")


def write(base, adapter, folder):
    """The files of weights, in every format that is to be shared."""
    folder.mkdir(exist_ok=True)
    write_weights(base, adapter, folder)
    write_other_files(base, adapter, folder, copy.deepcopy(DOCUMENT))
    return folder


def exported(bases, family, folder, kind="lora", **fields):
    """(base, adapter, conditions, folder) of an adapter of rank 2 with alpha 6."""
    base = load(bases, family)
    adapter, conditions = trained(base, Adapter(kind=kind, rank=2, lora_alpha=6.0, **fields))
    return base, adapter, conditions, write(base, adapter, folder)
