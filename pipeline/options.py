"""What a recipe may say about data, as plain frozen dataclasses, beside the code that uses them and free of its imports.

Ranges are checked here, so that a recipe, a script and a test meet the same limits: a bad value raises ValueError with the
field, what it got and what it expected.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

BASE_STEP = 4  # frames from one base frame of a layered video to the next
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
    gop: frames between keyframes; GOPs are closed. In the layered form a multiple of 4.
    crf, preset, tune: x264's names.
    frames_fps: rate of videos that come as folders of numbered pictures; null: there are none.
    max_member_s: a longer video is stored as several items, one after the other, as equal as whole groups of pictures allow, each of
        at most so many seconds (or one group of pictures) and with the video's label; null: a video is one item however long.
    form: "plain", or "layered": frames 0, 4, 8, ... refer to none but each other, and no frame refers to the three between. Clips of these
        base frames alone (`clip.starts`) decode most cheaply; any other frames still decode exactly.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    short_side: int = 256
    fps: Literal["keep"] | float = "keep"
    gop: int = 32
    crf: int = 23
    preset: str = "veryfast"
    tune: str = "fastdecode"
    frames_fps: float | None = None
    max_member_s: float | None = None
    form: Literal["plain", "layered"] = "plain"

    def __post_init__(self) -> None:
        require(16 <= self.short_side <= 4096, "short_side", self.short_side, "16 to 4096 pixels")
        require(self.fps == "keep" or 0 < float(self.fps) <= 240, "fps", self.fps, "'keep' or a rate in (0, 240]")
        require(1 <= self.gop <= 1024, "gop", self.gop, "1 to 1024 frames")
        require(self.form == "plain" or self.gop % BASE_STEP == 0, "gop", self.gop, f"a multiple of {BASE_STEP} in the layered form")
        require(0 <= self.crf <= 51, "crf", self.crf, "0 to 51")
        rate = self.frames_fps
        require(rate is None or 0.1 <= rate <= 240, "frames_fps", rate, "a rate from 0.1 to 240, or null")
        longest = self.max_member_s
        require(longest is None or 1 <= longest <= 86_400, "max_member_s", longest, "1 to 86400 seconds, or null")


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
    starts: "any" frame, or "base": a dense clip consists of base frames of a video built with data.encode.form=layered, which start at
        multiples of 4. Fewer different clips, each decoded more cheaply. Videos too short for such a clip start anywhere.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    num_frames: int = 16
    sampling: Literal["dense", "segment", "uniform"] = "dense"
    stride: int = 4
    stride_s: float | None = None
    starts: Literal["any", "base"] = "any"

    def __post_init__(self) -> None:
        require(1 <= self.num_frames <= 1024, "num_frames", self.num_frames, "1 to 1024")
        require(1 <= self.stride <= 1024, "stride", self.stride, "1 to 1024 frames")
        require(self.stride_s is None or 0 < self.stride_s <= 60, "stride_s", self.stride_s, "seconds in (0, 60]")
        on_base = self.sampling == "dense" and self.stride_s is None and self.stride % BASE_STEP == 0
        expected = f"'any' unless sampling is dense, by a stride in frames that is a multiple of {BASE_STEP}"
        require(self.starts == "any" or on_base, "starts", self.starts, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandAugmentOptions:
    """RandAugment (Cubuk et al., 2020) with the fifteen operations of the usual video set, equal for all frames of a clip.

    n: operations drawn per clip, with replacement, 1 to 16. probability: with which a drawn one is applied, 0 to 1.
    m: mean of the normal distribution that magnitudes are drawn from, 0 to 10; they are clipped to [0, 10].
    std: its standard deviation, 0 to 10. increasing: a larger magnitude is always the stronger change; otherwise posterize and solarize
    weaken with it, and colour, contrast, brightness and sharpness run from 0.1 (at 0) over the identity (at 5) to 1.9 (at 10).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    m: float = 7.0
    n: int = 4
    std: float = 0.5
    increasing: bool = True
    probability: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.m <= 10, "m", self.m, "a magnitude from 0 to 10")
        require(1 <= self.n <= 16, "n", self.n, "1 to 16 operations")
        require(0 <= self.std <= 10, "std", self.std, "0 to 10")
        require(0 <= self.probability <= 1, "probability", self.probability, "a probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class JitterOptions:
    """Colour jitter, equal for all frames of a clip.

    brightness, contrast, saturation: the factor is uniform in [1 - v, 1 + v]; v from 0 (off) to 1. hue: the turn of the colour circle is
    uniform in [-v, v]; v from 0 (off) to 0.5 (any hue). grey: probability of a clip without colour, 0 to 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a range from 0 to 1")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "turns from 0 to 0.5")
        require(0 <= self.grey <= 1, "grey", self.grey, "a probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseOptions:
    """Random erasing (Zhong et al., 2020) of boxes of the model's input.

    probability: that a clip is erased at all, 0 to 1. area: range of the erased share of a frame, divided among its boxes, within
    (0, 1). aspect: range of width/height, drawn log-uniformly. count: boxes in a frame, 1 to 16. fill: "constant" is the mean colour (0
    after normalisation), "pixel" standard normal noise for each value. cube: the same boxes in all frames, hiding a place for the
    whole clip; otherwise each frame has its own, which flicker. Noise differs from frame to frame in both.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    count: int = 1
    fill: Literal["constant", "pixel"] = "pixel"
    cube: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "probability", self.probability, "a probability")
        require(0 < self.area[0] <= self.area[1] < 1, "area", self.area, "0 < low <= high < 1")
        require(0 < self.aspect[0] <= self.aspect[1], "aspect", self.aspect, "0 < low <= high")
        require(1 <= self.count <= 16, "count", self.count, "1 to 16 boxes")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixOptions:
    """Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) inside a micro-batch; labels become shares of two classes.

    Needs two samples in a micro-batch. Label smoothing is `optimizer.label_smoothing`, applied to the mixed label.

    mixup, cutmix: alpha of the symmetric beta distribution of a clip's own share, 0.05 to 100; 0: never this one.
    switch: probability of cutmix where both are on, 0 to 1. probability: that a clip is mixed at all, 0 to 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value == 0 or 0.05 <= value <= 100, name, value, "0 (off) or an alpha from 0.05 to 100")
        require(self.mixup > 0 or self.cutmix > 0, "mixup", self.mixup, "a positive alpha here or for cutmix, or no mix section")
        require(0 <= self.switch <= 1, "switch", self.switch, "a probability")
        require(0 <= self.probability <= 1, "probability", self.probability, "a probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOptions:
    """From decoded frames to the model's input. All but size, eval_resize, mean and std is of training alone.

    size: (height and width in pixels) of the square input, 8 to 4096.
    area, aspect: ranges of the random resized crop in training, as shares of the frame's area and as width/height.
    flip: probability of a horizontal flip in training, 0 to 1. Leave it at 0 where left and right change the class, or use `flip_labels`.
    flip_labels: pairs of class names, each name in one pair at most; a flipped clip of a class has the label of the other of its pair.
    repeats: views of each sample in a micro-batch, made with their own crop, flip and further draws from one decode; divides
        train.micro_batch and with it train.global_batch, which count views. 1 to 64.
    randaugment, jitter, erase, mix: sections of their own; without them nothing of the kind happens. The order is crop, flip and resize,
        RandAugment, jitter, normalisation, erasing, mixing.
    eval_resize: in evaluation the shorter side is resized to this, then the centre is cropped; None: to `size`.
    mean, std: per RGB channel, for pixels in 0 to 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    flip_labels: tuple[tuple[str, str], ...] = ()
    repeats: int = 1
    randaugment: RandAugmentOptions | None = None
    jitter: JitterOptions | None = None
    erase: EraseOptions | None = None
    mix: MixOptions | None = None
    eval_resize: int | None = None
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)

    def __post_init__(self) -> None:
        require(8 <= self.size <= 4096, "size", self.size, "8 to 4096 pixels")
        require(0 < self.area[0] <= self.area[1] <= 1, "area", self.area, "0 < low <= high <= 1")
        require(0 < self.aspect[0] <= self.aspect[1], "aspect", self.aspect, "0 < low <= high")
        require(0 <= self.flip <= 1, "flip", self.flip, "a probability")
        names = [name for pair in self.flip_labels for name in pair]
        require(len(names) == len(set(names)), "flip_labels", self.flip_labels, "pairs of two classes, each class in one pair at most")
        require(1 <= self.repeats <= 64, "repeats", self.repeats, "1 to 64 views")
        require(self.eval_resize is None or self.eval_resize >= self.size, "eval_resize", self.eval_resize, "at least size")
        require(min(self.std) > 0, "std", self.std, "positive numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """How a dataset at a URL (s3://, gs://, …) is read. Nothing here changes what is read.

    cache_dir: folder on this machine's own disk for the index and for videos that were read, shared by all its processes; absolute, or
        below ~. cache_gib: what the cache may take; datasets that nobody reads make room, the least recently used first, and what does
        not fit is read from the store each time. requests: that one rank has in flight at most, 1 to 256. retries: of a request that
        failed, after 0.2 s, then after twice as long each time, up to 10 s. timeout_s: of one request.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    cache_dir: str = "~/.cache/posmlp-video"
    cache_gib: float = 64.0
    requests: int = 32
    retries: int = 8
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        require(self.cache_dir.startswith(("/", "~/")), "cache_dir", self.cache_dir, "an absolute path, or one below ~/")
        require(self.cache_gib > 0, "cache_gib", self.cache_gib, "a positive number")
        require(1 <= self.requests <= 256, "requests", self.requests, "1 to 256")
        require(0 <= self.retries <= 100, "retries", self.retries, "0 to 100")
        require(0 < self.timeout_s <= 3600, "timeout_s", self.timeout_s, "seconds in (0, 3600]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How one rank reads and decodes.

    decode: "cpu" (PyAV), "nvdec" (DALI on the GPU), "auto" (nvdec where the rank's device has it).
    threads: decoding threads of one rank; 0: the cores of this machine divided by the ranks on it.
    prefetch_mib: bound on decoded clips that wait for the model; one micro-batch always may.
    max_damaged: share of the samples seen (at least one sample) that may be replaced before training stops.
    slow_read_s: a read that takes longer is said on standard error, with rank, shard, key and offset; 0: never.
    remote: section for datasets at a URL.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN
    decode: Literal["auto", "nvdec", "cpu"] = "auto"
    threads: int = 0
    prefetch_mib: int = 1024
    max_damaged: float = 0.001
    slow_read_s: float = 30.0
    remote: RemoteOptions = RemoteOptions()

    def __post_init__(self) -> None:
        require(0 <= self.threads <= 256, "threads", self.threads, "0 to 256")
        require(self.prefetch_mib >= 1, "prefetch_mib", self.prefetch_mib, "at least 1")
        require(0 <= self.max_damaged <= 1, "max_damaged", self.max_damaged, "a share from 0 to 1")
        require(self.slow_read_s >= 0, "slow_read_s", self.slow_read_s, "seconds, or 0")
