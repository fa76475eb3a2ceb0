"""What the documentation says can be typed, opened and found."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.environment import TESTED_PAIR
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import NEIGHBORING_RELATIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("adapters/*.md")]
)
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
README = (ROOT / "README.md").read_text()
COMMANDS = (
    "pip install -c constraints.txt -e . && dp-peft train --adapter lora --epsilon 1",
    'pip install -c constraints.txt -e ".[test]" && pytest',
)
PATHS = (click.Path, click.File)


def fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> set[str]:
    """Every `dp-peft ...`: in shell blocks, in `inline code`, and in the comments that head a recipe."""
    shell = [content for language, content in fenced(text) if language in ("sh", "bash", "console")]
    lines = [line for content in shell for line in content.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(dp-peft [^`]+)`", prose)
    lines += re.findall(r"^# (dp-peft .+)$", text, re.MULTILINE)
    found = [re.search(r"(?:^|&& )(?:\$ )?(dp-peft\b.*)", line) for line in lines]
    return {match[1].strip() for match in found if match}


def check_command(line: str) -> None:
    """Parse a command line against the CLI: the command, its options and their values; files need not exist.

    Raises:
        click.UsageError: it cannot be typed like that.
    """
    command: click.Command = main
    context = click.Context(main, info_name="dp-peft", **main.context_settings)
    words = shlex.split(line, comments=True)[1:]
    if words == ["COMMAND", "--help"]:
        return
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if command.get_command(context, name) is None:
            raise click.UsageError(f"there is no command {name!r}")
        command = command.get_command(context, name)
        context = click.Context(command, parent=context, info_name=name)
    values, _, given = command.make_parser(context).parse_args(list(words))
    for parameter in given:
        if not isinstance(parameter.type, PATHS) and values.get(parameter.name) is not None:
            parameter.type_cast_value(context, values[parameter.name])


def documented_commands() -> list[str]:
    return sorted({line for page in [*PAGES, *RECIPES] for line in command_lines(page.read_text())})


def snippets() -> list[str]:
    return [content for page in PAGES for language, content in fenced(page.read_text()) if language == "python"]


def test_the_readme_says_in_one_sentence_what_the_tool_is_and_then_two_commands():
    title, sentence, *_ = README.split("\n\n")
    assert title == "# dp-peft-diffusion"
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
    assert [content for language, content in fenced(README) if language == "sh"][:2] == [f"{c}\n" for c in COMMANDS]


def test_ci_runs_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m 1 '(.*)' README.md", (ROOT / ".ci/run").read_text())[1]
    assert [line for line in README.splitlines() if re.search(pattern, line)] == [COMMANDS[1]]


@pytest.mark.parametrize("line", documented_commands())
def test_every_documented_command_can_be_typed(line):
    check_command(line)


@pytest.mark.parametrize(
    "line", ["dp-peft trian", "dp-peft train --rnak 4", "dp-peft train --rank many", "dp-peft train --rank"]
)
def test_a_command_that_cannot_be_typed_is_found(line):
    with pytest.raises(click.UsageError):
        check_command(line)


def test_commands_are_found_wherever_they_stand():
    shell = "```sh\npip x && dp-peft c \\\n  --d\n$ dp-peft e # why\n```\n"
    text = f"# dp-peft a\n`dp-peft b`\n{shell}```python\ndp-peft f\n```\n"
    assert command_lines(text) == {"dp-peft a", "dp-peft b", "dp-peft c    --d", "dp-peft e # why"}


@pytest.mark.parametrize("source", snippets())
def test_every_python_snippet_compiles_and_imports_what_exists(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_of_a_recipe_is_its_command(recipe):
    first = recipe.read_text().splitlines()[0]
    assert first.startswith("# dp-peft ") and f"--recipe {recipe.stem}" in first


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_heading_leads_to_one(page):
    for where, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        assert anchor in headings(page.parent / where if where else page), f"{where}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_page_names_is_there(page):
    for path, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text()):
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name


def test_the_sharp_edges_have_the_grades_that_their_table_says():
    page = (ROOT / "docs/explanation/sharp-edges.md").read_text()
    listed = re.findall(r"^\| \[(.+)\]\(#.+\) \| (\w+) \|", page, re.MULTILINE)
    sections = re.split(r"^## (\w+).*\n", page.partition("## At a glance")[2], flags=re.MULTILINE)
    graded = {
        title: grade.lower()
        for grade, text in zip(sections[1::2], sections[2::2], strict=True)
        for title in re.findall(r"^### (.+)$", text, re.MULTILINE)
    }
    assert {title.replace("`", ""): grade for title, grade in listed} == graded
    assert len(listed) == len(graded) and set(graded.values()) == {"critical", "outside", "theoretical", "negligible"}


def test_the_picture_of_the_rooms_names_every_file():
    architecture = (ROOT / "docs/explanation/architecture.md").read_text()
    picture = next(content for _, content in fenced(architecture) if content.startswith("dp_peft_diffusion/\n"))
    drawn, folder = set(), ""
    for indent, name in re.findall(r"^( +)([\w/.]+)", picture, re.MULTILINE):
        folder = "" if len(indent) == 2 else folder
        if name.endswith("/"):
            folder = name
        else:
            drawn.add(folder + name)
    package = ROOT / "dp_peft_diffusion"
    assert drawn == {str(path.relative_to(package)) for path in package.rglob("*.py") if path.stem != "__init__"}


def test_env_names_the_pair_that_is_tested():
    pins = (ROOT / "constraints.txt").read_text().split()
    assert set(TESTED_PAIR.split()) <= set(pins)


def test_the_prices_of_the_relations_are_those_of_the_accountant():
    page = (ROOT / "docs/explanation/what-is-public.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| [\d.]+ \|.*$", page, re.MULTILINE)]
    assert len(rows) == 3
    for noise_multiplier, *stated in rows:
        for relation, epsilon in zip(NEIGHBORING_RELATIONS, stated, strict=True):
            known_n = None if relation == "add_or_remove_one" else 60_000
            mechanism = DPMechanism(
                sampling_prob=4096 / 60_000,
                steps=1000,
                noise_multiplier=float(noise_multiplier),
                expected_batch_size=4096,
                num_examples=known_n,
                neighboring_relation=relation,
            )
            assert f"{mechanism.epsilon(1e-5):.3g}" == epsilon
