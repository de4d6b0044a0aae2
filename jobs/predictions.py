"""What a model says of every video: from the logits of single views, in files, to one fused prediction each, exactly once.

A part is one micro-batch of views, one small file, whole or absent. Position p is view p mod V of video p div V, whichever rank judged it
and in whichever part it lies; merging refuses a view that is missing, foreign or there twice. Fusing sums with `math.fsum`, which is
exact before its one rounding: neither the order of views nor their spread over parts changes a bit.
"""

import base64
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from jobs.errors import JobError
from jobs.run_folder import write_text

TOP = 5  # classes kept per video
DIGITS = 6  # of a probability on disk
NOT_FINITE = "the model's output is not a finite number; the checkpoint may have diverged"

Fusion: TypeAlias = Literal["sum_logits", "mean_softmax"]
Logits: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ViewOutput:
    """One judged view. logits: (K,). failed: why there are none that count, else None."""

    position: int
    key: str
    label: int
    logits: Logits
    failed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One judged video. label: of the truth. failed: why it could not be judged, which counts as wrong; else None.

    top, scores: up to TOP classes and their probabilities, the likeliest first, of equal ones the lower class; empty where it failed.
    truth_log: natural logarithm of the truth's probability, NaN where it failed.
    """

    key: str
    label: int
    top: tuple[int, ...]
    scores: tuple[float, ...]
    truth_log: float
    failed: str | None = None

    @property
    def right(self) -> bool:
        return self.failed is None and self.top[0] == self.label

    def as_record(self) -> dict[str, object]:
        """Of `eval.json`."""
        facts: dict[str, object] = {"key": self.key, "label": self.label}
        if self.failed is not None:
            return {**facts, "failed": self.failed}
        scores = [round(score, DIGITS) for score in self.scores]
        return {**facts, "top": list(self.top), "scores": scores, "truth": round(math.exp(self.truth_log), DIGITS)}


def write_part(parts: Path, micro: int, outputs: Sequence[ViewOutput]) -> None:
    """Commits what micro-batch `micro` came to."""
    records = [
        {
            "position": output.position,
            "key": output.key,
            "label": output.label,
            "failed": output.failed,
            "logits": base64.b64encode(output.logits.astype("<f4").tobytes()).decode(),
        }
        for output in outputs
    ]
    write_text(parts / f"micro-{micro:08d}.json", json.dumps(records))


def finished_parts(parts: Path) -> dict[int, Path]:
    """Micro-batch number -> its file."""
    return {int(path.stem.removeprefix("micro-")): path for path in parts.glob("micro-*.json")}


def read_parts(parts: Path) -> Iterator[ViewOutput]:
    """Every judged view, part after part; only one part is in memory."""
    for _, path in sorted(finished_parts(parts).items()):
        for record in json.loads(path.read_text(encoding="utf-8")):
            logits = np.frombuffer(base64.b64decode(record.pop("logits")), dtype="<f4")
            yield ViewOutput(logits=logits, **record)


def merge(parts: Path, keys: Sequence[str], *, num_views: int, fusion: Fusion) -> list[Prediction]:
    """One prediction for each of `keys`, in their order, from all `num_views` views of each.

    Raises JobError naming a view that is missing, foreign or there twice.
    """
    seen: Counter[int] = Counter()
    foreign: list[str] = []
    waiting: defaultdict[int, list[ViewOutput]] = defaultdict(list)
    fused: dict[int, Prediction] = {}
    for output in read_parts(parts):
        video = output.position // num_views
        if not 0 <= video < len(keys) or keys[video] != output.key:
            foreign.append(output.key)
            continue
        seen[output.position] += 1
        waiting[video].append(output)
        if len(waiting[video]) == num_views:
            fused[video] = predict(waiting.pop(video), fusion)
    double = [position for position, count in seen.items() if count > 1]
    missing = [position for position in range(len(keys) * num_views) if position not in seen]
    if double or missing or foreign:
        named = [*foreign, *(f"{keys[position // num_views]} (view {position % num_views})" for position in [*double, *missing])]
        raise JobError(
            f"Evaluation is not exact: {len(missing)} views missing, {len(foreign)} foreign, {len(double)} double, first '{named[0]}'. "
            f"Remove {parts} and run 'posmlp eval' again."
        )
    return [fused[video] for video in range(len(keys))]


def predict(outputs: Sequence[ViewOutput], fusion: Fusion) -> Prediction:
    """The prediction for one video from all its views; a single failed view fails it."""
    first = outputs[0]
    failed = next((output.failed for output in outputs if output.failed is not None), None)
    if failed is None and not all(np.isfinite(output.logits).all() for output in outputs):
        failed = NOT_FINITE
    if failed is not None:
        return Prediction(key=first.key, label=first.label, top=(), scores=(), truth_log=math.nan, failed=failed)
    logs = fuse(np.stack([output.logits for output in outputs]), fusion)
    best = np.argsort(-logs, kind="stable")[:TOP]
    scores = tuple(np.exp(logs[best]).tolist())
    return Prediction(key=first.key, label=first.label, top=tuple(best.tolist()), scores=scores, truth_log=float(logs[first.label]))


def fuse(logits: Logits, fusion: Fusion) -> npt.NDArray[np.float64]:
    """Natural logarithms (K,) of a video's class probabilities from the logits (V, K) of its views, the same for any order of them.

    sum_logits: softmax of the views' mean logits, which ranks as their sum does without growing surer with every view.
    mean_softmax: the mean of the views' probabilities.
    """
    values = logits.astype(np.float64)
    num_views = len(values)
    if fusion == "sum_logits":
        return _log_softmax(_sum(values) / num_views)
    logs = np.stack([_log_softmax(row) for row in values])
    highest = logs.max(axis=0)  # kept out of the exponent, so that no probability becomes 0
    return np.asarray(highest + np.log(_sum(np.exp(logs - highest)) / num_views))


def _sum(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums over the rows (V, K) -> (K,), each rounded once."""
    return np.array([math.fsum(column) for column in values.T.tolist()])


def _log_softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = values - values.max()
    return np.asarray(shifted - math.log(math.fsum(np.exp(shifted).tolist())))


def records(predictions: Sequence[Prediction]) -> list[Mapping[str, object]]:
    """Of `eval.json`, one per video."""
    return [prediction.as_record() for prediction in predictions]
