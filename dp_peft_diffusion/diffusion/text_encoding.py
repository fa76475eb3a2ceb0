"""Prompts as the text encoders of Stable Diffusion see them, each encoded alone and in one fixed shape."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dp_peft_diffusion.diffusion.base_folder import load_part, read_settings
from dp_peft_diffusion.errors import UserError

Embeddings = dict[str, torch.Tensor]
MAX_CHARACTERS = 10_000  # of a prompt that are looked at: far more than its tokens, and a megabyte costs seconds
_ENCODERS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}


@dataclass(frozen=True)
class TextEncoders:
    """The frozen CLIP text encoders of a base: one (Stable Diffusion 1.x, 2.x), or two (XL).

    zeros_for_empty: XL bases say so where "no prompt" is zeros and not the empty prompt.
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    zeros_for_empty: bool

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Embeddings:
        """Prompts -> {"encoder_hidden_states": (n, T, D)}, and of XL {"text_embeds": (n, P)}.

        Prompts are padded and cut to the encoder's T tokens, as diffusers' pipelines do. Each goes through the
        encoders alone, so that no prompt changes a bit of another's embedding (invariants 4, 9).

        Raises:
            UnicodeEncodeError: a prompt holds a lone surrogate, which is no text.
        """
        rows = [self._encode(prompt[:MAX_CHARACTERS].encode().decode()) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @property
    def null(self) -> Embeddings:
        """What "no prompt" is, for label dropout and guidance: {"encoder_hidden_states": (1, T, D), ...}."""
        device = next(self.encoders[0].parameters()).device
        return {name: value.to(device) for name, value in self._null.items()}

    @property
    def settings(self) -> list[Any]:
        """What shapes an embedding besides weights: settings, and digests of the tokenizers."""
        nothing = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # say nothing of the encoder
        tables = [hashlib.sha256(each.backend_tokenizer.to_str().encode()).hexdigest() for each in self.tokenizers]
        configs = [encoder.config.to_dict() for encoder in self.encoders]
        return [*tables, *({k: v for k, v in c.items() if k not in nothing} for c in configs), self.zeros_for_empty]

    @cached_property
    def _null(self) -> Embeddings:
        null = self.encode([""])
        return {name: torch.zeros_like(value) for name, value in null.items()} if self.zeros_for_empty else null

    def _encode(self, prompt: str) -> Embeddings:
        if len(self.encoders) == 1:
            return {"encoder_hidden_states": self.encoders[0](self._tokens(0, prompt)).last_hidden_state}
        answers = [
            encoder(self._tokens(index, prompt), output_hidden_states=True)
            for index, encoder in enumerate(self.encoders)
        ]
        hidden = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)  # Podell et al. 2023, section 2.1
        return {"encoder_hidden_states": hidden, "text_embeds": answers[1].text_embeds}

    def _tokens(self, index: int, prompt: str) -> torch.Tensor:
        """(1, T) token ids."""
        encoder = self.encoders[index]
        length = encoder.config.max_position_embeddings
        found = self.tokenizers[index](
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(next(encoder.parameters()).device)


def load_text_encoders(folder: Path, index: dict[str, Any], name: str) -> TextEncoders:
    """The text encoders in a base's folder.

    index: its model_index.json. name: of the base, for messages.

    Raises:
        UserError: there are none, or others than CLIP's.
    """
    parts = [which for which in ("", "_2") if (folder / f"text_encoder{which}").is_dir()]
    if not parts or parts[0] != "":
        raise UserError(
            f"base {name!r} wants text and has no text_encoder folder. Choose Stable Diffusion 1.x, 2.x or XL base."
        )
    encoders = tuple(_load_encoder(folder / f"text_encoder{which}", name) for which in parts)
    if len(parts) == 2 and not isinstance(encoders[1], CLIPTextModelWithProjection):
        raise UserError(f"base {name!r}: its text_encoder_2 is no CLIPTextModelWithProjection. Choose another base.")
    try:
        tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / f"tokenizer{which}") for which in parts)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"base {name!r}: its tokenizer could not be opened: {error}") from error
    return TextEncoders(tokenizers, encoders, len(parts) == 2 and bool(index.get("force_zeros_for_empty_prompt", True)))


def _load_encoder(folder: Path, name: str) -> CLIPTextModel | CLIPTextModelWithProjection:
    kinds = (read_settings(folder / "config.json") or {}).get("architectures") or ["unnamed"]
    if kinds[0] not in _ENCODERS:
        raise UserError(
            f"base {name!r}: its {folder.name} is {kinds[0]}, and this version reads {' and '.join(_ENCODERS)}. "
            "Choose Stable Diffusion 1.x, 2.x or XL base."
        )
    return load_part(_ENCODERS[kinds[0]], folder, name)
