import json
import os
import re
import shutil
import zlib

import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi, constants
from PIL import Image, PngImagePlugin

from dp_peft_diffusion.cli.hub import pull as pull_command
from dp_peft_diffusion.cli.hub import push as push_command
from dp_peft_diffusion.cli.program import Program
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.certificate_form import check_form
from dp_peft_diffusion.sharing import hub as hubs
from dp_peft_diffusion.sharing.hub import fetch, local_folder, pull, push
from tests.privacy.strangers import certify, write_adapter
from tests.privacy.test_hostile_folders import HOSTILE
from tests.sharing.stand_in_hub import StandInHub, speak_to

REPO = "somebody/digits-eps1"
SECRET = b"zanzibar"  # stands in every file of the private folder, and in none that is to be sent
METRICS = '{"step": %d, "learning_rate": 0.001, "update_norm": 0.5, "epsilon": null}\n'
main = Program(commands=[push_command, pull_command])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, which huggingface_hub takes for the real one."""
    stand_in = StandInHub()
    with stand_in.running():
        speak_to(monkeypatch, stand_in.url, tmp_path / "cache")
        yield stand_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The two folders of a run, made without torch."""
    folder = write_adapter(tmp_path_factory.mktemp("runs") / "digits-eps1")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# digits\n")
    (folder / "report.html").write_text("<p>digits</p>")
    (folder / "metrics.jsonl").write_text(METRICS % 1)
    (folder / "samples").mkdir()
    for step in (0, 200):
        Image.new("L", (8, 8), step).save(folder / "samples" / f"step-{step:04d}.png")
    certify(folder)
    private = folder.with_name("digits-eps1.private")
    private.mkdir()
    for name in ("ledger.jsonl", "recipe.yaml", "problems.csv", "metrics.jsonl"):
        (private / name).write_bytes(SECRET)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that a test may spoil, the private folder beside it."""
    shutil.copytree(finished.with_name("digits-eps1.private"), tmp_path / "runs/digits-eps1.private")
    return shutil.copytree(finished, tmp_path / "runs/digits-eps1")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_what_is_pushed_is_pulled_byte_for_byte_in_one_commit(hub, folder, tmp_path):
    sent = run("push", folder, REPO)
    assert sent.exit_code == 0, sent.output
    sha, files = hub.files(REPO)
    assert f"{hub.url}/{REPO}/commit/{sha}" in sent.output
    assert len(hub.repos[REPO]["commits"]) == 2, "the first is the Hub's own"
    got = run("pull", REPO, "--output_dir", tmp_path / "got")
    assert got.exit_code == 0, got.output
    assert contents(tmp_path / "got") == contents(folder) and verify(tmp_path / "got").ok
    assert sha in got.output and "epsilon 1," in got.output
    assert {name for name in files if name != ".gitattributes"} == set(contents(folder))
    assert not any(path.is_symlink() for path in (tmp_path / "got").rglob("*"))


def test_nothing_of_the_private_folder_is_in_any_request(hub, folder):
    push(folder, REPO)
    assert any(b"adapter_config.json" in body for _, _, body in hub.requests)
    assert not any(SECRET in body or b".private" in body for _, _, body in hub.requests)


def test_a_dry_run_lists_every_file_with_its_size_and_asks_nobody(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = run("push", folder, REPO, "--dry_run")
    assert result.exit_code == 0 and hub.requests == [] and hub.repos == {}
    for name, content in contents(folder).items():
        assert f"{len(content):,} bytes  {name}\n" in result.output
    assert result.output.count(" bytes  ") == len(contents(folder)) and "Nothing was." in result.output


def spoil(folder, how):
    match how:
        case "other file":
            (folder / "losses.csv").write_bytes(SECRET)
        case "hidden file":
            (folder / ".DS_Store").write_bytes(SECRET)
        case "pickle":
            (folder / "adapter_model.bin").write_bytes(SECRET)
        case "private folder inside":
            shutil.copytree(folder.with_name("digits-eps1.private"), folder / "digits-eps1.private")
        case "other file under samples":
            (folder / "samples" / "step-0001.jpg").write_bytes(SECRET)
        case "linked folder":
            (folder / "more").symlink_to(folder.with_name("digits-eps1.private"))
        case "link":
            (folder / "samples" / "step-0001.png").symlink_to(folder.with_name("digits-eps1.private") / "problems.csv")
        case "pipe":
            os.mkfifo(folder / "samples" / "step-0001.png")
        case "signature":
            (folder / "model.sig").write_bytes(SECRET)
        case "text in a picture":
            info = PngImagePlugin.PngInfo()
            info.add_text("prompt", SECRET.decode())
            Image.new("L", (8, 8)).save(folder / "samples" / "step-0001.png", pnginfo=info)
        case "more after a picture":
            with (folder / "samples" / "step-0200.png").open("ab") as file:
                file.write(SECRET)
        case "unknown part of a picture":
            path = folder / "samples" / "step-0200.png"
            part = b"zzZz" + SECRET
            part = len(SECRET).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
            path.write_bytes(path.read_bytes()[:33] + part + path.read_bytes()[33:])
        case "no picture":
            (folder / "samples" / "step-0001.png").write_bytes(SECRET)
        case "half a picture":
            path = folder / "samples" / "step-0200.png"
            path.write_bytes(path.read_bytes()[:-2])
        case "another metric":
            (folder / "metrics.jsonl").write_text(METRICS % 1 + '{"step": 2, "loss": 0.25}\n')
        case "text for a metric":
            (folder / "metrics.jsonl").write_text((METRICS % 1).replace("0.5", '"zanzibar"'))
        case "no metrics":
            (folder / "metrics.jsonl").write_bytes(SECRET)
        case "recipe of the private folder":
            shutil.copy(folder.with_name("digits-eps1.private") / "recipe.yaml", folder)
        case "no promise":
            (folder / "privacy.json").unlink()
        case "weights":
            path = folder / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\0")


REFUSALS = {
    "other file": "losses.csv",
    "hidden file": ".DS_Store",
    "pickle": "adapter_model.bin",
    "private folder inside": "digits-eps1.private/",
    "other file under samples": "step-0001.jpg",
    "linked folder": "link to a folder",
    "link": "links, which may lead anywhere: 'samples/step-0001.png'",
    "pipe": "no regular files: 'samples/step-0001.png'",
    "signature": "model.sig",
    "text in a picture": "'samples/step-0001.png' is not the plain PNG",
    "more after a picture": "'samples/step-0200.png' is not the plain PNG",
    "unknown part of a picture": "'samples/step-0200.png' is not the plain PNG",
    "no picture": "'samples/step-0001.png' is not the plain PNG",
    "half a picture": "'samples/step-0200.png' is not the plain PNG",
    "another metric": "line 2 of metrics.jsonl",
    "text for a metric": "line 1 of metrics.jsonl",
    "no metrics": "line 1 of metrics.jsonl",
    "recipe of the private folder": "recipe.yaml is not the file that was certified",
    "no promise": "trained without privacy",
    "weights": "adapter_model.safetensors is not the file that was certified",
}


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_not_a_shareable_folder_is_refused_before_anything_is_sent(hub, folder, how, dry_run):
    spoil(folder, how)
    with pytest.raises(PrivacyError) as refusal:
        push(folder, REPO, dry_run=dry_run)
    assert REFUSALS[how] in str(refusal.value) and hub.requests == []


def test_the_private_folder_itself_is_refused_by_any_name(hub, folder, tmp_path):
    (tmp_path / "harmless").symlink_to(folder.with_name("digits-eps1.private"))
    for place in (folder.with_name("digits-eps1.private"), tmp_path / "harmless"):
        result = run("push", place, REPO)
        assert result.exit_code == 3 and "private folder of a run" in result.output and hub.requests == []


def test_a_left_over_key_is_gone_before_the_weights_are_sent(hub, folder):
    private = folder.with_name("digits-eps1.private")
    (private / "key").write_bytes(bytes(16))
    (private / "finished").write_bytes(b"")
    assert run("push", folder, REPO).exit_code == 0
    assert not (private / "key").exists()


def test_a_second_push_replaces_the_first_and_deletes_what_is_gone(hub, folder):
    push(folder, REPO)
    (folder / "samples" / "step-0000.png").unlink()
    (folder / "metrics.jsonl").write_text(METRICS % 2)
    push(folder, REPO)
    _, files = hub.files(REPO)
    assert {name: files[name] for name in files if name != ".gitattributes"} == contents(folder)
    assert len(hub.repos[REPO]["commits"]) == 3


def test_a_repository_of_something_else_is_left_alone(hub, folder):
    hub.create(REPO, **{"model.ckpt": b"weights"})
    with pytest.raises(UserError, match="holds other things: 'model.ckpt'"):
        push(folder, REPO)
    assert len(hub.repos[REPO]["commits"]) == 1


def test_files_of_the_names_of_ours_that_are_not_ours_are_left_alone(hub, folder):
    hub.create(REPO, **{"adapter_config.json": b"{}", "adapter_model.safetensors": b"somebody's", "README.md": b"#"})
    with pytest.raises(
        UserError, match="holds other things: 'adapter_config.json' and 2 more.*Only what has a promise"
    ):
        push(folder, REPO)
    assert len(hub.repos[REPO]["commits"]) == 1


def test_what_somebody_commits_after_it_was_looked_at_is_not_overwritten(hub, folder, monkeypatch):
    push(folder, REPO)
    look = HfApi.model_info

    def then_change(api, repo, **options):
        seen = look(api, repo, **options)
        hub.commit(REPO, {"README.md": b"new"})
        return seen

    monkeypatch.setattr(HfApi, "model_info", then_change)
    with pytest.raises(RunError, match="412"):
        push(folder, REPO)
    assert hub.files(REPO)[1] == {"README.md": b"new"}


def test_private_makes_a_private_repository_and_is_not_dropped_where_a_public_one_is(hub, folder):
    push(folder, REPO, private=True)
    assert hub.repos[REPO]["private"]
    push(folder, REPO)
    hub.create("somebody/open")
    with pytest.raises(UserError, match="is public"):
        push(folder, "somebody/open", private=True)
    assert len(hub.repos["somebody/open"]["commits"]) == 1


def test_without_a_token_the_error_says_how_to_get_one(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = run("push", folder, REPO)
    assert result.exit_code == 2 and "hf auth login" in result.output and hub.requests == []


def test_the_command_that_gets_a_token_is_one_of_huggingface_hub():
    from huggingface_hub.cli.hf import app

    shown = CliRunner().invoke(app, ["auth", "login", "--help"])
    assert shown.exit_code == 0 and "--force" in shown.output


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(401, 2, "hf auth login"), (403, 2, "hf auth login --force"), (500, 1, "(500)"), (400, 1, "no such plan")],
)
def test_a_refusal_of_the_hub_is_one_line(hub, folder, status, code, said):
    hub.refused = (status, "no such plan")
    result = run("push", folder, REPO)
    assert result.exit_code == code and said in result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_hub_out_of_reach_is_one_line(hub, folder, monkeypatch, command):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of "discard", where nothing listens
    result = run("push", folder, REPO) if command == "push" else run("pull", REPO)
    assert result.exit_code == 1 and "could not be reached" in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


def test_no_pickle_and_no_code_is_fetched(hub, folder):
    push(folder, REPO)
    sha, files = hub.files(REPO)
    extra = ("adapter_model.bin", "handler.py", "samples/step-0001.png/evil.png", "samples/../../step-0001.png")
    newest = hub.commit(REPO, files | {name: b"cos\nsystem\n" for name in extra})
    fetched = local_folder(REPO)
    assert fetched.name == newest != sha
    assert contents(fetched) == contents(folder)
    assert not any("resolve" in path and path.endswith(extra) for _, path, _ in hub.requests)


def test_a_folder_that_is_there_is_taken_without_network(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert local_folder("runs/digits-eps1").resolve() == folder and local_folder(str(folder)) == folder
    assert hub.requests == []


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    hub.create("runs/digits-eps2", **contents(folder))
    with pytest.raises(UserError, match="dp-peft pull runs/digits-eps2"):
        local_folder("runs/digits-eps2")
    for name in ("nothing", "/no/such", "a/b/c", "./a", "a/..", "~/b"):
        with pytest.raises(UserError, match="is no folder"):
            local_folder(name)
    assert hub.requests == []


def test_a_revision_is_what_is_fetched_and_stays_for_when_there_is_no_network(hub, folder, monkeypatch):
    push(folder, REPO)
    first, files = hub.files(REPO)
    second = hub.commit(REPO, files | {"metrics.jsonl": b'{"step": 3}\n'})
    assert fetch(REPO, first).name == first and fetch(REPO).name == second
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPO).name == second and fetch(REPO, first).name == first and len(hub.requests) == asked
    with pytest.raises(RunError, match="cache does not have it"):
        fetch("somebody/else")


@pytest.mark.parametrize(
    ("files", "revision", "said"),
    [
        (None, None, "not on the Hub"),
        ({"model.safetensors": b""}, None, "holds no adapter"),
        ({"adapter_config.json": b"{}"}, "v2", "no revision 'v2'"),
    ],
)
def test_what_cannot_be_pulled_is_said_by_name(hub, files, revision, said):
    if files is not None:
        hub.create(REPO, **files)
    with pytest.raises(UserError, match=said):
        pull(REPO, revision=revision)


def test_a_repository_that_is_too_large_is_not_fetched(hub, folder, monkeypatch):
    hub.create(REPO, **contents(folder))
    monkeypatch.setattr(hubs, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="larger than"):
        pull(REPO)
    assert not any("resolve" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({f"samples/step-{step:05d}.png": b"" for step in range(2001)}, "more than 2,000"),
        ({"recipe.yaml": bytes((1 << 20) + 1)}, "'recipe.yaml' of 1,048,577 bytes"),
        ({"report.html": bytes((8 << 20) + 1)}, "'report.html' of 8,388,609 bytes"),
    ],
)
def test_too_many_files_and_one_that_is_too_large_are_neither_fetched_nor_sent(hub, folder, content, said):
    hub.create(REPO, **contents(folder) | content)
    with pytest.raises(UserError, match=said):
        pull(REPO)
    assert not any("resolve" in path for _, path, _ in hub.requests)
    for name, inside in content.items():
        (folder / name).write_bytes(inside)
    asked = len(hub.requests)
    with pytest.raises((UserError, PrivacyError), match=said):
        push(folder, REPO)
    assert len(hub.requests) == asked


def test_pictures_and_metrics_of_a_long_run_are_not_too_large(hub, folder):
    Image.effect_noise((1500, 1500), 90).save(folder / "samples" / "step-0200.png")
    (folder / "metrics.jsonl").write_text("".join(METRICS % step for step in range(1, 20_000)))
    assert all((folder / name).stat().st_size > 1 << 20 for name in ("samples/step-0200.png", "metrics.jsonl"))
    push(folder, REPO)
    assert contents(pull(REPO)) == contents(folder)


def test_what_changes_between_the_look_and_the_fetch_is_not_taken(hub, folder, monkeypatch):
    push(folder, REPO)
    download = hubs.snapshot_download

    def changed_first(repo, **options):
        hub.commit(REPO, hub.files(REPO)[1] | {"metrics.jsonl": b""})
        return download(repo, **options)

    monkeypatch.setattr(hubs, "snapshot_download", changed_first)
    with pytest.raises(RunError, match="changed while it was fetched"):
        pull(REPO)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "privacy.json"])
def test_what_does_not_keep_its_promise_is_not_put_anywhere(hub, folder, tmp_path, name):
    push(folder, REPO)
    _, files = hub.files(REPO)
    hub.commit(REPO, files | {name: files[name][:-2]})
    result = run("pull", REPO, "--output_dir", tmp_path / "got")
    assert result.exit_code == 3 and "does not keep what it claims" in result.output
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(
    "revision", ["../../../../etc/passwd", "/etc/passwd", "a/../b", "a//b", ".a", "", "a\n", "a" * 201]
)
def test_a_certificate_names_no_revision_that_leads_out_of_the_cache(folder, revision):
    document = json.loads((folder / "privacy.json").read_text())
    for value in ("c" * 40, "refs/pr/1", "v1.0-b_2", None):
        check_form(document | {"base": document["base"] | {"revision": value}})
    with pytest.raises(PrivacyError, match=r"privacy\.json at base"):
        check_form(document | {"base": document["base"] | {"revision": revision}})


@pytest.mark.parametrize("case", ["a pattern that hangs a matcher", "NaN", "tensors of another base"])
def test_what_is_certified_but_hostile_is_neither_sent_nor_put_anywhere(hub, folder, tmp_path, case):
    HOSTILE[case][0](folder)
    certify(folder)
    assert run("push", folder, REPO).exit_code == 3 and hub.requests == []
    hub.create(REPO, **contents(folder))
    refused = run("pull", REPO, "--output_dir", tmp_path / "got")
    assert refused.exit_code == 3 and re.search(HOSTILE[case][1], refused.output)
    assert not (tmp_path / "got").exists()


def test_a_folder_with_files_in_it_is_never_written_to(hub, folder):
    push(folder, REPO)
    before, asked = contents(folder), len(hub.requests)
    with pytest.raises(UserError, match="not empty"):
        pull(REPO, folder)
    assert contents(folder) == before and len(hub.requests) == asked
    with pytest.raises(UserError, match="README.md is a file"):
        pull(REPO, folder / "README.md")
    assert contents(folder) == before and len(hub.requests) == asked


@pytest.mark.parametrize("name", ["digits", "a/b/c", "../up", "a/b--c", "http://evil/x", "a b/c"])
def test_a_name_that_the_hub_cannot_have_is_refused(hub, folder, name):
    for command in (["push", folder, name], ["pull", name]):
        result = run(*command)
        assert result.exit_code == 2 and "owner/name" in result.output and hub.requests == []


def test_a_pulled_folder_in_the_cache_of_the_hub_is_of_links_and_verifies(hub, folder):
    push(folder, REPO)
    fetched = pull(REPO)
    assert os.path.islink(fetched / "adapter_config.json") and verify(fetched).ok
