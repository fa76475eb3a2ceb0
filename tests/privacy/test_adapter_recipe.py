"""A stranger's recipe may say little of what happens when its adapter is opened."""

import dataclasses
import os

import pytest
from tiny_adapters import ONE_SUM

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_recipe import MAX_ROWS, check_rows, read_recipe, stated_base
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, to_yaml

RECIPE = Recipe(privacy=Privacy(epsilon=1.0))


def saying(base, revision=None):
    return dataclasses.replace(RECIPE, model=Model(pretrained_model_name_or_path=base, revision=revision))


def with_classes(names, rows):
    return dataclasses.replace(RECIPE, data=Data(class_names=names), adapter=Adapter(class_rows=rows))


def written(folder, recipe):
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def test_a_recipe_is_read_as_it_was_written(tmp_path):
    recipe = with_classes(("a", "b"), (3, 4))
    assert read_recipe(written(tmp_path, recipe)) == recipe


def test_a_recipe_that_is_missing_or_a_pipe_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="recipe.yaml cannot be read"):
        read_recipe(tmp_path)
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(PrivacyError, match="not a regular file"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("rows", [(3,), (3, 4, 5)])
def test_rows_that_are_not_one_for_each_class_are_refused(tmp_path, rows):
    with pytest.raises(PrivacyError, match=f"names 2 classes and {len(rows)} rows"):
        read_recipe(written(tmp_path, with_classes(("a", "b"), rows)))


def test_a_recipe_cannot_keep_the_machine_busy_for_ever(tmp_path):
    with pytest.raises(UserError, match="asks for 1000000000 denoising steps"):
        read_recipe(written(tmp_path, dataclasses.replace(RECIPE, sample=Sample(num_inference_steps=10**9))))


def with_rows(names, first, each):
    """Of `code_moments`: rows for each class, beginning with `first`."""
    spec = Adapter(kind="code_moments", class_rows=tuple(range(first, first + len(names))), rows_per_class=each)
    return Recipe(data=Data(class_names=names), adapter=spec, **ONE_SUM)


def test_a_recipe_cannot_fill_the_memory_with_rows_of_a_class_table(tmp_path):
    names = tuple(f"{i}" for i in range(10))
    fits = with_rows(names, 1, MAX_ROWS // 10)
    assert len(read_recipe(written(tmp_path, fits)).adapter.rows_in_turn) == MAX_ROWS
    with pytest.raises(PrivacyError, match="asks for more than 1000000 rows of the class table"):
        read_recipe(written(tmp_path, with_rows((*names, "10"), 1, MAX_ROWS // 10)))


def test_two_adapters_do_not_share_a_row_of_a_later_draw_either(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    cats = with_rows(("cat", "dog"), 1, 3)  # rows 1 to 6: 5 is a cat's
    check_rows(folders, [cats, with_rows(("cat", "dog"), 7, 3)])
    for other in (with_classes(("cow",), (5,)), with_classes(("cat",), (5,)), with_rows(("cat", "dog"), 1, 3)):
        with pytest.raises(UserError, match="both moved row [15] of the class table, and one of them is code_moments"):
            check_rows(folders, [cats, other])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./mine", "--base PATH/mine"),
        ("../secrets", "--base PATH/secrets"),
        ("/etc/ssl", "--base PATH/ssl"),
        ("~/bases/one", "--base PATH/one"),
        ("a/../b", "--base PATH/b"),
        ("a/b/c", "--base PATH/c"),
        ("builtin:../../etc", "--base PATH/etc"),
        ("builtin:", "--base PATH/builtin_"),
        ("..", "--base PATH/.."),
        ("file:///etc/ssl", "--base PATH/ssl"),
        ("x\x1b[2J", "--base PATH/x__2J"),
        ("", "--base PATH/"),
    ],
)
def test_a_base_that_is_a_place_on_a_machine_must_be_named_by_the_user(tmp_path, name, hint):
    with pytest.raises(UserError) as refused:
        stated_base(tmp_path, saying(name))
    assert str(refused.value).endswith(hint) and "\x1b" not in str(refused.value)


def test_bases_that_everybody_has_are_taken_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stated_base(tmp_path, saying("builtin:handwriting")) == ("builtin:handwriting", None)
    assert stated_base(tmp_path, saying("some/base-1.0", "0" * 40)) == ("some/base-1.0", "0" * 40)
    (tmp_path / "some" / "base-1.0").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"here lies a folder of that name. To take the folder, .*--base ./some/base-1.0"
    ):
        stated_base(tmp_path, saying("some/base-1.0"))


@pytest.mark.parametrize(
    "revision",
    ["/dev/zero", "/etc/passwd", "../x", "../../../x", "recipe.yaml", "main", "", "0" * 39, "A" * 40, "0" * 40 + "\n"],
)
def test_a_revision_that_is_no_commit_may_be_a_place_and_is_never_looked_up(tmp_path, revision):
    with pytest.raises(UserError, match="says no commit of it.*--base some/base$"):
        stated_base(tmp_path, saying("some/base", revision))


def test_two_adapters_share_a_row_only_for_a_class_of_one_name(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    cats, pets = with_classes(("cat", "dog"), (3, 4)), with_classes(("dog", "cow"), (4, 5))
    check_rows(folders, [cats, pets, RECIPE])
    with pytest.raises(UserError, match=r"a and .*b both moved row 3 of the class table, for 'cat' and for 'dog'"):
        check_rows(folders[:2], [cats, with_classes(("dog", "cow"), (3, 5))])
