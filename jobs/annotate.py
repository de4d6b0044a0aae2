"""A copy of a video with what the model sees written into its frames."""

import tempfile
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

from jobs.loose_videos import transcode
from jobs.predictor import Predictor, VideoPrediction
from jobs.timeline import clock, owned
from pipeline.caption import caption
from pipeline.durable import commit, temporary_name
from pipeline.media_worker import MediaWorker

SHORT_SIDE = 720  # pixels of the copy's shorter side at most
LINES = 3  # classes shown


def write_annotated(predictor: Predictor, video: VideoPrediction, source: Path, destination: Path) -> None:
    """Writes `destination`, an MP4 without sound, whole or not at all. `video`: the prediction for `source`, without an error.

    Like every video the source is read in a limited child process; text goes into the upright copy that comes out of it.
    Raises JobError, PipelineError or OSError.
    """
    encode = replace(predictor.encode, short_side=SHORT_SIDE)
    begins = [begin for begin, _ in owned(video)]

    def lines_at(seconds: float) -> list[str]:
        place = bisect_right(begins, seconds) - 1
        top = video.windows[place].top if video.windows else video.top
        return [*(f"{score.score:.2f} {score.name}" for score in top[:LINES]), clock(seconds)]

    temporary = temporary_name(destination)
    try:
        with tempfile.TemporaryDirectory(prefix="posmlp-annotate-") as folder, MediaWorker(encode, predictor.recipe.data.limits) as worker:
            upright = Path(folder) / "upright.mp4"
            transcode(worker, source, upright)
            caption(upright, temporary, lines_at, encode)
        commit(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
