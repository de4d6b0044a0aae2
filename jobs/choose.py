"""Validation while training (`eval.every`): which checkpoint is best, judged on samples that are neither trained on nor reported.

The state is saved, then judged with a copy of its weights while the save is under way, then its score is written beside it. A kill
in between leaves a checkpoint without a score, which is judged when the run resumes. Nothing of the training changes: its model,
its random draws and its stream are not touched.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from cluster import lease
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.engine import autocast
from cluster.topology import Worker
from cluster.worker import heartbeat
from jobs.recipe import Recipe
from jobs.run_folder import choice_rows, epoch_length
from jobs.run_log import RankLog, say_slow
from jobs.trained_model import build_model
from pipeline.index import Dataset
from pipeline.loader import Batch, Loader
from pipeline.requests import MicroBatchRequest, eval_requests

if TYPE_CHECKING:
    from cluster.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of all judged samples: shares right, mean loss in nats (of those that could be judged), their number, and of those that could not."""

    top1: float
    top5: float
    loss: float
    num_videos: int
    num_failed: int


class Chooser:
    """Judges the states of one run; every rank has one, and calls it alike. Without `eval.every` nothing is ever due."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, store: CheckpointStore, worker: Worker, log: RankLog, *, num_train: int, steps: int
    ) -> None:
        """num_train: items of `dataset` that are trained on. steps: of the whole run."""
        self._recipe, self._dataset, self._store, self._worker, self._log = recipe, dataset, store, worker, log
        self._steps = steps
        self._every = recipe.eval.every_steps(epoch_length(recipe, num_train) / recipe.samples_per_step)
        self._rows = choice_rows(recipe, dataset) if self._every else np.zeros(0, dtype=np.uint32)

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is judged; the last one always is."""
        return self._every is not None and step > 0 and (step % self._every == 0 or step == self._steps)

    def lacks(self, checkpoint: Checkpoint | None) -> bool:
        """Whether this one should have been judged and was not."""
        return checkpoint is not None and self.due(checkpoint.step) and checkpoint.judgement() is None

    def judge(self, engine: "Engine", step: int, stop: Callable[[], bool], saved: Callable[[], None]) -> bool:
        """Judges the engine's weights as the state after `step` steps, whose checkpoint stands when `saved` returns. A collective.

        stop: as `Engine.train_step` asks it. False where it said yes in the middle: nothing is written then.
        """
        began = time.perf_counter()
        score = self._score(engine, stop)
        saved()
        if score is None:
            return False
        if self._worker.rank == 0:
            newest = next(found for found in self._store.manifests() if found.step == step)
            facts = {"step": step, "split": self._recipe.data.choose_split or "choose_fraction", **asdict(score)}
            self._log.event("validation", **facts, seconds=round(time.perf_counter() - began, 4))
            fence = partial(lease.check, self._recipe.run_dir, self._worker.attempt)
            self._store.judge(newest, (score.top1, -score.loss), facts, fence=fence)
        return True

    def _score(self, engine: "Engine", stop: Callable[[], bool]) -> Score | None:
        model = build_model(self._recipe, len(self._dataset.info.classes)).to(self._worker.device).eval()
        engine.copy_weights(model)
        known = torch.zeros((len(self._rows), 4), dtype=torch.float64, device=self._worker.device)
        with self._loader() as loader, torch.inference_mode(), autocast(self._recipe.engine, self._worker.device):
            for batch in loader:  # as many on each rank
                asked = torch.tensor([float(stop())], device=self._worker.device)
                dist.all_reduce(asked)
                if asked.item():
                    return None
                _note(known, batch, model(batch.clips).double())
                heartbeat()
        dist.all_reduce(known)  # each row is one rank's, so that adding changes no digit
        return _summary(known)

    def _loader(self) -> Loader:
        recipe = self._recipe
        return Loader(
            self._dataset,
            self._requests(),
            micro_batch=recipe.eval.micro_batch,
            clip=recipe.clip,
            augment=recipe.augment,
            options=recipe.loader,
            threads=self._worker.threads,
            device=self._worker.device,
            on_damage="report",
            on_slow_read=partial(say_slow, self._worker.rank, self._dataset),
        )

    def _requests(self) -> Iterator[MicroBatchRequest]:
        return eval_requests(
            self._dataset,
            self._rows,
            micro_batch=self._recipe.eval.micro_batch,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            clip=self._recipe.clip,
            augment=self._recipe.augment,
        )


def _note(known: torch.Tensor, batch: Batch, logits: torch.Tensor) -> None:
    """Writes what is known of a batch's samples into their rows of `known` (N, 4): loss, right, in the best five, judged."""
    failed = {damage.position for damage in batch.damaged}
    labels = batch.labels
    truth = logits.gather(1, labels[:, None])
    place = (logits > truth).sum(1)  # how many classes are likelier
    losses = logits.logsumexp(1) - truth[:, 0]
    facts = torch.stack([losses, (place < 1).double(), (place < 5).double(), torch.ones_like(losses)], dim=1)
    for i, position in enumerate(batch.positions.tolist()):
        if batch.valid[i] and position not in failed and losses[i].isfinite():
            known[position] = facts[i]


def _summary(known: torch.Tensor) -> Score:
    loss, right, in_top5, judged = known.cpu().double().T.tolist()
    num, failed = len(judged), judged.count(0.0)
    mean = math.fsum(loss) / (num - failed) if num > failed else math.inf
    return Score(top1=sum(right) / num, top5=sum(in_top5) / num, loss=mean, num_videos=num, num_failed=failed)
