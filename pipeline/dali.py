"""The augmentation graph: one DALI pipeline from decoded frames, or from encoded video, to the model's input, on CPU or GPU.

The graph draws nothing: boxes, flips and frame numbers enter as tensors beside the pixels, so equal inputs give equal outputs for any
number of threads, any batch composition and any number of graphs. Order: (decode,) crop and flip and resize in one operation, then
normalise and lay out as the model reads. Where a recipe augments the resized frames, they leave the graph before normalisation, and
`augment_clip` goes on.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.options import AugmentOptions

Feed: TypeAlias = list[npt.NDArray[np.uint8]] | npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.int32]
CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # what DALI decodes without a GPU


class GraphError(Exception):
    """The graph failed on some sample of the batch; its text is DALI's."""


class Graph:
    """A pipeline for micro-batches of up to `batch` clips.

    augment: size and normalisation. device_id: the GPU it runs on, None for the CPU. decode: inputs are encoded videos (on the CPU DALI
    decodes VP8, VP9 and MJPEG only) instead of frames. threads: of the CPU part. Close it, or use it in a `with` statement.
    """

    def __init__(self, *, batch: int, augment: AugmentOptions, decode: bool, device_id: int | None, threads: int) -> None:
        self._batch, self._augment, self._decode = batch, augment, decode
        self._device_id, self._threads = device_id, threads
        self._pipelines: dict[tuple[int, bool], Pipeline] = {}  # by views of a video and whether they are normalised; hardly ever two

    def run(
        self,
        videos: Sequence[npt.NDArray[np.uint8]],
        rois: npt.NDArray[np.float32],
        flips: npt.NDArray[np.bool_],
        frames: npt.NDArray[np.int32] | None = None,
        *,
        normalise: bool = True,
    ) -> torch.Tensor:
        """Clips of a micro-batch: float32 (N*V, 3, T, size, size), contiguous, normalised, on the graph's device. N may be 0.

        videos: N arrays; decoded (T, H, W, 3) RGB of any H and W, or encoded files (bytes,), then with `frames` (N, T), counted from each
        file's first frame. They are copied before this returns. rois: (N*V, 4), y0 x0 y1 x1 in pixels, the V views of a video side by
        side; it is decoded once for all of them. flips: (N*V,). normalise: False gives whole levels, 0 to 255.
        Raises GraphError when DALI does; the graph can be used again after it.
        """
        num = len(videos)
        if num == 0:
            length = 0 if frames is None else frames.shape[1]
            return torch.empty((0, 3, length, self._augment.size, self._augment.size), device=self._torch_device())
        start, end = rois[:, :2].copy(), rois[:, 2:].copy()
        start[flips, 1], end[flips, 1] = rois[flips, 3], rois[flips, 1]  # DALI mirrors a box whose start lies right of its end
        keys = np.arange(num, dtype=np.int64)
        feeds: dict[str, Feed] = {"videos": list(videos), "keys": keys}
        num_views = len(rois) // num
        for view in range(num_views):
            feeds[f"roi_start_{view}"], feeds[f"roi_end_{view}"] = start[view::num_views].copy(), end[view::num_views].copy()
        if frames is not None:
            feeds["frames"] = frames
        try:
            clips, returned = self._step(feeds, num_views, normalise)
        except (RuntimeError, ValueError, TypeError) as error:
            self.close()  # an operator's error leaves a DALI pipeline unusable: the next call builds a new one
            raise GraphError(str(error)) from error
        assert np.array_equal(returned, keys), "the graph returned another batch than it was fed"
        return clips

    def _step(self, feeds: dict[str, Feed], num_views: int, normalise: bool) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        pipeline = self._pipelines.get((num_views, normalise))
        if pipeline is None:
            pipeline = self._pipelines[num_views, normalise] = self._build(num_views, normalise)
        for name, value in feeds.items():
            pipeline.feed_input(name, value)
        pipeline.schedule_run()
        clips, keys = pipeline.share_outputs()
        try:  # the tensor owns its memory: DALI's executor takes another buffer for the next batch
            tensor = from_dlpack(clips.as_tensor())
            return tensor if num_views == 1 else tensor.flatten(0, 1), np.array(keys.as_tensor()).reshape(-1)
        finally:
            pipeline.release_outputs()

    def _build(self, num_views: int, normalise: bool) -> Pipeline:
        options = {"batch_size": self._batch, "num_threads": self._threads, "device_id": self._device_id}
        pipeline = pipeline_def(self._outputs, prefetch_queue_depth=1, seed=0, **options)(num_views, normalise)
        pipeline.build()
        return pipeline

    def _outputs(self, num_views: int, normalise: bool) -> tuple[DataNode, DataNode]:
        video = self._decoded() if self._decode else self._frames()
        clips = [self._laid_out(self._resize(video, view), normalise) for view in range(num_views)]
        return clips[0] if num_views == 1 else fn.stack(*clips), fn.external_source(name="keys", dtype=types.INT64, ndim=0)

    def _frames(self) -> DataNode:
        video = fn.external_source(name="videos", dtype=types.UINT8, layout="FHWC")
        return video if self._device_id is None else video.gpu()

    def _decoded(self) -> DataNode:
        encoded = fn.external_source(name="videos", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        device = "cpu" if self._device_id is None else "mixed"
        # "none": a frame beyond the end is an error, not black. affine: decoding threads must not be pinned to the cores of other ranks.
        return fn.decoders.video(encoded, device=device, frames=frames, pad_mode="none", affine=False)

    def _resize(self, video: DataNode, view: int) -> DataNode:
        """(T, H, W, 3) uint8 -> (T, size, size, 3) uint8: bilinear with antialiasing, of the box alone, mirrored if it is given so."""
        start = fn.external_source(name=f"roi_start_{view}", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name=f"roi_end_{view}", dtype=types.FLOAT, ndim=1)
        size = [self._augment.size, self._augment.size]
        return fn.resize(video, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True)

    def _laid_out(self, video: DataNode, normalise: bool) -> DataNode:
        """(T, size, size, 3) uint8 -> (3, T, size, size) float32."""
        mean, std = [255 * value for value in self._augment.mean], [255 * value for value in self._augment.std]
        if not normalise:
            mean, std = [0.0] * 3, [1.0] * 3
        return fn.crop_mirror_normalize(video, mean=mean, std=std, dtype=types.FLOAT, output_layout="CFHW")

    def _torch_device(self) -> torch.device:
        return torch.device("cpu") if self._device_id is None else torch.device("cuda", self._device_id)

    def close(self) -> None:
        """Frees DALI's threads and memory. Clips returned before stay valid."""
        self._pipelines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
