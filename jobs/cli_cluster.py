"""The part of the `posmlp` command that speaks to a running Ray cluster, and to what was submitted to it."""

import json
import sys
from pathlib import Path
from typing import Any

import click

ADDRESS = click.option("--address", metavar="URL", help="Of the cluster's dashboard, http://HEAD:8265.  [default: RAY_API_SERVER_ADDRESS]")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
RUN_OR_ID = click.argument("run", metavar="RUN|ID")


def add_to(posmlp: click.Group) -> None:
    """Adds the commands of this file to the group."""
    for command in (submit, jobs, logs, stop, status, manifest):
        posmlp.add_command(command)


@click.command(context_settings={"ignore_unknown_options": True})
@ADDRESS
@click.option("--no-wait", is_flag=True, help="Return when it is known that the job can work there, and not at its end.")
@click.option("--again", is_flag=True, help="Submit also what is finished there.")
@click.option("--patience", type=click.FloatRange(min=1), default=10.0, show_default=True, help="Seconds for a node's answer beforehand.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- train|eval|run|data build ...")
def submit(address: str | None, no_wait: bool, again: bool, patience: float, words: tuple[str, ...]) -> None:
    """Run a posmlp command on a Ray cluster, and follow it. Submitted twice it is one job; what failed or was stopped goes on.

    Paths are those of the cluster's nodes. Before it starts, each node says whether it can do its part. Exit code: the command's,
    or 78 when the cluster cannot do it.
    """
    from cluster.submit import Jobs, address_of
    from jobs import submit as verb

    sys.exit(verb.run(words, Jobs(address_of(address)), wait=not no_wait, again=again, timeout_s=patience))


@click.command()
@ADDRESS
@AS_JSON
def jobs(address: str | None, as_json: bool) -> None:
    """List what was submitted to a cluster, the newest first."""
    from cluster.submit import Jobs, address_of
    from jobs import submitted_jobs as verb

    cluster = Jobs(address_of(address))
    found = verb.listed(cluster)
    if as_json:
        click.echo(json.dumps([verb.plain(job) for job in found], indent=1, ensure_ascii=False))
    else:
        verb.show(found, cluster.address)


@click.command()
@RUN_OR_ID
@ADDRESS
@click.option("--follow", is_flag=True, help="Until the job is over, and then its exit code.")
def logs(run: str, address: str | None, follow: bool) -> None:
    """Print what a submitted job prints. RUN is the folder it fills, of which the newest job is meant."""
    from cluster.submit import Jobs, address_of
    from jobs import submitted_jobs as verb

    sys.exit(verb.logs(Jobs(address_of(address)), run, follow_it=follow))


@click.command()
@RUN_OR_ID
@ADDRESS
def stop(run: str, address: str | None) -> None:
    """Have a submitted job save and end, as SIGTERM does, and wait for it. Submit it again to go on."""
    from cluster.submit import Jobs, address_of
    from jobs import submitted_jobs as verb

    verb.stop(Jobs(address_of(address)), run)


@click.command()
@RUN_OR_ID
@ADDRESS
@AS_JSON
def status(run: str, address: str | None, as_json: bool) -> None:
    """Show how a run gets on: step, rate, time left, last checkpoint, data wait, restarts.

    Read from the run folder where it is visible here; else, and with --address, the job and its cluster are asked.
    """
    from jobs import status as view
    from jobs import submitted_jobs as verb

    facts = verb.status_of(run, address)
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        view.show(facts)


@click.command()
@click.argument("kind", type=click.Choice(["ray-up-onprem", "ray-up-aws", "kuberay", "slurm"]))
@click.argument("command", type=click.Choice(["train", "run"]))
@click.argument("recipe")
@click.option("--storage", type=click.Path(path_type=Path), required=True, help="Where shared storage is mounted on every node.")
@click.option("--source", default="posmlp-storage", show_default=True, help="What is mounted there: NFS export, PersistentVolumeClaim.")
@click.option("--image", default="posmlp-video:latest", show_default=True, help="Container image with this package and what it needs.")
@click.option("--nodes", type=click.IntRange(min=1), default=2, show_default=True, help="How many train, the head included.")
@click.option("--gpus", type=click.IntRange(min=0), default=8, show_default=True, help="GPUs of each; 0 trains on CPUs.")
@click.option("--cpus", type=click.IntRange(min=1), default=64, show_default=True, help="CPU cores of each.")
@click.option("--memory-gib", type=click.IntRange(min=1), default=256, show_default=True, help="Memory of each.")
@click.option("--hosts", default="", help="For ray-up-onprem: addresses, separated by commas, the head's first.")
@click.option("--user", default="ubuntu", show_default=True, help="For ray-up-onprem: who logs in there.")
@click.option("--region", default="us-west-2", show_default=True, help="For ray-up-aws.")
@click.option("--instance-type", default="g6.12xlarge", show_default=True, help="For ray-up-aws.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def manifest(kind: str, command: str, recipe: str, hosts: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Print what starts a cluster for 'posmlp COMMAND RECIPE': for 'ray up', the KubeRay operator, or Slurm.

    The token that protects it is referenced, never written. What the recipe reads and writes must be on the shared storage.
    """
    from jobs import manifest as verb
    from jobs.recipe import load_recipe

    machines = verb.Machines(hosts=tuple(filter(None, hosts.split(","))), **options)
    click.echo(verb.run(kind, command, load_recipe(recipe, overrides), machines), nl=False)
