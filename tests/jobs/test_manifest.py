"""Manifests are what Ray's and Kubernetes' schemas and the shell accept, hold the recipe, and no secret."""

import json
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from jobs.cli import posmlp
from jobs.errors import JobError
from jobs.recipe import Recipe, parse_recipe

SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
PLACES = ["--storage", "/mnt/s", "data.dir=/mnt/s/data", "run.dir=/mnt/s/runs/My run"]


def render(*words: str) -> str:
    done = CliRunner().invoke(posmlp, ["manifest", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def recipe_in(text: str) -> Recipe:
    return parse_recipe(yaml.safe_load(text), where="the manifest")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's own
@pytest.mark.parametrize("gpus", ["0", "4"])
@pytest.mark.parametrize(("kind", "hosts"), [("ray-up-onprem", ["--hosts", "10.0.0.1,10.0.0.2,10.0.0.3"]), ("ray-up-aws", [])])
def test_ray_accepts_what_ray_up_gets(kind: str, hosts: list[str], gpus: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = render(kind, "train", "weizmann", "--gpus", gpus, "--nodes", "3", *hosts, *PLACES)
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}  # by its path
    assert ("--gpus all" in config["docker"]["run_options"]) == (gpus != "0")
    assert ("NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in text) == (
        gpus != "0"
    )  # the driver's capability without which NVDEC cannot be used


def test_kubernetes_accepts_the_job_and_its_firewall() -> None:
    settings, job, policy = yaml.safe_load_all(render("kuberay", "run", "weizmann", "--nodes", "3", *PLACES))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA)
    name = job["metadata"]["name"]
    assert name == "posmlp-my-run"
    assert recipe_in(settings["data"]["recipe.yaml"]).run_dir == Path("/mnt/s/runs/My run")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"] for group in groups]
    assert sum(group.get("replicas", 1) for group in groups) == 3
    for pod in [*pods, job["spec"]["submitterPodTemplate"]]:
        environment = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == f"{name}-token"
    for pod in pods:
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]} == {"storage", "recipe", "shm"}
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    everything, dashboard = policy["spec"]["ingress"]
    assert everything == {"from": [{"podSelector": {"matchLabels": {"app": name}}}]}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_bash_accepts_the_slurm_script(tmp_path: Path, nodes: str) -> None:
    text = render("slurm", "train", "weizmann", "--nodes", nodes, "--gpus", "0", *PLACES)
    script = tmp_path / "job.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(script)], capture_output=True, text=True).stdout == ""
    recipe = text.partition("<<'POSMLP_RECIPE'\n")[2].partition("\nPOSMLP_RECIPE\n")[0]
    assert recipe_in(recipe).run_dir == Path("/mnt/s/runs/My run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ray-up-onprem", "train", "weizmann", *PLACES], "Which machines"),
        (["slurm", "train", "weizmann", *PLACES, "data.dir=/home/me/data"], r"data\.dir=/home/me/data is not on the shared storage /mnt/s"),
        (["slurm", "train", "weizmann", *PLACES, "data.mix=[{dir: s3://b/d}, {dir: /home/d}]"], r"data\.mix\[1\]\.dir=/home/d is not on"),
        (["kuberay", "train", "weizmann", *PLACES, "--image", "x: y\nkind: Pod"], "(?s)--image .*: expected letters"),
        (["ray-up-aws", "train", "weizmann", "--storage", "/mnt/$(id)", "run.dir=/mnt/$(id)/r"], "--storage .*: expected letters"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(JobError, match=said):
        CliRunner().invoke(posmlp, ["manifest", *words], catch_exceptions=False)
