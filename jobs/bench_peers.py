"""Other ways to decode a clip, as their users write them; those that are not installed say why."""

import io
import math
from collections.abc import Callable
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt

from pipeline import software_decode

Frames: TypeAlias = npt.NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]  # height and width of the video, which our index knows; others find out
Decode: TypeAlias = Callable[[bytes, npt.NDArray[np.int32], Size], Frames]  # a file, ascending frame numbers -> (T, H, W, 3) RGB

MARGIN = 1024  # timestamp units before the wanted span, as PySlowFast has it
LOOP = "PyAV loop"


class Ours:
    """`pipeline.software_decode` with a buffer that is used again, as the loader does."""

    def __init__(self) -> None:
        self._out = np.empty(0, dtype=np.uint8)

    def __call__(self, data: bytes, frames: npt.NDArray[np.int32], size: Size) -> Frames:
        shape = (len(frames), *size, 3)
        if self._out.size != math.prod(shape):
            self._out = np.empty(math.prod(shape), dtype=np.uint8)
        out = self._out.reshape(shape)
        software_decode.decode(data, frames, out, key="video", shard="memory")
        return out


def torchcodec_decode(data: bytes, frames: npt.NDArray[np.int32], size: Size) -> Frames:
    """One thread, exact frames: as torchcodec's documentation has it."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC")
    return np.asarray(decoder.get_frames_at(frames.tolist()).data)


def pyav_loop(data: bytes, frames: npt.NDArray[np.int32], size: Size) -> Frames:
    """Seek before the span, decode and convert everything in it, then pick: the way of PySlowFast's PyAV decoder."""
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        assert stream.average_rate is not None
        period = 1 / (stream.average_rate * stream.time_base)
        first, last = (int(frame * period) + (stream.start_time or 0) for frame in (frames[0], frames[-1]))
        container.seek(max(first - MARGIN, 0), stream=stream)
        images: list[Frames] = []
        for frame in container.decode(video=0):
            if frame.pts is not None and frame.pts >= first:
                images.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
            if frame.pts is not None and frame.pts >= last:
                break
    return np.stack([images[int(number)] for number in frames - frames[0]])


def decoders() -> tuple[dict[str, Decode], dict[str, str]]:
    """Name -> decoder, and name -> why it cannot be measured here."""
    found: dict[str, Decode] = {"posmlp": Ours(), LOOP: pyav_loop}
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: FFmpeg's shared libraries are not there
        reason = str(error).strip().splitlines()[0]
        return found, {"torchcodec": f"{reason} (pip install 'posmlp-video[bench]', and FFmpeg by the system's package manager)"}
    return {**found, "torchcodec": torchcodec_decode}, {}
