"""What `posmlp doctor` tries with tiny videos that it makes on the spot: FFmpeg, DALI, the graph, the child process of the build."""

import io
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from jobs.probes import REINSTALL, Check, gpus_there

NUM_FRAMES, SIDE = 8, 256  # of the videos that are tried; NVDEC refuses some codecs below 128 pixels
ENCODERS = {
    "h264": ("libx264", "mp4"), "hevc": ("libx265", "mp4"), "vp8": ("libvpx", "webm"), "vp9": ("libvpx-vp9", "webm"),
    "av1": ("libsvtav1", "mp4"), "mpeg4": ("mpeg4", "mp4"), "mjpeg": ("mjpeg", "matroska"),
}  # fmt: skip


def driver_video() -> Iterator[Check]:
    """The driver's decoding library, which containers often lack."""
    import ctypes

    try:
        ctypes.CDLL("libnvcuvid.so.1")
        problem = ""
    except OSError as error:
        problem = str(error)
    yield Check(
        name="driver's video decoding",
        ok=not problem,
        required=False,
        detail=problem or "libnvcuvid.so.1 loads",
        remedy="In a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video. Until then set loader.decode=cpu."
        if gpus_there()
        else "Nothing to do without a GPU.",
    )


def reading_videos() -> Iterator[Check]:
    """A video is written, read in the limited child process of the build, and decoded again."""
    import numpy as np

    from pipeline import software_decode
    from pipeline.media import library_versions, write_video
    from pipeline.media_worker import MediaWorker
    from pipeline.options import EncodeOptions, LimitOptions

    frames = [np.full((64, 64, 3), 20 * i, dtype=np.uint8) for i in range(NUM_FRAMES)]
    with tempfile.TemporaryDirectory(prefix="posmlp-doctor-") as folder, MediaWorker(EncodeOptions(), LimitOptions()) as worker:
        source, copy = Path(folder) / "source.mp4", Path(folder) / "copy.mp4"
        write_video(source, frames, 25.0, EncodeOptions())
        report = worker.transcode(source, copy)
        decoded = np.empty((NUM_FRAMES, 64, 64, 3), dtype=np.uint8)
        software_decode.decode(copy.read_bytes(), np.arange(NUM_FRAMES, dtype=np.int32), decoded, key="test", shard="none")
    worst = float(np.abs(decoded.mean(axis=(1, 2, 3)) - 20.0 * np.arange(NUM_FRAMES)).max())
    right = report.num_frames == NUM_FRAMES and worst < 4
    libraries = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    yield Check(name="building: x264 and child process", ok=right, required=True, detail=libraries, remedy=REINSTALL)


def codecs() -> Iterator[Check]:
    """Each codec that a user's video may have: encoded here where FFmpeg has an encoder, decoded by FFmpeg on the CPU."""
    import av

    for codec in ENCODERS:
        name = f"FFmpeg decodes {codec} on the CPU"
        try:
            data = tiny_video(codec)
            with av.open(io.BytesIO(data), "r") as container:
                count = sum(1 for _ in container.decode(container.streams.video[0]))
            ok, detail = count == NUM_FRAMES, f"{count} of {NUM_FRAMES} frames"
        except (av.FFmpegError, ValueError) as error:
            ok, detail = False, str(error)
        yield Check(name=name, ok=ok, required=codec == "h264", detail=detail, remedy=REINSTALL)


def tiny_video(codec: str) -> bytes:
    """Frame i of NUM_FRAMES is of the even grey that `grey_level` says. Raises ValueError where FFmpeg cannot encode the codec."""
    import av
    import numpy as np

    encoder, container_name = ENCODERS[codec]
    if encoder not in av.codecs_available:
        raise ValueError(f"this FFmpeg has no encoder {encoder} to try it with")
    av.logging.set_level(av.logging.PANIC)
    file = io.BytesIO()
    with av.open(file, "w", format=container_name) as container:
        stream = container.add_stream(encoder, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), grey_level(i), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def grey_level(frame: int) -> int:
    return 40 + 20 * frame


def dali_cpu() -> Iterator[Check]:
    """The augmentation graph on frames (what training runs on), and DALI's own decoding without a GPU."""
    yield _dali("augmentation graph (DALI on the CPU)", None, None, required=True)
    for codec in ("vp8", "vp9", "mjpeg"):
        yield _dali(f"DALI decodes {codec} on the CPU", codec, None, required=False)


def dali_gpu(codec: str) -> Iterator[Check]:
    """DALI's decoding on the first GPU: for h264 it is what `loader.decode=auto` uses there."""
    yield _dali(f"DALI decodes {codec} on the GPU", codec, 0, required=codec == "h264")


def _dali(name: str, codec: str | None, device_id: int | None, *, required: bool) -> Check:
    """Runs the product's own graph, and looks whether each frame has the grey that was put in. codec None: frames, not decoded."""
    import numpy as np

    from pipeline.dali import Graph, GraphError
    from pipeline.options import AugmentOptions

    remedy = "Set loader.decode=cpu; PyAV then decodes." if codec and required else "PyAV decodes it instead." if codec else REINSTALL
    augment = AugmentOptions(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    numbers = np.arange(NUM_FRAMES, dtype=np.int32)
    levels = np.array([grey_level(i) for i in range(NUM_FRAMES)])
    try:
        if codec is None:
            data = np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (NUM_FRAMES, 64, 64, 3)).astype(np.uint8))
            box = np.array([[0, 0, 64, 64]], dtype=np.float32)
        else:
            data = np.frombuffer(tiny_video(codec), dtype=np.uint8)
            box = np.array([[0, 0, SIDE, SIDE]], dtype=np.float32)
        with Graph(batch=1, augment=augment, decode=codec is not None, device_id=device_id, threads=1) as graph:
            clips = graph.run([data], box, np.zeros(1, dtype=np.bool_), None if codec is None else numbers[None])
            seen = 255 * clips.float().mean(dim=(0, 1, 3, 4)).cpu().numpy()
    except (GraphError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if "rror" in line and "occurred" not in line), str(error))
        return Check(name=name, ok=False, required=required, detail=first[:200], remedy=remedy)
    worst = float(np.abs(seen - levels).max())
    detail = f"{NUM_FRAMES} frames, grey off by {worst:.1f} of 255 at most"
    return Check(name=name, ok=worst < 8, required=required, detail=detail, remedy=remedy)
