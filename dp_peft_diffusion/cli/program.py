"""How the program fails: one line that begins with `error:`, an exit code, and no traceback."""

import shlex
from typing import Any, NoReturn

import click

from dp_peft_diffusion.cli.dialect import refusal
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError

EXIT_CODES = {UserError: 2, RunError: 1, PrivacyError: 3}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Program(click.Group):
    """The group of all commands, which turns every expected error into a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order a user meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (UserError, RunError, PrivacyError) as error:
            _fail(ctx, str(error), EXIT_CODES[type(error)])
        except click.UsageError as error:
            _fail(ctx, _usage(error), EXIT_CODES[UserError])
        except KeyboardInterrupt:
            _interrupted(ctx)
        except BrokenPipeError:
            raise  # the reader of our output left: click ends quietly
        except OSError as error:
            if error.filename is None:
                raise
            _fail(ctx, f"{error.filename}: {error.strerror}. Check the path and its rights.", EXIT_CODES[RunError])


def hint(text: str) -> None:
    """Something helpful that is not the result: to stderr."""
    click.echo(printable(text, keep="\n"), err=True)


def printable(text: str, keep: str = "") -> str:
    """Text, maybe out of a stranger's file, that cannot steer a terminal.

    keep: characters that stay as they are.
    """
    return "".join(char if char.isprintable() or char in keep else f"\\x{ord(char):02x}" for char in text)


def command_line(*words: object) -> str:
    """A command of this program, as it can be typed."""
    return shlex.join(["dp-peft", *map(str, words)])


def _fail(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    hint(f"error: {message}")  # which may quote a stranger's file
    ctx.exit(exit_code)


def _usage(error: click.UsageError) -> str:
    where = error.ctx.command_path if error.ctx else "dp-peft"
    if isinstance(error, click.NoSuchOption) and where.endswith(" train"):
        known_elsewhere = refusal(error.option_name)
        if known_elsewhere:
            return known_elsewhere
    return f"{error.format_message()} Type {where} --help."


def _interrupted(ctx: click.Context) -> NoReturn:
    hint("\nStopped, as you asked.")
    if ctx.invoked_subcommand == "train":
        hint(
            "Nothing is lost and nothing shareable was written. Type the same command to go on, without --new_attempt."
        )
    if ctx.invoked_subcommand in ("pretrain", "sample"):
        hint("What was made stays. Type the same command to go on.")
    ctx.exit(INTERRUPTED)
