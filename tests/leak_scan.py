"""Find secrets in files and texts, in whatever form a leak is likely to have them."""

import base64
import contextlib
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


class Number(int):
    """A secret number: it counts only where it stands alone, as 4127, 4,127 or eight bytes."""


def forms(secret: str | bytes | np.ndarray | Number) -> list[re.Pattern[bytes]]:
    """Patterns of a secret: text, bytes, a row of grey values, or a number."""
    if isinstance(secret, Number):
        written = f"{secret:,}".replace(",", ",?")
        return [re.compile(rf"(?<![\w.]){written}(?!\w)".encode()), _literal(struct.pack("<q", secret))]
    if isinstance(secret, np.ndarray):
        return [_literal(form) for pixels in (secret, secret[::2], secret[1::2]) for form in _pixel_forms(pixels)]
    encoded = (
        [secret.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")] if isinstance(secret, str) else [secret]
    )
    return [
        _literal(form)
        for raw in encoded
        for form in (raw, raw.hex().encode(), raw.hex().upper().encode(), *_base64(raw))
    ]


def _literal(form: bytes) -> re.Pattern[bytes]:
    return re.compile(re.escape(form))


def _base64(raw: bytes) -> Iterator[bytes]:
    """What every base64 text has that holds `raw`, at each of the three places it may begin in a group."""
    for before in range(3):
        whole = base64.b64encode(bytes(before) + raw)
        yield whole[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]


def _pixel_forms(pixels: np.ndarray) -> Iterator[bytes]:
    """As bytes, as text, and as the floating-point numbers that pixels become."""
    yield pixels.tobytes()
    yield pixels.tobytes().hex().encode()
    yield from (separator.join(map(str, pixels.tolist())).encode() for separator in (",", ", ", " "))
    yield from _base64(pixels.tobytes())
    scaled = torch.tensor(pixels).float()
    for values in (scaled, scaled / 255, scaled / 127.5 - 1):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            yield values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def views(path: Path) -> Iterator[bytes]:
    """A file's name and bytes; of a PNG also what it says about itself, and its pixels, as grids enlarge them too."""
    yield str(path.name).encode("utf-8", "surrogateescape")
    yield path.read_bytes()
    with contextlib.suppress(UnidentifiedImageError), Image.open(path, formats=["PNG"]) as image:
        image.load()
        yield repr(image.info).encode()
        pixels = np.asarray(image.convert("RGB"))
        yield from (pixels[::zoom, ::zoom, channel].tobytes() for channel in range(3) for zoom in (1, 2))


def find(secrets: Mapping[str, object], *places: Path | str) -> set[tuple[str, str]]:
    """(secret, place) of everything found in files, in folders with all that is below, and in texts."""
    patterns = {name: forms(secret) for name, secret in secrets.items()}
    found = set()
    for place in places:
        if isinstance(place, str):
            named = [("text", [place.encode()])]
        else:
            paths = sorted(place.rglob("*")) if place.is_dir() else [place]
            named = [(str(p), views(p) if p.is_file() else [p.name.encode()]) for p in paths if not p.is_symlink()]
        for where, contents in named:
            for content in contents:
                found |= {(name, where) for name, kinds in patterns.items() if any(k.search(content) for k in kinds)}
    return found
