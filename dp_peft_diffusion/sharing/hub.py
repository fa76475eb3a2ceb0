"""Shareable folders to the Hub and from it: only files of known names travel, whatever else lies beside them."""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dp_peft_diffusion.durable import fsync_tree, move_durably, partial_of
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy import certificate, ranges
from dp_peft_diffusion.privacy.certificate_form import ADAPTER_FILES, ALSO_HASHED, FILE_NAME, MODEL_FILES
from dp_peft_diffusion.privacy.strict_form import Rule, check_keys, number, or_none, whole
from dp_peft_diffusion.privacy.untrusted import byte_limit, file_names, parse_json

# All that is ever sent or fetched. What lies under the names that hold weights, `verify` has certified.
HASHED = {*ADAPTER_FILES, *MODEL_FILES, *ALSO_HASHED}
METRICS_FILE = "metrics.jsonl"
FILES = {*HASHED, FILE_NAME, METRICS_FILE}
SAMPLES = re.compile(r"samples/step-[0-9]{4,12}\.png")
PATTERNS = [*sorted(FILES), "samples/step-*.png"]  # the same, for fetching what the cache already holds
OF_THE_HUB = ".gitattributes"  # which the Hub itself puts into every repository
MAX_BYTES, MAX_FILES = 3 << 30, 2000  # of a folder
MAX_RECORD_BYTES = 256 << 20  # of a grid or of metrics.jsonl, which grow with the run
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
METRICS: dict[str, Rule] = {
    "step": whole(1, ranges.MAX_STEPS),
    "learning_rate": number(0, 1e12),
    "update_norm": number(0, 1e12),
    "epsilon": or_none(number(0, 1e12)),
}


@dataclasses.dataclass(frozen=True)
class Push:
    """What was sent, or would be.

    Attributes:
        files: name -> size in bytes.
        url: of the commit; None of a dry run.
    """

    files: dict[str, int]
    url: str | None


