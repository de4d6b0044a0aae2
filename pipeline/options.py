"""What a recipe may say about data, as plain frozen dataclasses, beside the code that uses them and free of its imports.

Ranges are checked here, so that a recipe, a script and a test meet the same limits: a bad value raises ValueError with the
field, what it got and what it expected.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

FORBID_UNKNOWN = {"extra": "forbid"}  # read by pydantic when these dataclasses are sections of a recipe


def require(ok: bool, field: str, got: object, expected: str) -> None:
    """Raises ValueError("field: got …, expected …") unless `ok`."""
    if not ok:
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """The canonical form into which the build transcodes every video (H.264, yuv420p, BT.709 limited range, no audio).

    short_side: pixels of the shorter side at most; smaller sources keep their size. Both sides become multiples of 16.
    fps: "keep" stamps each decodable frame once at the source's nominal rate; a number resamples by time.
    gop: frames between keyframes; GOPs are closed.
    crf, preset, tune: x264's names.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    short_side: int = 256
    fps: Literal["keep"] | float = "keep"
    gop: int = 32
    crf: int = 23
    preset: str = "veryfast"
    tune: str = "fastdecode"

    def __post_init__(self) -> None:
        require(16 <= self.short_side <= 4096, "short_side", self.short_side, "16 to 4096 pixels")
        require(self.fps == "keep" or 0 < float(self.fps) <= 240, "fps", self.fps, "'keep' or a rate in (0, 240]")
        require(1 <= self.gop <= 1024, "gop", self.gop, "1 to 1024 frames")
        require(0 <= self.crf <= 51, "crf", self.crf, "0 to 51")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """What one source video may cost before it is quarantined. Videos are untrusted input.

    max_pixels: coded width x height. max_frames: decoded frames. max_bytes: file size.
    memory_mib, cpu_s, wall_s: of the child process that verifies and transcodes the one video.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    max_pixels: int = 4096 * 4096
    max_frames: int = 200_000
    max_bytes: int = 8 << 30
    memory_mib: int = 4096
    cpu_s: int = 1800
    wall_s: int = 3600

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_frames", "max_bytes", "memory_mib", "cpu_s", "wall_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """Which frames of a video make a clip.

    num_frames: frames in a clip (T).
    sampling: "dense" takes every stride-th frame from a random start (evaluation: the middle);
        "segment" cuts the video into T segments and draws one frame of each (evaluation: their middles);
        "uniform" spaces T frames evenly over the whole video, without randomness.
    stride: frames between frames of a dense clip, in source frames. stride_s: the same in seconds, instead of `stride`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    num_frames: int = 16
    sampling: Literal["dense", "segment", "uniform"] = "dense"
    stride: int = 4
    stride_s: float | None = None

    def __post_init__(self) -> None:
        require(1 <= self.num_frames <= 1024, "num_frames", self.num_frames, "1 to 1024")
        require(1 <= self.stride <= 1024, "stride", self.stride, "1 to 1024 frames")
        require(self.stride_s is None or 0 < self.stride_s <= 60, "stride_s", self.stride_s, "seconds in (0, 60]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOptions:
    """From decoded frames to the model's input.

    size: (height and width in pixels) of the square input.
    area, aspect: ranges of the random resized crop in training, as shares of the frame's area and as width/height.
    flip: probability of a horizontal flip in training. Leave it at 0 where left and right change the class.
    eval_resize: in evaluation the shorter side is resized to this, then the centre is cropped; None: to `size`.
    mean, std: per RGB channel, for pixels in 0 to 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    eval_resize: int | None = None
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)

    def __post_init__(self) -> None:
        require(8 <= self.size <= 4096, "size", self.size, "8 to 4096 pixels")
        require(0 < self.area[0] <= self.area[1] <= 1, "area", self.area, "0 < low <= high <= 1")
        require(0 < self.aspect[0] <= self.aspect[1], "aspect", self.aspect, "0 < low <= high")
        require(0 <= self.flip <= 1, "flip", self.flip, "a probability")
        require(self.eval_resize is None or self.eval_resize >= self.size, "eval_resize", self.eval_resize, "at least size")
        require(min(self.std) > 0, "std", self.std, "positive numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How one rank reads and decodes.

    decode: "cpu" (PyAV), "nvdec" (DALI on the GPU), "auto" (nvdec where the rank's device has it).
    threads: decoding threads of one rank; 0: the cores of this machine divided by the ranks on it.
    prefetch_mib: bound on decoded clips that wait for the model; one micro-batch always may.
    max_damaged: share of the samples seen (at least one sample) that may be replaced before training stops.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    decode: Literal["auto", "nvdec", "cpu"] = "auto"
    threads: int = 0
    prefetch_mib: int = 1024
    max_damaged: float = 0.001

    def __post_init__(self) -> None:
        require(0 <= self.threads <= 256, "threads", self.threads, "0 to 256")
        require(self.prefetch_mib >= 1, "prefetch_mib", self.prefetch_mib, "at least 1")
        require(0 <= self.max_damaged <= 1, "max_damaged", self.max_damaged, "a share from 0 to 1")
