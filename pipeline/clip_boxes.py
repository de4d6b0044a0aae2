"""The boxes of a batch's clips as tensors: cropped and flipped as the frames are, by the same parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.boxes import BoxTable, in_crop
from pipeline.index import Item
from pipeline.keyed import ClipParameters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipBoxes:
    """The N boxes in a batch's clips, those of a clip side by side, on the loader's device. A clip may have none.

    clips: int64 (N,), the clip's place in the batch. corners: float32 (N, 4), x1 y1 x2 y2 at the keyframe, which is frame T div 2, as
    fractions of the crop. labels: float32 (N, K), 1 for each class that a box has. persons: int64 (N,), -1 where not known.
    """

    clips: torch.Tensor
    corners: torch.Tensor
    labels: torch.Tensor
    persons: torch.Tensor


def clip_boxes(
    table: BoxTable, slots: Iterable[tuple[Item, ClipParameters, bool]], swapped: Mapping[int, int], device: torch.device
) -> ClipBoxes:
    """slots: of each clip its item, how it was made, and whether it is there at all. swapped: label -> label of a box that is flipped."""
    found = []
    for item, parameters, present in slots:
        boxes = in_crop(table.of(item.row), parameters.roi, parameters.flip, width=item.width, height=item.height)
        if swapped and parameters.flip:
            order = [swapped.get(label, label) for label in range(boxes.labels.shape[1])]
            boxes = replace(boxes, labels=boxes.labels[:, order])
        found.append(boxes if present else boxes[:0])
    clips = np.repeat(np.arange(len(found)), [len(each.persons) for each in found])
    return ClipBoxes(
        clips=torch.from_numpy(clips).to(device),
        corners=torch.from_numpy(np.concatenate([each.corners for each in found])).to(device),
        labels=torch.from_numpy(np.concatenate([each.labels for each in found]).astype(np.float32)).to(device),
        persons=torch.from_numpy(np.concatenate([each.persons for each in found]).astype(np.int64)).to(device),
    )
