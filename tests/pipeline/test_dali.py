"""The graph: a pure function of its inputs, equal to a plain reference, exact in its frames, and usable after an error."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.dali import Graph, GraphError
from pipeline.options import AugmentOptions
from pipeline.software_decode import decode
from tests.pipeline.numbered import H264, HEIGHT, MJPEG, VP9, WIDTH, Stream, encode, read_number

PLAIN = AugmentOptions(size=64, mean=(0, 0, 0), std=(1, 1, 1))
WHOLE = (0.0, 0.0, float(HEIGHT), float(WIDTH))


def graph(augment: AugmentOptions = PLAIN, *, batch: int = 4, decode: bool = False, threads: int = 1) -> Graph:
    return Graph(batch=batch, augment=augment, decode=decode, device_id=None, threads=threads)


def noise(seed: int, *shape: int) -> npt.NDArray[np.uint8]:
    """Smooth pictures: what a resize may do to single pixels of white noise says little."""
    rng = np.random.default_rng(seed)
    length, height, width = shape
    small = torch.from_numpy(rng.integers(0, 255, (length, 3, height // 8, width // 8)).astype(np.float32))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return large.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous().numpy()


def run(with_graph: Graph, videos: list[npt.NDArray[np.uint8]], rois: list[tuple[float, ...]], flips: list[bool]) -> torch.Tensor:
    return with_graph.run(videos, np.array(rois, dtype=np.float32).reshape(-1, 4), np.array(flips, dtype=np.bool_))


def weights(start: float, end: float, size: int, length: int) -> npt.NDArray[np.float64]:
    """(size, length): the triangle filter that resamples [start, end) of `length` pixels, widened where it shrinks; edges repeat."""
    scale = (end - start) / size
    centres = start + (np.arange(size) + 0.5) * scale
    pixels = np.arange(-length, 2 * length)
    hats = np.clip(1 - np.abs(pixels + 0.5 - centres[:, None]) / max(scale, 1), 0, None)
    result = np.zeros((size, length))
    for pixel, column in zip(np.clip(pixels, 0, length - 1), (hats / hats.sum(1, keepdims=True)).T, strict=True):
        result[:, pixel] += column
    return result


def reference(video: npt.NDArray[np.uint8], roi: tuple[float, ...], flip: bool, augment: AugmentOptions) -> torch.Tensor:
    """Resize of the box (its surroundings count at its edges), flip and normalisation, written plainly in float64."""
    rows, columns = (weights(roi[axis], roi[axis + 2], augment.size, video.shape[1 + axis]) for axis in (0, 1))
    frames = np.einsum("ih,jw,thwc->ctij", rows, columns, video.astype(np.float64))
    if flip:
        frames = frames[..., ::-1]
    mean, std = (np.array(values)[:, None, None, None] for values in (augment.mean, augment.std))
    return torch.from_numpy((frames / 255 - mean) / std)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("roi", [(0, 0, 96, 128), (10, 20, 90, 60), (0, 0, 8, 8), (40, 3, 96, 128), (3.5, 8.25, 77.5, 90)])
def test_geometry_and_normalisation_equal_the_reference(roi: tuple[float, ...], flip: bool) -> None:
    augment, video = AugmentOptions(size=56), noise(1, 3, 96, 128)
    with graph(augment) as tested:
        clips = run(tested, [video], [roi], [flip])
    assert clips.shape == (1, 3, 3, 56, 56)
    assert clips.dtype == torch.float32
    assert clips.is_contiguous()
    levels = (clips[0] - reference(video, roi, flip, augment)).abs() * 255 * 0.225
    assert levels.max() < 1.1  # of 255: the graph rounds to whole levels
    assert levels.mean() < 0.4


def test_a_clip_does_not_depend_on_its_batch_the_threads_or_the_graph() -> None:
    videos = [noise(seed, 4, 64 + 16 * seed, 96) for seed in range(4)]
    rois = [(1.0, 2.0, 50.0 + seed, 60.5) for seed in range(4)]
    flips = [True, False, True, False]
    with graph(AugmentOptions(size=40)) as one, graph(AugmentOptions(size=40), batch=7, threads=3) as other:
        together = run(one, videos, rois, flips)
        for i in (3, 1, 0, 2):
            assert torch.equal(run(other, [videos[i]], [rois[i]], [flips[i]])[0], together[i])
        assert torch.equal(run(other, videos[::-1], rois[::-1], flips[::-1]).flip(0), together)


def test_clips_stay_valid_and_inputs_are_free_after_the_call() -> None:
    """Buffers are overwritten for the next batch while the model still reads the last ones."""
    buffer = noise(0, 2, 64, 96)
    with graph() as tested:
        clips, kept = [], []
        for seed in range(8):
            buffer[:] = noise(seed, 2, 64, 96)
            clips.append(run(tested, [buffer], [WHOLE], [False]))
            kept.append(clips[-1].clone())
            buffer[:] = 0
    assert all(torch.equal(clip, copy) for clip, copy in zip(clips, kept, strict=True))
    assert not torch.equal(clips[0], clips[1])


@pytest.mark.parametrize("decode_inside", [False, True])
def test_no_work_is_no_crash(decode_inside: bool) -> None:
    with graph(decode=decode_inside) as tested:
        empty = np.zeros((0, 4), dtype=np.float32)
        frames = np.zeros((0, 5), dtype=np.int32) if decode_inside else None
        assert tested.run([], empty, np.zeros(0, dtype=np.bool_), frames).shape[0] == 0


FRAMES = np.array([[0, 1, 2, 3, 4], [59, 3, 3, 41, 12], [31, 32, 33, 34, 35], [7, 59, 7, 59, 7]], dtype=np.int32)


@pytest.mark.parametrize("stream", [VP9, MJPEG], ids=["vp9", "mjpeg"])
def test_decoding_inside_is_frame_exact_and_close_to_pyav(stream: Stream) -> None:
    """The path that runs on GPUs, on a codec that DALI decodes without one."""
    data = encode(60, stream)
    square = AugmentOptions(size=96, mean=(0, 0, 0), std=(1, 1, 1))
    rois, flips = np.array([(0, 0, HEIGHT, WIDTH)] * 4, dtype=np.float32), np.zeros(4, dtype=np.bool_)
    with graph(square, decode=True) as inside, graph(square) as outside:
        clips = inside.run([np.frombuffer(data, dtype=np.uint8)] * 4, rois, flips, FRAMES)
        videos = []
        for frames in FRAMES:
            videos.append(np.empty((5, HEIGHT, WIDTH, 3), dtype=np.uint8))
            decode(data, frames, videos[-1], key="k", shard="s")
        expected = outside.run(videos, rois, flips)
    assert (clips - expected).abs().max() * 255 <= 6  # another chroma filter and colour matrix, the same frames
    with graph(AugmentOptions(size=HEIGHT, mean=(0, 0, 0), std=(1, 1, 1)), decode=True) as cells:
        left = np.array([(0, 0, HEIGHT, HEIGHT), (0, WIDTH - HEIGHT, HEIGHT, WIDTH)], dtype=np.float32)
        halves = cells.run([np.frombuffer(data, dtype=np.uint8)] * 2, left, np.zeros(2, dtype=np.bool_), FRAMES[[1, 1]])
    pixels = (halves * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    whole = np.concatenate([pixels[0], pixels[1][:, :, 2 * HEIGHT - WIDTH :]], axis=2)
    assert [read_number(image) for image in whole] == FRAMES[1].tolist()


@pytest.mark.parametrize(
    ("data", "frame"),
    [(b"no video", 0), (encode(5, MJPEG)[:400], 0), (encode(5, MJPEG), 5), (encode(5, H264), 0)],
    ids=["no video", "cut", "a frame beyond the end", "a codec for GPUs"],
)
def test_a_graph_works_again_after_an_error(data: bytes, frame: int) -> None:
    good = np.frombuffer(encode(5, MJPEG), dtype=np.uint8)
    roi, flip = np.array([WHOLE], dtype=np.float32), np.zeros(1, dtype=np.bool_)
    with graph(decode=True) as tested:
        before = tested.run([good], roi, flip, np.array([[1]], dtype=np.int32))
        with pytest.raises(GraphError):
            tested.run([np.frombuffer(data, dtype=np.uint8)], roi, flip, np.array([[frame]], dtype=np.int32))
        assert torch.equal(tested.run([good], roi, flip, np.array([[1]], dtype=np.int32)), before)
