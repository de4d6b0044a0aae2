"""The figures of an evaluation: top-1 and top-5, precision and recall per class, confusion, and whether confidence can be believed."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jobs.predictions import Prediction

BINS = 15  # of confidence, all of the same width (Guo et al., "On calibration of modern neural networks", 2017)


def summarise(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, object]:
    """Everything `eval.json` says about at least one prediction. A failed video counts as wrong, in accuracy and in recall.

    Confusion: rows truth, columns prediction, failed ones in none. mean_recall: over the classes that have videos.
    """
    num, judged = len(predictions), [prediction for prediction in predictions if prediction.failed is None]
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    totals = np.bincount([prediction.label for prediction in predictions], minlength=len(classes))
    for prediction in judged:
        confusion[prediction.label, prediction.top[0]] += 1
    right = confusion.diagonal()
    per_class = _per_class(confusion, totals, classes)
    recalls = [facts["recall"] for facts in per_class.values() if facts["recall"] is not None]
    return {
        "num_videos": num,
        "num_failed": num - len(judged),
        "top1": float(right.sum() / num),
        "top5": sum(prediction.label in prediction.top for prediction in judged) / num,
        "mean_recall": math.fsum(recalls) / len(recalls),
        "chance": 1 / len(classes),
        "calibration": calibration(judged),
        "classes": list(classes),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "failed": [{"key": prediction.key, "reason": prediction.failed} for prediction in predictions if prediction.failed is not None],
    }


def _per_class(
    confusion: npt.NDArray[np.int64], totals: npt.NDArray[np.int64], classes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """num: its videos. recall: share of them right; precision: share right of those taken for it. None of no videos."""
    right, taken = confusion.diagonal(), confusion.sum(axis=0)
    return {
        name: {
            "num": int(totals[i]),
            "precision": float(right[i] / taken[i]) if taken[i] else None,
            "recall": float(right[i] / totals[i]) if totals[i] else None,
        }
        for i, name in enumerate(classes)
    }


def calibration(judged: Sequence[Prediction]) -> dict[str, object]:
    """How far confidence, the probability of the likeliest class, lies from accuracy; over the videos that could be judged.

    bins: [low, high) of confidence with the number of videos in it, their mean confidence and share right (None of no videos); the last
    one includes 1. ece: expected calibration error, the mean over videos of their bin's |share right - mean confidence|.
    nll: mean negative logarithm of the truth's probability, in nats. ece and nll are None of no videos.
    """
    confidence = np.array([prediction.scores[0] for prediction in judged])
    right = np.array([prediction.right for prediction in judged], dtype=np.float64)
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins: list[dict[str, float | None]] = []
    error = 0.0
    for i in range(BINS):
        inside = places == i
        num = int(inside.sum())
        sure, share = (float(confidence[inside].mean()), float(right[inside].mean())) if num else (None, None)
        bins.append({"low": i / BINS, "high": (i + 1) / BINS, "num": num, "confidence": sure, "accuracy": share})
        error += num * abs(share - sure) if sure is not None and share is not None else 0.0
    nll = -math.fsum(prediction.truth_log for prediction in judged) / len(judged) if judged else None
    return {"ece": error / len(judged) if judged else None, "nll": nll, "num": len(judged), "bins": bins}
