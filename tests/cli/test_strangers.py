"""What the commands that open a stranger's folder say of it on stderr."""

import warnings

import click
import pytest
from click.testing import CliRunner

from dp_peft_diffusion.cli.adapters import announce_base, warnings_as_hints
from dp_peft_diffusion.cli.program import Program, hint, printable
from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.recipe import Model, Privacy, Recipe, to_yaml

HOSTILE = "a\x1b[2J\x07\r\x9b1m\u202ec\nd \u00e9"
SHOWN = "a\\x1b[2J\\x07\\x0d\\x9b1m\\x202ec\nd \u00e9"


def test_nothing_in_a_strangers_text_steers_the_terminal(capsys):
    hint(HOSTILE)
    with warnings_as_hints():
        warnings.warn_explicit(HOSTILE, UserWarning, "x", 1, module="dp_peft_diffusion.x")
    assert capsys.readouterr().err == f"{SHOWN}\nwarning: {SHOWN}\n"
    assert printable("a\nb") == "a\\x0ab"


@pytest.mark.parametrize("error", [PrivacyError(HOSTILE), OSError(2, "gone", HOSTILE), click.UsageError(HOSTILE)])
def test_an_error_that_quotes_a_stranger_is_printable(error):
    @click.group(cls=Program)
    def program():
        pass

    @program.command()
    def fail():
        raise error

    shown = CliRunner().invoke(program, ["fail"])
    assert shown.stderr.startswith(f"error: {SHOWN}") and not set("\x1b\x07\r\x9b\u202e") & set(shown.output)


@pytest.mark.parametrize(("revision", "said"), [("1" * 40, f"commit {'1' * 40}"), (None, "its newest commit")])
def test_the_base_that_a_recipe_names_is_told_before_it_is_fetched(tmp_path, capsys, revision, said):
    def write(name, revision=None):
        recipe = Recipe(
            model=Model(pretrained_model_name_or_path=name, revision=revision), privacy=Privacy(epsilon=1.0)
        )
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))

    write("some/base", revision)
    announce_base([tmp_path], None)
    assert f"names the base some/base of the Hub, {said}. It is fetched" in capsys.readouterr().err
    announce_base([tmp_path], "mine")
    write("builtin:handwriting")
    announce_base([tmp_path], None)
    write("../mine")
    announce_base([tmp_path], None)
    assert capsys.readouterr().err == ""
