"""posmlp bench labels: what the labels of 300,000 videos cost the command that builds, in every format, in time and memory.

The files are empty and have the names that users' files have, in 400 class folders; each format is read in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.build_tasks import request_of
from pipeline.label_file import FORMATS
from pipeline.manifest import read_manifest
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.shards import deal

NUM_CLASSES = 400
Clip = tuple[int, str, str, str]  # number, class, name without extension, split
LINES: dict[str, tuple[str, Callable[[Clip], str]]] = {  # format -> header, a clip's line
    "csv": ("path,label,split\n", lambda clip: f"{clip[1]}/{clip[2]}.mp4,{clip[1]},{clip[3]}\n"),
    "tsv": ("path\tlabel\tsplit\n", lambda clip: f"{clip[1]}/{clip[2]}.mp4\t{clip[1]}\t{clip[3]}\n"),
    "jsonl": ("", lambda clip: json.dumps({"path": f"{clip[1]}/{clip[2]}.mp4", "label": clip[1], "split": clip[3]}) + "\n"),
    "kinetics": ("label,youtube_id,time_start,time_end,split\n", lambda clip: f"{clip[1]},{clip[2][:11]},10,20,{clip[3]}\n"),
    "something": ("", lambda clip: f"{clip[1]}/{clip[2]};Doing [something] number {clip[0] % NUM_CLASSES}\n"),
    "list": ("", lambda clip: f"{clip[1]}/{clip[2]} {clip[0] % NUM_CLASSES}\n"),
}


def clips(count: int) -> Iterator[Clip]:
    """`count` clips with names as downloaders give them."""
    for number in range(count):
        yield number, f"doing_thing_{number % NUM_CLASSES:03d}", f"id{number:09d}_000010_000020", "val" if number % 12 == 0 else "train"


def run(num_videos: int) -> list[dict[str, object]]:
    """One row of figures per format; see `measure` for their meaning."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(NUM_CLASSES):
            (folder / "videos" / f"doing_thing_{number:03d}").mkdir(parents=True)
        for _, label, stem, _ in clips(num_videos):
            os.close(os.open(folder / "videos" / label / f"{stem}.mp4", os.O_CREAT | os.O_WRONLY, 0o644))
        for kind, (header, line) in LINES.items():
            _write(folder / kind, num_videos, kind, header, line)
        for kind in ("folders", *LINES):
            words = [sys.executable, "-m", "jobs.bench_labels", str(folder), kind]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=dict(os.environ))
            rows.append(json.loads(done.stdout))
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)])


def _write(path: Path, count: int, kind: str, header: str, line: Callable[[Clip], str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        if kind == "something":  # as V2 has it: one JSON list
            pairs = (line(clip)[:-1].split(";") for clip in clips(count))
            entries = ({"id": name, "label": "doing a cup", "template": label, "placeholders": ["a cup"]} for name, label in pairs)
            file.write("[" + ",\n".join(map(json.dumps, entries)) + "]")
        else:
            file.write(header)
            file.writelines(map(line, clips(count)))


def measure(folder: Path, kind: str) -> dict[str, object]:
    """read s: labels and files become the list of items. plan s: from that to which item is in which shard. CPU seconds.

    MiB: resident at the most, beyond what the imports take.
    """
    before = _peak_mib()
    began = time.process_time()
    manifest = read_manifest(folder / "videos", None if kind == "folders" else folder / kind)
    read = time.process_time()
    request_of(manifest, encode=EncodeOptions(), limits=LimitOptions(), shard_size_mib=128, seed=0)
    deal(manifest.sources, ratio=1.0, shard_bytes=128 << 20, seed=0)
    facts = {"items": len(manifest.sources), "classes": len(manifest.classes)}
    times = {"read s": round(read - began, 2), "plan s": round(time.process_time() - read, 2)}
    return {"labels": FORMATS.get(kind, "class folders"), **facts, **times, "MiB": round(_peak_mib() - before)}


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")  # getrusage also counts who started us
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
