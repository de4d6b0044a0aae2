"""What reports use of an evaluation's file, checked when it is read, and what follows from it: intervals, mistakes, confused pairs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic

from jobs.errors import JobError

MAX_FILE_BYTES = 256 << 20  # 500,000 videos, or the confusion matrix of 8000 classes
MAX_PAIRS = 25
SCHEMA = 2
FUSIONS = {"sum_logits": "logits summed", "mean_softmax": "probabilities averaged"}


class ClassResult(pydantic.BaseModel):
    """One class: number of videos, share of them right, share right of those taken for it; None of no videos."""

    num: int
    recall: float | None = None
    precision: float | None = None


class Bin(pydantic.BaseModel):
    """Videos whose confidence is in [low, high): their number, mean confidence and share right."""

    low: float
    high: float
    num: int
    confidence: float | None = None
    accuracy: float | None = None


class Calibration(pydantic.BaseModel):
    """Expected calibration error, mean negative log-likelihood in nats, and the bins of the reliability diagram."""

    ece: float | None = None
    nll: float | None = None
    num: int = 0
    bins: list[Bin] = []


class Video(pydantic.BaseModel):
    """One judged video: its truth, best classes with probabilities, the truth's probability; or why it failed."""

    key: str
    label: pydantic.NonNegativeInt
    top: list[pydantic.NonNegativeInt] = []
    scores: list[float] = []
    truth: float = 0.0
    failed: str | None = None

    @property
    def right(self) -> bool:
        return bool(self.top) and self.top[0] == self.label

    @property
    def confidence(self) -> float:
        return self.scores[0] if self.scores else 0.0


class Baseline(pydantic.BaseModel):
    """A simpler model to compare with."""

    name: str
    top1: float


class FailedVideo(pydantic.BaseModel):
    """A video that could not be judged."""

    key: str
    reason: str


class Protocol(pydantic.BaseModel):
    """The eval section that was evaluated."""

    clips: int = 1
    crops: int = 1
    flip: bool = False
    fusion: str = "sum_logits"


class Evaluation(pydantic.BaseModel):
    """What reports use of an evaluation; shares from 0 to 1. confusion: rows truth, columns prediction."""

    split: str
    num_videos: pydantic.PositiveInt
    num_failed: int = 0
    views: int = 1
    eval: Protocol = Protocol()
    checkpoints: list[str] = []
    top1: float
    top5: float
    mean_recall: float | None = None
    chance: float
    step: int
    dataset_fingerprint: str = ""
    calibration: Calibration = Calibration()
    classes: list[str] = []
    per_class: dict[str, ClassResult] = {}
    confusion: list[list[int]] = []
    failed: list[FailedVideo] = []
    videos: list[Video] = []
    baseline: Baseline | None = None

    @pydantic.model_validator(mode="after")
    def _classes_exist(self) -> "Evaluation":
        if any(max(video.label, *video.top[:1]) >= len(self.classes) for video in self.videos if video.top):
            raise ValueError("a video is of a class that is not among 'classes'")
        return self

    @property
    def how(self) -> str:
        """The protocol in a few words: 1 clip x 1 crop."""
        parts = [f"{self.eval.clips} clip{'s' * (self.eval.clips > 1)} x {self.eval.crops} crop{'s' * (self.eval.crops > 1)}"]
        parts += ["mirrored too"] * self.eval.flip + [FUSIONS.get(self.eval.fusion, self.eval.fusion)] * (self.views > 1)
        parts += [f"mean of {len(self.checkpoints)} checkpoints"] * (len(self.checkpoints) > 1)
        return ", ".join(parts)

    def name(self, label: int) -> str:
        """Of a class."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`count` videos of class `truth` were taken for `predicted`, a `share` of them."""

    truth: str
    predicted: str
    count: int
    share: float


def read_evaluation(path: Path) -> Evaluation:
    """Raises JobError with what is wrong, FileNotFoundError where there is none."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("schema") != SCHEMA:
            raise ValueError(f"it is of schema {values.get('schema')}, expected {SCHEMA}")
        return Evaluation.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
    raise JobError(f"{path.name} cannot be shown: {problem}. Run 'posmlp eval' again.")


def wilson(share: float, num: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `num` videos (Wilson 1927): what another draw of videos might show."""
    if num < 1:
        return 0.0, 1.0
    z = 1.96
    centre, half = share + z * z / (2 * num), z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, (centre - half) / (1 + z * z / num)), min(1.0, (centre + half) / (1 + z * z / num))


def worst_first(evaluation: Evaluation) -> list[tuple[str, ClassResult]]:
    """Classes with videos, the lowest recall first, of equal ones the larger."""
    judged = [(name, result) for name, result in evaluation.per_class.items() if result.recall is not None]
    return sorted(judged, key=lambda pair: (pair[1].recall, -pair[1].num, pair[0]))


def worst_videos(evaluation: Evaluation) -> list[int]:
    """Places in `evaluation.videos` of those that were judged: the surest mistakes first, then what is right, the least sure first."""
    judged = [place for place, video in enumerate(evaluation.videos) if video.top and video.scores]

    def rank(place: int) -> tuple[bool, float, str]:
        video = evaluation.videos[place]
        return video.right, video.confidence if video.right else -video.confidence, video.key

    return sorted(judged, key=rank)


def confused_pairs(evaluation: Evaluation) -> list[Pair]:
    """The pairs of classes most often taken for each other, most frequent first."""
    names = evaluation.classes
    wrong = [
        Pair(truth=names[i], predicted=names[j], count=count, share=count / sum(row))
        for i, row in enumerate(evaluation.confusion[: len(names)])
        for j, count in enumerate(row[: len(names)])
        if count > 0 and i != j
    ]
    return sorted(wrong, key=lambda pair: (-pair.count, -pair.share, pair.truth, pair.predicted))[:MAX_PAIRS]


def sign_test(first: int, second: int) -> float:
    """Two-sided exact sign test, McNemar's on paired results: how often `first` against `second` or a split more uneven comes by chance.

    first, second: videos that only the one run, only the other, has right. Sums binomial probabilities in logarithms, so that
    thousands of them neither overflow nor vanish.
    """
    num, few = first + second, min(first, second)
    if num == 0 or first == second:
        return 1.0
    logs = [math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) - num * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def same_videos(evaluations: Sequence[Evaluation]) -> bool:
    """Whether all judged the same videos with the same classes, so that results can be compared video by video."""
    first = evaluations[0]
    return bool(first.videos) and all(
        other.classes == first.classes and [(v.key, v.label) for v in other.videos] == [(v.key, v.label) for v in first.videos]
        for other in evaluations[1:]
    )
