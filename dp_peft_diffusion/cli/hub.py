"""`dp-peft push` and `dp-peft pull`: shareable folders to the Hub and from it."""

from pathlib import Path

import click

from dp_peft_diffusion.cli.certificates import delete_left_over_key
from dp_peft_diffusion.cli.program import command_line, hint, printable


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Only you, or your organization, can see it.")
@click.option("--dry_run", is_flag=True, help="Check the folder and list what would be sent. Needs no network.")
def push(folder: Path, repo: str, private: bool, dry_run: bool) -> None:
    """Send a shareable folder to the Hub.

    REPO is owner/name. The folder must verify, and hold nothing but what training puts there. It goes as one commit.
    """
    from dp_peft_diffusion.privacy.certificate import read
    from dp_peft_diffusion.sharing import hub

    if folder.is_dir():
        delete_left_over_key(folder)
    sent = hub.push(folder, repo, private=private, dry_run=dry_run)
    for name, size in sent.files.items():
        click.echo(f"{size:>12,} bytes  {name}")
    total = f"{len(sent.files)} files, {sum(sent.files.values()):,} bytes"
    click.echo(f"{total} would be sent to {repo}. Nothing was." if sent.url is None else f"{total}: {sent.url}")
    base = read(folder)["base"]["name"]
    if base.startswith("./"):
        hint(f"Its base, {printable(base)}, lies on this machine. Others need it too: say where they find it.")
    if sent.url is not None:
        hint(f"Anybody who may see it can type: {command_line('sample', '--adapter', repo)}")


@click.command()
@click.argument("repo")
@click.option("--output_dir", type=click.Path(path_type=Path), help="Where to put it.  [the cache of huggingface_hub]")
@click.option("--revision", metavar="SHA", help="Commit, branch or tag.  [main]")
def pull(repo: str, output_dir: Path | None, revision: str | None) -> None:
    """Fetch a shareable folder from the Hub.

    REPO is owner/name. Nothing but files of known names is fetched, and they must verify. Prints the promise.
    """
    from dp_peft_diffusion.privacy.certificate import read
    from dp_peft_diffusion.sharing import hub

    hub.check_target(output_dir)
    snapshot = hub.fetch(repo, revision)
    folder = hub.put(snapshot, output_dir)
    click.echo(f"{folder}: {repo} at commit {snapshot.name}")
    click.echo(printable(read(folder)["statement"]))
    hint(f"What that rests on, and what no check can prove: {command_line('verify', folder)}")
