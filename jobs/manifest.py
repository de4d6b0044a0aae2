"""posmlp manifest: what starts a cluster for a recipe, rendered from the templates in `cluster/manifests/`. Secrets are referenced only."""

import re
import shlex
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
import yaml

from jobs.errors import JobError
from jobs.recipe import Recipe
from jobs.run_folder import libraries
from pipeline.location import Location

TEMPLATES = {
    "ray-up-onprem": "ray-up-onprem.yaml.j2",
    "ray-up-aws": "ray-up-aws.yaml.j2",
    "kuberay": "kuberay.yaml.j2",
    "slurm": "slurm.sh.j2",
}
PLAIN = re.compile(r"[A-Za-z0-9_./:@-]+")  # what may stand in a manifest without quotes
HEREDOC_END = "POSMLP_RECIPE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the cluster is made of. Of each node: cpus, gpus, memory_gib, and shared memory of an eighth of that.

    hosts: addresses of existing machines, the first is the head. user: who may log in there. storage: where shared storage is mounted on
    every node. source: what is mounted there, an NFS export (AWS) or a PersistentVolumeClaim (Kubernetes).
    """

    image: str = "posmlp-video:latest"
    nodes: int = 2
    gpus: int = 8
    cpus: int = 64
    memory_gib: int = 256
    hosts: tuple[str, ...] = field(default=())
    user: str = "ubuntu"
    region: str = "us-west-2"
    instance_type: str = "g6.12xlarge"
    storage: Path
    source: str = "posmlp-storage"


def run(kind: str, command: str, recipe: Recipe, machines: Machines) -> str:
    """The manifest as text. kind: of TEMPLATES; command: `train` or `run`.

    Raises JobError for names that a manifest cannot hold, and where the storage does not hold what the recipe reads and writes.
    """
    if kind == "ray-up-onprem" and len(machines.hosts) < 1:
        raise JobError("Which machines? Add --hosts HEAD,NODE,...: their addresses, the head's first.")
    _check(machines)
    _must_hold(machines.storage, recipe)
    name = re.sub(r"[^a-z0-9]+", "-", f"posmlp-{recipe.run_dir.name}".lower()).strip("-")[:40].strip("-")
    place = {"kuberay": "/etc/posmlp/recipe.yaml", "slurm": ""}.get(kind, "RECIPE")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - no HTML
    template = environment.from_string((resources.files("cluster") / "manifests" / TEMPLATES[kind]).read_text(encoding="utf-8"))
    text = template.render(
        name=name,
        command=f"posmlp {command} {place}".strip(),
        recipe=recipe.to_yaml().rstrip("\n"),
        image=machines.image,
        nodes=machines.nodes,
        gpus=machines.gpus,
        cpus=machines.cpus,
        memory_gib=machines.memory_gib,
        shm_gib=max(1, machines.memory_gib // 8),
        head=machines.hosts[0] if machines.hosts else "",
        workers=list(machines.hosts[1:]),
        user=machines.user,
        region=machines.region,
        instance_type=machines.instance_type,
        storage=str(machines.storage),
        source=machines.source,
        ray_version=libraries()["ray"],
    )
    if kind == "slurm":
        assert text.splitlines().count(HEREDOC_END) == 1
    else:
        list(yaml.safe_load_all(text))  # it is YAML, whatever was put in
    return text


def _check(machines: Machines) -> None:
    """Names go into YAML, shell and Docker's options: only plain ones do."""
    given = {"--image": machines.image, "--storage": str(machines.storage), "--source": machines.source, "--user": machines.user}
    given.update({"--region": machines.region, "--instance-type": machines.instance_type})
    for option, value in [*given.items(), *(("--hosts", host) for host in machines.hosts)]:
        if not PLAIN.fullmatch(value):
            raise JobError(f"{option} {shlex.quote(value)}: expected letters, digits and _ . / : @ - only.")


def _must_hold(storage: Path, recipe: Recipe) -> None:
    data = recipe.data
    paths: dict[str, Location | None] = {
        "run.dir": recipe.run_dir,
        "data.dir": data.dir,
        "data.videos": data.videos,
        "train.init_from": recipe.train.init_from,
    }
    paths.update({f"data.mix[{place}].dir": each.dir for place, each in enumerate(data.mix)})
    for key, path in {**paths, **data.label_files}.items():
        if isinstance(path, Path) and not path.is_relative_to(storage):  # URLs are seen from everywhere
            raise JobError(f"{key}={path} is not on the shared storage {storage}. Put it there, or name the right one with --storage.")
