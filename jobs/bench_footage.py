"""What decoding is measured on: the user's own videos, or ten-second scenes with texture, camera motion, objects and noise.

Every stream of one comparison is encoded from the same frames.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from jobs.errors import JobError
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import RejectedError

NUM_FRAMES, FPS, WIDTH, HEIGHT = 300, 30.0, 336, 256  # Kinetics' usual size, as multiples of 16
OBJECTS, OBJECT_SIDE = 5, 96
NOISE = 2.5  # levels, standard deviation: of a sensor
_FAITHFUL = EncodeOptions(gop=250, crf=10, tune="film")  # the form in which a user's video reaches the frames below

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footage:
    """frames: (T, H, W, 3) RGB. fps: of them."""

    name: str
    frames: Frames
    fps: float


def footage(folder: Path | None, count: int, min_frames: int = 1) -> Iterator[Footage]:
    """`count` videos at the most: the first of `folder` by name that can be used, ten seconds of each; without a folder scenes 0, 1, ...

    min_frames: shorter ones are passed over. Raises JobError where the folder holds none.
    """
    if folder is None:
        yield from (Footage(name=f"scene {number}", frames=np.stack(list(scene(number))), fps=FPS) for number in range(count))
        return
    yielded = 0
    with tempfile.TemporaryDirectory(prefix="posmlp-bench-") as work, MediaWorker(_FAITHFUL, LimitOptions()) as worker:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                report = worker.transcode(path, Path(work) / "video.mp4", None, 10.0)
            except RejectedError:
                continue
            if report.num_frames < min_frames:
                continue
            with av.open(str(Path(work) / "video.mp4")) as container:
                images = islice(container.decode(video=0), NUM_FRAMES)
                frames = np.stack([np.asarray(image.to_ndarray(format="rgb24", dst_color_range="JPEG"), np.uint8) for image in images])
            yield Footage(name=path.name, frames=frames, fps=report.fps)
            yielded += 1
            if yielded == count:
                return
    if not yielded:
        raise JobError(f"{folder} holds no video of {min_frames} frames or more that can be used. Give a folder of longer videos.")


def scene(seed: int) -> Iterator[Frames]:
    """NUM_FRAMES frames (HEIGHT, WIDTH, 3): a pan over a texture whose spectrum falls as that of photographs, before it textured discs."""
    rng = np.random.default_rng(seed)
    background = _texture(rng, 2 * HEIGHT, 3 * WIDTH)
    discs = [(_texture(rng, OBJECT_SIDE, OBJECT_SIDE), *rng.uniform((0, 0, -3, -2, 20), (WIDTH, HEIGHT, 3, 2, 45))) for _ in range(OBJECTS)]
    rows, columns = np.mgrid[:OBJECT_SIDE, :OBJECT_SIDE] - OBJECT_SIDE // 2
    for i in range(NUM_FRAMES):
        left = int((np.sin(i / 60) + 1) * WIDTH / 2 + 0.7 * i) % (2 * WIDTH)
        top = int((np.cos(i / 45) + 1) * HEIGHT / 4)
        image = background[top : top + HEIGHT, left : left + WIDTH].copy()
        for texture, x, y, right, down, radius in discs:
            inside = np.hypot(rows, columns) < radius
            place = (int(y + down * i) + rows) % HEIGHT, (int(x + right * i + 10 * np.sin(i / 9)) + columns) % WIDTH
            image[place[0][inside], place[1][inside]] = np.roll(texture, i // 2, axis=1)[inside]
        image += NOISE * rng.standard_normal((HEIGHT, WIDTH, 1))
        yield np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """(height, width, 3) levels around 128, amplitudes falling with the frequency (Field, "Relations between the statistics of natural
    images and the response properties of cortical cells", 1987)."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    radius[0, 0] = 1
    noise = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / radius).real for _ in range(3)]
    mixed = np.stack(noise, -1) @ np.array([[1, 0.8, 0.8], [0.2, 0.3, 0.2], [0.1, 0.1, 0.3]])  # mostly light, some colour
    return np.asarray(128 + 45 * (mixed - mixed.mean()) / mixed.std(), dtype=np.float32)


def write_x264(path: Path, shown: Footage, options: Mapping[str, str]) -> None:
    """As a command line with these options of libx264 would, and with its defaults for the rest; one thread."""
    rate = Fraction(shown.fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={**options, "threads": "1"})
        stream.height, stream.width = shown.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(shown.frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