def push(folder: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Send a shareable folder to a model repository `owner/name`, in one commit; make the repository if need be.

    The folder must verify. Files of an earlier push that it no longer has are deleted there.

    private: only you, or your organization, can read it. dry_run: check and list only; no network, no token.

    Raises:
        UserError: no folder, one that is too large, no token, no right to write, or a repository of other things.
        PrivacyError: the folder does not verify, or holds anything that no shareable folder holds.
        RunError: the Hub cannot be reached.
    """
    check_repo_id(repo)
    files = shareable_files(folder)
    if dry_run:
        return Push(files, None)
    with hub_faults(repo):
        token = get_token()
        if token is None:
            raise UserError("there is no token for the Hub on this machine. Type hf auth login, or set HF_TOKEN.")
        api = HfApi(token=token)
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise UserError(f"{repo} is there already and is public. Leave out --private, or give another name.")
        names = [file.rfilename for file in there.siblings or [] if file.rfilename != OF_THE_HUB]
        if others := [name for name in names if FILE_NAME not in names or not may_be_shared(name)]:
            raise UserError(
                f"{repo} holds other things: {listed(others)}. Only what has a promise is replaced. Give another name."
            )
        stale = [name for name in names if name not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationDelete(path_in_repo=name) for name in stale]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
        commit = api.create_commit(repo, operations, commit_message="Upload by dp-peft push", parent_commit=there.sha)
    return Push(files, str(commit.commit_url))


def shareable_files(folder: Path) -> dict[str, int]:
    """Every file of a shareable folder that verifies, and its size in bytes.

    Raises:
        UserError: it is no folder, or too large.
        PrivacyError: it does not verify, or holds a link, or what no shareable folder holds.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that `dp-peft train` wrote.")
    if folder.resolve().name.endswith(".private"):
        raise PrivacyError(f"{folder} is the private folder of a run. It must not leave this machine.")
    names = file_names(folder)
    if others := [name for name in names if not may_be_shared(name)]:
        raise PrivacyError(
            f"{folder} holds what no shareable folder holds: {listed(others)}. Nothing was sent. Move it elsewhere."
        )
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise PrivacyError(f"{folder} holds links, which may lead anywhere: {listed(links)}. Put the files there.")
    if irregular := [name for name in names if not (folder / name).is_file()]:
        raise PrivacyError(f"{folder} holds what are no regular files: {listed(irregular)}. Move them elsewhere.")
    if FILE_NAME not in names:
        raise PrivacyError(
            f"{folder} has no {FILE_NAME}: it was trained without privacy, or is not finished. Only folders with a "
            "promise are sent. Type dp-peft train --help."
        )
    sizes = {name: (folder / name).stat().st_size for name in names}
    check_sizes(str(folder), sizes)
    if texts := [name for name in names if SAMPLES.fullmatch(name) and not is_plain_png(folder / name)]:
        raise PrivacyError(
            f"in {folder}, {listed(texts)} is not the plain PNG that training writes, and may hold more than its "
            "pixels. Nothing was sent. Move it elsewhere."
        )
    if METRICS_FILE in names:
        check_metrics(folder / METRICS_FILE)
    check_promise(folder)
    return sizes


def check_sizes(where: str, sizes: dict[str, int]) -> None:
    """Files of known names are not too many, and none of them is too large.

    Raises:
        UserError: they are.
    """
    if len(sizes) > MAX_FILES:
        raise UserError(f"{where} holds more than {MAX_FILES:,} files. Grids of samples may be left out.")
    for name, size in sizes.items():
        limit = byte_limit(Path(name)) if name in {*HASHED, FILE_NAME} else MAX_RECORD_BYTES
        if size > limit:
            raise UserError(f"{where} holds {name!r} of {size:,} bytes; at most {limit:,} are sent or fetched.")
    if sum(sizes.values()) > MAX_BYTES:
        raise UserError(f"{where} is larger than {MAX_BYTES >> 30} GiB, which is neither sent nor fetched.")


def is_plain_png(path: Path) -> bool:
    """Whether a file is a PNG of nothing but pixels: no text, no part of unknown use, nothing after its end."""
    parts = []
    with path.open("rb") as file:
        if file.read(8) != PNG_BEGINS:
            return False
        while head := file.read(8):
            parts.append((head[4:], int.from_bytes(head[:4], "big")))
            file.seek(parts[-1][1] + 4, os.SEEK_CUR)  # its content, and four bytes of checksum
        ends = file.tell() == path.stat().st_size
    inner = {kind for kind, _ in parts[1:-1]}
    return ends and parts[:1] == [(b"IHDR", 13)] and inner == {b"IDAT"} and parts[-1] == (b"IEND", 0)


def check_metrics(path: Path) -> None:
    """Every line holds the figures that training writes, and nothing else.

    Raises:
        PrivacyError: one does not; the message says which.
    """
    for index, line in enumerate(path.read_bytes().splitlines(), 1):
        name = f"line {index} of {path.name}"
        check_keys(parse_json(line, name), METRICS, set(METRICS), name)


def may_be_shared(name: str) -> bool:
    """Whether a shareable folder may hold a file of this name, relative to it."""
    return name in FILES or SAMPLES.fullmatch(name) is not None


def check_promise(folder: Path) -> None:
    """The folder verifies.

    Raises:
        PrivacyError: it does not; the message says the first thing that is wrong.
    """
    for name, ok, text in certificate.verify(folder).levels:
        if not ok:
            raise PrivacyError(f"{folder} does not keep what it claims ({name}): {text}")


def local_folder(name: str, revision: str | None = None) -> Path:
    """Where a shareable folder lies: `name` itself if there is such a folder, else fetched from the Hub.

    What comes from the Hub is a stranger's: it has not been checked yet.

    Raises:
        UserError: there is no such folder, and no such repository.
        RunError: the Hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_repo_id(name):
        raise UserError(f"{name!r} is no folder, and no name on the Hub (owner/name). Check the spelling.")
    if folder.parent.is_dir():  # a slip of the keys must not fetch what somebody put under that name
        raise UserError(
            f"{folder.parent} holds no folder {folder.name!r}. Should it come from the Hub? Type dp-peft pull {name}"
        )
    return fetch(name, revision)


def pull(repo: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """Fetch a shareable folder from the Hub and verify it.

    folder: where to put it; None leaves it in the cache of huggingface_hub.

    Raises:
        UserError: no such repository, or `folder` is a file or not empty.
        PrivacyError: it does not verify.
        RunError: the Hub cannot be reached.
    """
    check_target(folder)
    return put(fetch(repo, revision), folder)


def fetch(repo: str, revision: str | None = None) -> Path:
    """A repository's files of known names, in the cache of huggingface_hub: a folder named by its commit, unchecked.

    Nothing else is fetched, pickles least of all.

    Raises:
        UserError: no such repository or revision, no adapter in it, or one that is too large.
        RunError: the Hub cannot be reached, and the cache does not have it.
    """
    check_repo_id(repo)
    with hub_faults(repo, revision):
        try:
            there = HfApi().model_info(repo, revision=revision, files_metadata=True)
        except OfflineModeIsEnabled:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
        sizes = {file.rfilename: file.size or 0 for file in there.siblings or []}
        wanted = {name: size for name, size in sizes.items() if may_be_shared(name)}
        if not {ADAPTER_FILES[0], MODEL_FILES[0]} & set(wanted):
            raise UserError(f"{repo} holds no adapter that dp-peft made: there is no {ADAPTER_FILES[0]}.")
        check_sizes(repo, wanted)
        # Not by the commit: the cache would not remember which one `revision` was, for when there is no network.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
        if folder.name != there.sha:
            raise RunError(f"{repo} changed while it was fetched. Type the same command again.")
    return folder


def put(snapshot: Path, folder: Path | None) -> Path:
    """Verify what was fetched, and copy its files of known names into a new folder, if one is given.

    Raises:
        UserError: `folder` is not empty.
        PrivacyError: what was fetched does not verify.
    """
    check_promise(snapshot)
    if folder is None:
        return snapshot
    check_target(folder)
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    for name in filter(may_be_shared, file_names(snapshot)):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / name, partial / name)
    fsync_tree(partial)
    move_durably(partial, folder)
    return folder


def check_target(folder: Path | None) -> None:
    """A folder that is to be written is not there yet, or empty.

    Raises:
        UserError: it is neither.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is {'not empty' if folder.is_dir() else 'a file'}. Choose another.")


def is_repo_id(name: str) -> bool:
    """Whether a repository of the Hub may have this name, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repo_id(repo: str) -> None:
    """It may be the name of a repository on the Hub.

    Raises:
        UserError: it may not.
    """
    if not is_repo_id(repo):
        raise UserError(f"{repo!r} is no name of a repository on the Hub. Give owner/name.")


def listed(names: Iterable[str]) -> str:
    """The first of them, as text that cannot steer a terminal."""
    first, *others = list(names)
    return ascii(first[:80]) + (f" and {len(others)} more" if others else "")


@contextlib.contextmanager
def hub_faults(repo: str, revision: str | None = None) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes one sentence."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r} on the Hub. Give a branch, a tag or a commit.") from error
    except RepositoryNotFoundError as error:  # the Hub does not tell which of these it is
        raise UserError(
            f"{repo} is not on the Hub, or your token may not see it. Check the name, or type hf auth login."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"the Hub does not let your token do this with {repo} ({status}). Type hf auth login --force with a "
                "token that may write there, or give a name under which you may."
            ) from error
        said = one_line(error.server_message or str(error))
        raise RunError(f"the Hub refused {repo} ({status}): {said}. Type the same command later.") from error
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{repo} could not be fetched, and the cache does not have it: {one_line(str(error))} Check the network."
        ) from error
    except OfflineModeIsEnabled as error:
        raise RunError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it.") from error
    except HTTPError as error:
        raise RunError(
            f"the Hub at {constants.ENDPOINT} could not be reached: {one_line(str(error))}. Check the network, then "
            "type the same command; HF_HUB_OFFLINE=1 before it takes what was fetched before."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: how it refuses a card; RuntimeError: hf_xet
        raise RunError(f"huggingface_hub failed on {repo}: {one_line(str(error))}.") from error


def one_line(text: str) -> str:
    """A message of somebody else's, on one line."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:300].rstrip(".")
