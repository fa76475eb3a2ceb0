"""YAML without surprises: only true, false and null are words, 1e-5 is a number, no key twice, no tags, no aliases."""

import re
from pathlib import Path
from typing import Any

import yaml

from dp_peft_diffusion.errors import UserError

# YAML 1.2's core scalars (yaml.org/spec/1.2.2, 10.3.2), by the characters they start with. PyYAML's own are those of
# YAML 1.1, where `no` is false, 010 is 8, 1:30 is 90 and 1e-5 is text.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(0|[1-9][0-9]{0,17})", "-+0123456789"),
    "float": (
        r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


MAX_CHARACTERS = (1 << 18) - 1  # reading YAML is slow, and recipes may come from strangers


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def fetch_tag(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "tags (!) have no place here", self.get_mark())

    def fetch_anchor(self) -> None:
        # A few lines of lists that repeat each other would fill the memory.
        raise yaml.scanner.ScannerError(None, None, "anchors (&) have no place here", self.get_mark())

    def fetch_alias(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "aliases (*) have no place here", self.get_mark())


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of either YAML would not take for text."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _resolver in (_Loader, _Dumper):
        _resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Dumper.add_representer(tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))
# Text with line breaks goes in double quotes, where they are escaped: every value stays on one line.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"'),
)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a YAML file; an empty file is an empty table.

    Raises:
        UserError: no such file, not YAML, a key that stands twice, or no table.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{path} is larger than {MAX_CHARACTERS} characters, and so no recipe.")
        table = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the name of the file.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a recipe: {' '.join(str(error).split())}. Mend it there.") from error
    if not isinstance(table, dict | None):
        raise UserError(f"{path} is not a recipe: it should hold lines such as `key: value`.")
    return table or {}


def write_line(key: str, value: object) -> str:
    """`key: value`, which `read_table` reads back as it was; tuples become lists on one line."""
    return yaml.dump({key: value}, Dumper=_Dumper, width=2**31, allow_unicode=True, default_flow_style=False).rstrip()
