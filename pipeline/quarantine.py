"""Why a video is not in the dataset: the closed list of reasons, with a text for the person who has to act on it."""

from enum import StrEnum

MIN_SIDE = 16  # pixels of a side; smaller videos are refused
MAX_STREAMS = 64  # of video, sound, subtitles and data in one file


class Reason(StrEnum):
    """Why a video is not in the dataset. The value is what the quarantine list shows; `text` explains it."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    READ_FAILED = "read_failed"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_A_VIDEO = "not_a_video"
    TOO_MANY_STREAMS = "too_many_streams"
    NO_VIDEO_STREAM = "no_video_stream"
    UNSUPPORTED_CODEC = "unsupported_codec"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_FRAMES = "too_many_frames"
    NO_FRAMES = "no_frames"
    FRAMES_MISSING = "frames_missing"
    FRAMES_DIFFER = "frames_differ"
    ENCRYPTED = "encrypted"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    OUT_OF_MEMORY = "out_of_memory"
    CPU_TIME = "cpu_time"
    WALL_TIME = "wall_time"
    CRASHED = "crashed"
    ENCODER_FAILED = "encoder_failed"
    KEYFRAME_OUTSIDE = "keyframe_outside"
    BOX_OUTSIDE = "box_outside"

    @property
    def text(self) -> str:
        return _REASON_TEXTS[self]


_REASON_TEXTS = {
    Reason.MISSING: "the label file names it, the videos folder does not have it",
    Reason.UNREADABLE: "the file system does not let us read it; once it does, the same build command tries it again",
    Reason.READ_FAILED: "the storage failed while it was read; the same build command tries it again",
    Reason.TOO_MANY_BYTES: "the file is larger than limits.max_bytes",
    Reason.NOT_A_VIDEO: "no video container that we open: text, an image list, a playlist, or a damaged header",
    Reason.TOO_MANY_STREAMS: f"it has more than {MAX_STREAMS} streams of video, sound, subtitles and data",
    Reason.NO_VIDEO_STREAM: "it holds sound or subtitles, but no video",
    Reason.UNSUPPORTED_CODEC: "there is no decoder for its video",
    Reason.TOO_SMALL: f"a side has less than {MIN_SIDE} pixels",
    Reason.TOO_MANY_PIXELS: "a frame has more than limits.max_pixels",
    Reason.TOO_MANY_FRAMES: "it has more frames than limits.max_frames",
    Reason.NO_FRAMES: "not one frame decodes (empty, encrypted, only headers, or nothing in the wanted time window)",
    Reason.FRAMES_MISSING: "the numbers of a folder's pictures have gaps or doubles, or they are not as many as listed",
    Reason.FRAMES_DIFFER: "the pictures of a folder have different sizes",
    Reason.ENCRYPTED: "its frames are encrypted (DRM), and there is no key",
    Reason.TRUNCATED: "the file ends before frames that its header lists, as after a broken download",
    Reason.DAMAGED: "the decoder reports damaged data; the detail says at which frame",
    Reason.OUT_OF_MEMORY: "decoding it needs more than limits.memory_mib",
    Reason.CPU_TIME: "decoding and encoding it takes more than limits.cpu_s",
    Reason.WALL_TIME: "decoding and encoding it takes more than limits.wall_s",
    Reason.CRASHED: "the decoding process crashed on it",
    Reason.ENCODER_FAILED: "it decodes, but the encoder refused its frames",
    Reason.KEYFRAME_OUTSIDE: "a keyframe's time or number lies outside the video, which is used without it",
    Reason.BOX_OUTSIDE: "a keyframe has a box that lies outside the frame, or has no area in it; the video is used without it",
}


TRIED_AGAIN = frozenset({Reason.MISSING, Reason.UNREADABLE, Reason.READ_FAILED})  # these say nothing about the video itself


class RejectedError(Exception):
    """This video cannot be in the dataset. `detail` holds facts, no paths, so that quarantine lists of equal builds are equal."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail or reason.text}")
        self.reason = reason
        self.detail = detail
