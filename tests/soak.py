"""make soak: seeded kills for a budget of minutes, continued where the last call stopped; writes docs/soak.md.

Each round kills some local trainings, some under Ray, a build, and many loaders; each is compared with an uninterrupted one. The first
difference ends the soak with its seed, which repeats the same plan of kills.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from jobs.bench_train import synthetic_dataset
from jobs.run_folder import environment, write_text
from tests.jobs import soak_build, soak_train
from tests.pipeline import soak_loader, soak_peers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / ".soak" / "results.jsonl"
LOADER_RESULTS = ROOT / ".soak" / "loader.jsonl"
PAGE = ROOT / "docs" / "soak.md"
HEADER = "| kind | seed | kills | micro-batches run again | seconds |"
KILLS = {"local": 8, "ray": 2, "build": 2}  # in a round
LOADER_SEEDS, LOADER_KILLS = 10, 2  # in a round: eight dropped loaders each; processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-min", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    end = time.monotonic() + options.budget_min * 60
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="posmlp-soak-") as name:
        folder = Path(name)
        synthetic_dataset(folder)
        reference = soak_train.Run(folder / "reference", folder / "dataset")
        reference.finish()
        soak_loader.damaged_copy(folder / "dataset", folder / "damaged")
        while time.monotonic() < end:
            _round(folder, reference, len(_results()) * 1000 + options.seed)
            _loader_round(folder, len(_results(LOADER_RESULTS)) + options.seed)
            write_text(PAGE, page())


def _round(folder: Path, reference: soak_train.Run, seed: int) -> None:
    for launcher, kills in KILLS.items():
        work = folder / f"{launcher}-{seed}"
        if launcher == "build":
            _keep("build", soak_build.soak(folder / "videos", kills=kills, seed=seed))
        else:
            more = [f"launch.launcher={launcher}", "launch.cpus_per_worker=1"]
            _keep(f"training, {launcher}", soak_train.soak(work, reference, folder / "dataset", kills, seed, *more))
            shutil.rmtree(work)


def _loader_round(folder: Path, seed: int) -> None:
    seeds = range(seed, seed + LOADER_SEEDS)
    with LOADER_RESULTS.open("a", encoding="utf-8") as file:
        for entry in soak_loader.soak(folder / "damaged", folder, seeds=seeds, kills=LOADER_KILLS):
            file.write(json.dumps(entry) + "\n")


def _keep(kind: str, entries: list[dict[str, object]]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps({"kind": kind, "date": time.strftime("%Y-%m-%d"), **entry}) + "\n")


def _results(file: Path = RESULTS) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def page() -> str:
    """docs/soak.md from all results so far."""
    machine = environment()
    lines = [
        "# Soak: what was killed, and what it changed",
        "",
        "Written by `make soak`. Every row is one build or training that was killed with SIGKILL at seeded moments, started again with",
        "the same command, and compared with an uninterrupted one: shards and index byte by byte; every position, key, label, frame,",
        "crop and tensor digest that any rank recorded; final weights and moments bit by bit; no process left over.",
        "A difference would have stopped it.",
        "",
        f"{machine['cores']} cores, {machine['cpu']}, Python {machine['python']}.",
        "",
        HEADER,
        "|---|---|---|---|---|",
    ]
    total: dict[str, int] = {}
    for entry in _results():
        kills = entry["kills"]
        assert isinstance(kills, list)
        total[str(entry["kind"])] = total.get(str(entry["kind"]), 0) + len(soak_train.done(kills))
        lines.append(
            f"| {entry['kind']} | {entry['seed']} | {'; '.join(map(str, kills))} | {entry.get('repeated', '')} | {entry['seconds']} |"
        )
    summary = ", ".join(f"{count} in {kind}" for kind, count in total.items())
    lines.insert(lines.index(HEADER), f"**{sum(total.values())} kills** ({summary}): 0 differences.\n")
    peers = soak_peers.PEERS.read_text(encoding="utf-8") if soak_peers.PEERS.is_file() else ""
    return "\n".join([*lines, *soak_loader.section(_results(LOADER_RESULTS))]) + "\n" + peers


if __name__ == "__main__":
    main()
