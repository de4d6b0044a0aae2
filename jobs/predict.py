"""posmlp predict: the best classes of any video, for long ones over time; on request as a page and as an annotated copy."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from jobs.annotate import write_annotated
from jobs.errors import JobError
from jobs.predictor import VideoPrediction, load, predictions
from jobs.sliding import Sliding
from jobs.timeline import as_text, write_page


def run(
    run_dir: Path,
    videos: Sequence[Path],
    *,
    window: float | None = None,
    hop: float | None = None,
    timeline: Path | None = None,
    annotate: Path | None = None,
    quiet: bool = False,
) -> tuple[dict[str, object], int]:
    """Predicts each video and prints it unless `quiet`; returns plain values for JSON, and how many have an "error" instead.

    window, hop: of the timeline, in seconds, see `Sliding`. timeline: HTML file to write. annotate: MP4 file to write, of one video.
    Raises JobError, PipelineError, ClusterError or OSError with a text for the user where nothing can be predicted or written.
    """
    sliding = Sliding(window=window, hop=hop, always=timeline is not None or annotate is not None)
    _check_outputs(videos, timeline, annotate)
    predictor = load(run_dir)
    found: list[VideoPrediction] = []
    for video in predictions(predictor, videos, sliding):
        found.append(video)
        if video.error is not None:
            click.echo(f"error: {video.error}", err=True)
        elif not quiet:
            click.echo(as_text(video))
    if timeline is not None:
        write_page(timeline, found, f"{click.format_filename(run_dir.absolute().name)}, step {predictor.checkpoint.step}: over time")
    if annotate is not None and found[0].error is None:
        write_annotated(predictor, found[0], videos[0], annotate)
    result = {"run": click.format_filename(run_dir), "step": predictor.checkpoint.step, "videos": [asdict(video) for video in found]}
    return result, sum(video.error is not None for video in found)


def _check_outputs(videos: Sequence[Path], timeline: Path | None, annotate: Path | None) -> None:
    """Everything that can be known to be wrong with them before minutes of work. Raises JobError."""
    if annotate is not None and len(videos) != 1:
        raise JobError(f"--annotate: got {len(videos)} videos, expected one. Call it once per video.")
    for option, path in (("--timeline", timeline), ("--annotate", annotate)):
        if path is None:
            continue
        if not path.parent.is_dir() or path.is_dir():
            raise JobError(f"{option}: {path} is no file in a folder that exists. Make the folder first, and name a file in it.")
        if path.exists() and any(video.exists() and path.samefile(video) for video in videos):
            raise JobError(f"{option}: {path} is one of the videos and would be overwritten. Choose another name.")
