"""An interrupted run goes on bit for bit, never under another context, and never counts less than it began."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import KEY, changed, tiny_recipe

from dp_peft_diffusion import attempt, training
from dp_peft_diffusion.cli.certificates import delete_left_over_key
from dp_peft_diffusion.diffusion.datasets import source_digest
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.runs import context
from dp_peft_diffusion.runs import folder as folder_module
from dp_peft_diffusion.runs.attempts import Attempts, charged, load_attempts
from dp_peft_diffusion.runs.folder import RunFolder
from dp_peft_diffusion.training import FinishedRun, prepare, run, train


class Stopped(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nobody interrupted."""
    return train(recipe, tmp_path_factory.mktemp("whole") / "run", key=KEY).folder


def released(folder):
    """Every byte that a reader of the folder gets, except the certificate's and card's own hashes of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def stop_at(monkeypatch, module, name, call, after=False):
    """The `call`-th use of a function of the loop ends the process, before or after its work."""
    original, calls = getattr(module, name), []

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) == call and not after:
            raise Stopped
        result = original(*arguments, **named)
        if len(calls) == call:
            raise Stopped
        return result

    monkeypatch.setattr(module, name, stopping)


def interrupt(monkeypatch, recipe, folder, module=training, name="add_noise", call=4, after=False, **arguments):
    stop_at(monkeypatch, module, name, call, after)
    with pytest.raises(Stopped):
        run(prepare(recipe, folder), **{"key": KEY, **arguments})
    monkeypatch.undo()


POINTS = [
    (RunFolder, "write_recipes", 1, False),
    (attempt, "write_problems", 1, True),
    (attempt, "note_spending", 1, False),
    (training, "example_ids", 1, False),
    (training, "add_noise", 1, False),
    (training, "add_noise", 4, True),
    (training, "apply_update", 2, True),
    (training, "record_metrics", 5, True),
    (training, "write_grid", 2, True),
    (training, "save_state", 1, False),
    (training, "save_state", 2, True),
    (training, "save_state", 3, True),
    (training, "export", 1, False),
    (training, "export", 1, True),
]


@pytest.mark.parametrize(("module", "name", "call", "after"), POINTS)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(
    recipe, whole, tmp_path, monkeypatch, module, name, call, after
):
    interrupt(monkeypatch, recipe, tmp_path / "run", module, name, call, after)
    assert not (tmp_path / "run").exists() and (tmp_path / "run.private" / "key").is_file()
    resumed = train(recipe, tmp_path / "run", key=KEY)
    assert released(resumed.folder) == released(whole)
    assert steps_begun(resumed.private_folder / "ledger.jsonl") == {1: 6}
    assert not (resumed.private_folder / "key").exists() and not list(resumed.private_folder.glob("state*"))


def test_a_run_can_be_stopped_again_and_again(recipe, whole, tmp_path, monkeypatch):
    for call in (2, 2, 2, 2):
        interrupt(monkeypatch, recipe, tmp_path / "run", training, "apply_update", call, True)
    assert released(train(recipe, tmp_path / "run").folder) == released(whole)


def test_how_often_the_state_is_saved_changes_nothing(recipe, whole, tmp_path):
    often = train(changed(recipe, "train", checkpointing_steps=1), tmp_path / "run", key=KEY)
    assert load_file(often.folder / "adapter_model.safetensors").keys()
    assert (often.folder / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_moments_and_averages_come_back_whole(recipe, tmp_path, monkeypatch, optimizer):
    recipe = changed(recipe, "train", optimizer=optimizer)
    unbroken = train(recipe, tmp_path / "unbroken", key=KEY)
    interrupt(monkeypatch, recipe, tmp_path / "run", call=5)
    assert released(train(recipe, tmp_path / "run").folder) == released(unbroken.folder)


def noisy_sums(monkeypatch):
    """Every noisy sum that the loop makes, by name of tensor."""
    sums, original = [], training.add_noise
    monkeypatch.setattr(training, "add_noise", lambda *a: sums.append(original(*a)) or sums[-1])
    return sums


def changes(recipe, tmp_path):
    darker = tmp_path / "darker"
    shutil.copytree(recipe.data.dataset_name, darker)
    next(darker.rglob("*.png")).write_bytes(b"")
    return {
        "learning_rate": changed(recipe, "train", learning_rate=0.2),
        "precision": changed(recipe, "train", mixed_precision="bf16"),
        "noise_multiplier": changed(recipe, "privacy", noise_multiplier=3.0),
        "max_grad_norm": changed(recipe, "privacy", max_grad_norm=2.0),
        "micro_batch_size": changed(recipe, "train", micro_batch_size=5),
        "dataset_name": changed(recipe, "data", dataset_name=str(darker)),
        "max_train_steps": changed(recipe, "train", max_train_steps=7),
    }


@pytest.mark.parametrize(
    "what",
    "learning_rate precision noise_multiplier max_grad_norm micro_batch_size dataset_name max_train_steps".split(),
)
def test_another_recipe_is_refused_with_the_difference_and_loses_nothing(recipe, tmp_path, monkeypatch, what):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    before = released(tmp_path / "run.private")
    with pytest.raises(UserError, match=f"{what}.* before, .* now.*--new_attempt"):
        prepare(changes(recipe, tmp_path)[what], tmp_path / "run")
    assert released(tmp_path / "run.private") == before


def test_images_that_changed_in_place_are_refused(recipe, tmp_path, monkeypatch):
    shutil.copytree(recipe.data.dataset_name, tmp_path / "images")
    recipe = changed(recipe, "data", dataset_name=str(tmp_path / "images"))
    interrupt(monkeypatch, recipe, tmp_path / "run")
    next((tmp_path / "images").rglob("*.png")).write_bytes(b"")
    with pytest.raises(UserError, match="the images changed"):
        run(prepare(recipe, tmp_path / "run"))


MACHINES = {
    "threads": (context.torch, "get_num_threads", lambda: 77),
    "torch": (context.importlib.metadata, "version", lambda name: f"another {name}"),
    "code": (context, "code_digest", lambda: "0" * 64),
    "device": (context.platform, "machine", lambda: "another"),
    "settings": (context.torch, "get_float32_matmul_precision", lambda: "medium"),
}


@pytest.mark.parametrize("what", MACHINES)
def test_another_machine_is_refused_by_name(recipe, tmp_path, monkeypatch, what):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    monkeypatch.setattr(*MACHINES[what])
    with pytest.raises(UserError, match=f"{what} changed|{what}: .* before, .* now"):
        prepare(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", context.VARIABLES)
def test_a_variable_that_chooses_other_kernels_is_another_machine(recipe, tmp_path, monkeypatch, name):
    before = context.settings()
    monkeypatch.setenv(name, "another")
    assert context.settings() != before


def test_the_digest_of_the_code_changes_with_any_byte_of_any_file(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "runs").mkdir(parents=True)
    (package / "runs" / "context.py").write_text("a = 1")
    (package / "noise.py").write_text("b = 2")
    monkeypatch.setattr(context, "__file__", str(package / "runs" / "context.py"))
    digests = [context.code_digest()]
    for path in (package / "noise.py", package / "runs" / "context.py"):
        path.write_text(path.read_text() + " ")
        digests.append(context.code_digest())
    (package / "noise.py").rename(package / "other.py")
    assert len({*digests, context.code_digest()}) == 4


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.03}),
        ("unet/config.json", {"norm_eps": 1e-3}),
        ("dp_peft_base.json", {"class_code_rank": 3}),
    ],
)
def test_a_base_with_other_settings_is_another_base_though_its_weights_are_the_same(
    recipe, tmp_path, monkeypatch, file, setting
):
    base = tmp_path / "base"
    shutil.copytree(recipe.model.pretrained_model_name_or_path, base)
    recipe = changed(recipe, "model", pretrained_model_name_or_path=str(base))
    interrupt(monkeypatch, recipe, tmp_path / "run")
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(UserError, match="the base changed"):
        prepare(recipe, tmp_path / "run")


def test_the_same_noise_is_never_drawn_under_another_context(recipe, tmp_path, monkeypatch):
    """With the same run key, a new attempt and a changed recipe each draw other noise in every step."""

    recipe = changed(recipe, "train", train_batch_size=10)  # all of them: a plain Gaussian, which is priced at once

    def noise_of(folder, recipe, **arguments):
        with monkeypatch.context() as patch:
            sums = noisy_sums(patch)
            patch.setattr(training, "example_ids", lambda *a: torch.zeros(0, dtype=torch.int64).numpy())
            run(prepare(recipe, folder, **arguments), key=KEY)
        return [torch.cat([value.flatten() for value in noisy.values()]) for noisy in sums]

    first = noise_of(tmp_path / "first", recipe)
    again = noise_of(tmp_path / "again", recipe)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = noise_of(tmp_path / "other", changed(recipe, "train", learning_rate=0.2))
    interrupt(monkeypatch, recipe, tmp_path / "new", call=2)
    new = noise_of(tmp_path / "new", recipe, new_attempt=True)
    n = first[0].numel()
    for sums in (other, new, first[1:]):
        for a, b in zip(first, sums, strict=False):
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
            assert abs(correlation) < 6 / n**0.5


def test_a_new_attempt_charges_every_step_begun_and_the_certificate_says_so(recipe, tmp_path, monkeypatch):
    recipe = changed(recipe, "train", train_batch_size=10)  # all of them: a plain Gaussian, which is priced at once
    interrupt(monkeypatch, recipe, tmp_path / "run", call=4)
    plain = prepare(recipe, tmp_path / "elsewhere")
    prepared = prepare(recipe, tmp_path / "run", new_attempt=True)
    (release,) = prepared.promise.prior
    assert release.mechanism.steps == 4 and prepared.promise.epsilon > plain.promise.epsilon
    result = run(prepared)
    (listed,) = result.certificate["other_releases"]
    assert listed["mechanism"]["count"] == 4 and listed["source"] == "an earlier attempt of this run"
    ten = changed(recipe, "train", max_train_steps=10)
    assert prepared.promise.priced == pytest.approx(prepare(ten, tmp_path / "ten").promise.priced, rel=1e-3)
    assert steps_begun(result.private_folder / "ledger.jsonl") == {1: 4, 2: 6}
    names = [one.name for one in load_attempts(prepared.run.attempts).attempts]
    entries = spending.spendings(spending.data_set_id(source_digest(prepared.recipe.data)))
    assert {entry.name: entry.steps for entry in entries if entry.name in names} == dict(
        zip(names, [4, 6], strict=True)
    )
    assert not verify(result.folder).ok  # the key was given


def test_a_new_attempt_keeps_the_total_at_epsilon_by_more_noise(recipe, tmp_path, monkeypatch):
    recipe = changed(recipe, "privacy", noise_multiplier=None, epsilon=5.0)
    recipe = changed(recipe, "train", train_batch_size=10)  # all of them: a plain Gaussian, which is priced at once
    interrupt(monkeypatch, recipe, tmp_path / "run", call=4, key=None)
    before = prepare(recipe, tmp_path / "run").mechanism.noise_multiplier
    result = run(prepare(recipe, tmp_path / "run", new_attempt=True))
    assert result.certificate["mechanism"]["noise_multiplier"] > before
    assert result.certificate["guarantee"]["epsilon"] == 5.0 and verify(result.folder).ok


def test_a_new_attempt_of_nothing_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="no interrupted run"):
        prepare(recipe, tmp_path / "run", new_attempt=True)


def spoil(path, how, spare):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "removed":
        path.unlink()
    else:
        path.write_bytes(spare.read_bytes())


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed", "swapped"])
@pytest.mark.parametrize("file", ["state.json", "state-1-2.safetensors"])
def test_a_spoiled_state_is_refused_by_name_and_a_replay_from_the_start_ends_the_same(
    recipe, whole, tmp_path, monkeypatch, how, file
):
    interrupt(monkeypatch, recipe, tmp_path / "run", call=4)
    if how == "swapped":
        interrupt(monkeypatch, recipe, tmp_path / "spare", call=4, key=bytes(16))
    spoil(tmp_path / "run.private" / file, how, tmp_path / "spare.private" / file)
    if (file, how) != ("state.json", "removed"):
        with pytest.raises(RunError, match="state.json cannot be used.*Remove that file.*costs time and no privacy"):
            train(recipe, tmp_path / "run")
        (tmp_path / "run.private" / "state.json").unlink()
    resumed = train(recipe, tmp_path / "run")
    assert released(resumed.folder) == released(whole)
    assert steps_begun(resumed.private_folder / "ledger.jsonl") == {1: 6}


def test_a_ledger_put_back_to_an_older_one_is_refused(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run", call=6)
    ledger = tmp_path / "run.private" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:1]))
    with pytest.raises(RunError, match="holds 4 steps.*lists only 1"):
        train(recipe, tmp_path / "run")
    with pytest.raises(RunError, match="holds 4 steps.*lists only 1"):
        prepare(recipe, tmp_path / "run", new_attempt=True)  # it would charge one step
    ledger.unlink()
    for new_attempt in (False, True):
        with pytest.raises(RunError, match="removed or put back"):
            prepare(recipe, tmp_path / "run", new_attempt)


def test_attempts_put_back_to_older_ones_are_refused(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run", call=2)
    attempts = tmp_path / "run.private" / "attempts.json"
    older = attempts.read_bytes()
    stop_at(monkeypatch, training, "add_noise", 2)
    with pytest.raises(Stopped):
        run(prepare(recipe, tmp_path / "run", new_attempt=True))
    monkeypatch.undo()
    attempts.write_bytes(older)
    with pytest.raises(RunError, match="lists steps of attempt 2"):
        prepare(recipe, tmp_path / "run")
    attempts.write_bytes(older[:-30])
    with pytest.raises(RunError, match="damaged.*count all planned steps"):
        prepare(recipe, tmp_path / "run")
    attempts.unlink()
    with pytest.raises(RunError, match="attempts.json is gone"):
        prepare(recipe, tmp_path / "run")


@pytest.mark.parametrize("spoiled", [None, b"", bytes(15), bytes(16)])
def test_a_run_without_its_own_key_says_what_to_count(recipe, tmp_path, monkeypatch, spoiled):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    key = tmp_path / "run.private" / "key"
    key.unlink() if spoiled is None else key.write_bytes(spoiled)
    with pytest.raises(RunError, match="count all planned steps"):
        train(recipe, tmp_path / "run")


def test_steps_begun_since_a_new_attempt_was_prepared_are_not_forgotten(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run", call=2)
    prepared = prepare(recipe, tmp_path / "run", new_attempt=True)
    interrupt(monkeypatch, recipe, tmp_path / "run", call=4)
    with pytest.raises(RunError, match="another process has been"):
        run(prepared)


def test_another_unit_between_attempts_is_refused(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    record = load_attempts(tmp_path / "run.private" / "attempts.json")
    begun = steps_begun(tmp_path / "run.private" / "ledger.jsonl")
    with pytest.raises(UserError, match="do not add up.*--group_column"):
        charged(record, 1, begun, "hospital", tmp_path)


def test_a_private_attempt_after_one_without_privacy_is_refused(recipe, tmp_path, monkeypatch):
    public = changed(changed(recipe, "privacy", noise_multiplier=None, no_privacy=True), "data", declared_public=True)
    interrupt(monkeypatch, public, tmp_path / "run", name="apply_update")
    with pytest.raises(UserError, match="trained without privacy"):
        prepare(recipe, tmp_path / "run", new_attempt=True)


def test_a_run_stopped_while_a_new_attempt_is_written_down_goes_on_as_the_old_or_the_new_one(
    recipe, whole, tmp_path, monkeypatch
):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    other = changed(recipe, "train", learning_rate=0.2)
    stop_at(monkeypatch, Attempts, "save", 1)
    with pytest.raises(Stopped):
        run(prepare(other, tmp_path / "run", new_attempt=True), key=KEY)
    monkeypatch.undo()
    with pytest.raises(UserError, match="learning_rate"):
        prepare(other, tmp_path / "run")
    assert released(train(recipe, tmp_path / "run", key=KEY).folder) == released(whole)
    interrupt(monkeypatch, recipe, tmp_path / "later")
    stop_at(monkeypatch, Attempts, "save", 1, after=True)
    with pytest.raises(Stopped):
        run(prepare(other, tmp_path / "later", new_attempt=True), key=KEY)
    monkeypatch.undo()
    with pytest.raises(UserError, match="learning_rate"):
        prepare(recipe, tmp_path / "later")
    assert len(train(other, tmp_path / "later", key=KEY).certificate["other_releases"]) == 1


def test_bookkeeping_may_change_when_a_run_goes_on(recipe, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    unrecorded = changed(changed(recipe, "privacy", record_spending=False), "train", checkpointing_steps=1)
    resumed = train(unrecorded, tmp_path / "run", key=KEY)
    weights = "adapter_model.safetensors"
    assert (resumed.folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_private_files_never_land_where_something_is_shared_or_belongs_to_others(recipe, whole, tmp_path):
    (tmp_path / "mine.private").mkdir()
    (tmp_path / "mine.private" / "statement.csv").write_text("mine")
    (tmp_path / "linked.private").symlink_to(tmp_path / "mine.private")
    for place in ("mine", "linked", "x.private", "y" * 300):
        with pytest.raises(UserError):
            prepare(recipe, tmp_path / place)
    with pytest.raises(UserError, match="to be shared"):
        prepare(recipe, whole / "second")
    assert (tmp_path / "mine.private" / "statement.csv").read_text() == "mine"


def test_a_folder_that_appears_at_the_place_is_noticed_before_training_goes_on(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare(recipe, tmp_path / "run")


def test_a_run_without_privacy_stopped_while_it_closes_is_finished(recipe, tmp_path, monkeypatch):
    public = changed(changed(recipe, "privacy", noise_multiplier=None, no_privacy=True), "data", declared_public=True)
    stop_at(monkeypatch, folder_module, "fsync", 1)
    with pytest.raises(Stopped):
        train(public, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(FinishedRun):
        prepare(public, tmp_path / "run")


def test_a_run_that_lost_its_staged_files_is_not_taken_for_published(recipe, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "run.private" / "shareable")
    (tmp_path / "run").mkdir()
    (tmp_path / "run.private" / "state.json").unlink()
    assert released(train(recipe, tmp_path / "run", key=KEY).folder) == released(whole)


def test_two_processes_cannot_be_at_one_run(recipe, tmp_path, monkeypatch):
    prepared, late = prepare(recipe, tmp_path / "run"), prepare(recipe, tmp_path / "run")
    with prepared.run.locked(), pytest.raises(RunError, match="another process is training"):
        run(late)
    run(prepared)
    with pytest.raises(RunError, match="another process has been"):
        run(late)


def test_the_key_of_a_published_run_is_deleted_by_the_next_command(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run", RunFolder, "close", 1)
    assert (tmp_path / "run" / "privacy.json").is_file() and (tmp_path / "run.private" / "key").is_file()
    shutil.copytree(tmp_path, tmp_path / "copy", symlinks=True)
    with pytest.raises(FinishedRun):
        prepare(recipe, tmp_path / "run")
    assert not (tmp_path / "run.private" / "key").exists()
    delete_left_over_key(tmp_path / "copy" / "run")
    assert not (tmp_path / "copy" / "run.private" / "key").exists()
    assert (tmp_path / "copy" / "run.private" / "finished").is_file()


def test_the_order_at_the_end_is_checked_export_then_rename_then_no_key(recipe, tmp_path, monkeypatch):
    events = []
    for module, name in ((training, "export"), (RunFolder, "publish"), (RunFolder, "close")):
        original = getattr(module, name)

        def spy(*arguments, original=original, name=name, **named):
            events.append((f"{name} begins", (tmp_path / "run").exists(), (tmp_path / "run.private/key").exists()))
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, spy)
    train(recipe, tmp_path / "run")
    assert events == [
        ("export begins", False, True),
        ("publish begins", False, True),
        ("close begins", True, True),
    ]
    assert not (tmp_path / "run.private" / "key").exists()


def test_a_key_that_was_given_is_recorded_and_verify_refuses_it(recipe, whole):
    assert json.loads((whole / "privacy.json").read_text())["key_source"] == "given"
    report = verify(whole)
    assert not report.ok and [name for name, ok, _ in report.levels if not ok] == ["key"]


def test_a_resumed_run_remembers_that_its_key_was_given(recipe, tmp_path, monkeypatch):
    interrupt(monkeypatch, recipe, tmp_path / "run")
    with pytest.raises(UserError, match="another key"):
        train(recipe, tmp_path / "run", key=bytes(16))
    assert train(recipe, tmp_path / "run").certificate["key_source"] == "given"


def test_seeds_do_not_reach_the_key_or_the_noise(recipe, tmp_path, monkeypatch):
    keys, sums = [], noisy_sums(monkeypatch)
    original = attempt.new_key
    monkeypatch.setattr(attempt, "new_key", lambda: keys.append(original()) or keys[-1])
    for name in ("a", "b"):
        train(recipe, tmp_path / name)
    assert len(set(keys)) == 2
    first, second = (torch.cat([value.flatten() for value in noisy.values()]) for noisy in (sums[0], sums[6]))
    assert not torch.equal(first, second)
