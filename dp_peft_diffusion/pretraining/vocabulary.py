"""A CLIP tokenizer for the words of public captions; words that they lack fall apart into letters."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from dp_peft_diffusion.errors import UserError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_PIECES = 8192  # beyond the bytes; the rarest words of more captions stay in parts


def make_tokenizer(captions: list[str], spare_words: Sequence[str], length: int) -> CLIPTokenizer:
    """A tokenizer of byte pairs learned from captions and other words, whose prompts have `length` tokens.

    Raises:
        UserError: a caption is longer.
    """
    letters, merges = learn_merges([*captions, *spare_words])
    pieces = [letter + end for end in ("", WORD_END) for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {piece: number for number, piece in enumerate([*dict.fromkeys(pieces), START, END])}
    tokenizer = CLIPTokenizer(vocabulary, merges, bos_token=START, model_max_length=length)
    longest = max(captions, key=lambda caption: len(tokenizer(caption).input_ids))
    needed = len(tokenizer(longest).input_ids)
    if needed > length:
        raise UserError(
            f"--text_tokens {length} (text_tokens in a recipe) cuts the caption {longest[:80]!r}. Type {needed}."
        )
    return tokenizer


def write_vocabulary(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write vocab.json and merges.txt, from which older versions of transformers read a tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))


def learn_merges(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The letters that stand for the 256 bytes, and the pairs to merge, in order, until every word is whole."""
    learned = CLIPTokenizer(vocab={START: 0, END: 1}).backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    learned.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + MAX_PIECES, initial_alphabet=alphabet, end_of_word_suffix=WORD_END,
            show_progress=False,
        ),
    )  # fmt: skip
    merges = json.loads(learned.to_str())["model"]["merges"]
    return alphabet, [(first, second) for first, second in merges]
