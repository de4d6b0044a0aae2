"""Folders of numbered pictures as videos, pictures as items: every frame once and in order, true colours, mistakes named."""

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.frame_folder import series_of
from pipeline.manifest import read_manifest
from pipeline.media import verify_and_transcode
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from tests.pipeline.numbered import number_image
from tests.pipeline.test_manifest import touch
from tests.pipeline.test_media import frames_of, numbers_of

ENCODE, LIMITS = EncodeOptions(gop=8, frames_fps=12.5), LimitOptions()


def png(pixels: npt.NDArray[np.uint8], palette: bytes = b"") -> bytes:
    """A PNG of (H, W, 3) RGB, (H, W, 4) RGBA, (H, W) grey, or (H, W) places in a palette."""
    height, width = pixels.shape[:2]
    kind = 3 if palette else {2: 0, 3: 2, 4: 6}[pixels.ndim if pixels.ndim == 2 else pixels.shape[2]]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if palette:
        chunks.insert(1, (b"PLTE", palette))
    parts = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    context = av.CodecContext.create("mjpeg", "w")
    context.height, context.width, context.pix_fmt = *pixels.shape[:2], "yuvj420p"  # type: ignore[attr-defined]
    context.options = {"q:v": "2"}
    context.time_base = 1  # type: ignore[assignment]
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])  # type: ignore[attr-defined]


def numbered_folder(folder: Path, numbers: range, name: str = "{:05d}.png") -> Path:
    """Frames whose pixels carry the number in their names."""
    folder.mkdir(parents=True)
    for number in numbers:
        picture = png if name.endswith("png") else jpeg
        (folder / name.format(number)).write_bytes(picture(number_image(number)))
    return folder


def rejected(source: Path, limits: LimitOptions = LIMITS, num_frames: int | None = None) -> tuple[Reason, str]:
    with pytest.raises(RejectedError) as caught:
        verify_and_transcode(source, source.parent / "out.mp4", ENCODE, limits, num_frames=num_frames)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(("name", "start"), [("{:05d}.png", 1), ("{}.jpg", 98), ("img_{:06d}.JPG", 0)])
def test_every_frame_once_and_in_order(tmp_path: Path, name: str, start: int) -> None:
    numbers = range(start, start + 11)
    folder, out = numbered_folder(tmp_path / "a.b", numbers, name), tmp_path / "out.mp4"
    (folder / "notes.txt").write_text("not a frame")
    for place in numbers:
        (folder / f"flow_x_{place:05d}.jpg").write_bytes(b"optical flow")
    with MediaWorker(ENCODE, LIMITS) as worker:  # in the limited child
        report = worker.transcode(folder, out, num_frames=11)
    assert numbers_of(out) == list(numbers)
    assert (report.num_frames, report.fps, report.source.container, report.source.header_frames) == (11, 12.5, "frames", 11)
    assert report.source.size == sum((folder / name.format(number)).stat().st_size for number in numbers)
    first = out.read_bytes()
    verify_and_transcode(folder, out, ENCODE, LIMITS, num_frames=11)
    assert out.read_bytes() == first
    verify_and_transcode(folder, out, ENCODE, LIMITS, start_s=0.16, end_s=0.4)
    assert numbers_of(out) == list(numbers)[2:5]


@given(
    prefix=st.sampled_from(["", "img_", "frame 2-"]), start=st.integers(0, 10**6), count=st.integers(1, 30), width=st.integers(1, 8),
    lost=st.sets(st.integers(1, 28), max_size=3), shuffle=st.randoms(use_true_random=False),
)  # fmt: skip
def test_numbers_decide(prefix: str, start: int, count: int, width: int, lost: set[int], shuffle: object) -> None:
    names = [f"{prefix}{start + place:0{width}d}.jpg" for place in range(count) if place not in lost or place >= count - 1]
    mixed = [*names, "cover.jpg", "audio1.wav"]
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    series = series_of(mixed)
    assert series.names == names
    assert bool(series.problem) == (len(names) < count)


def test_what_is_no_whole_video_is_said(tmp_path: Path) -> None:
    folder = numbered_folder(tmp_path / "a", range(1, 9))
    assert rejected(folder, num_frames=9) == (Reason.FRAMES_MISSING, "the folder has 8 frames, 9 were listed")
    assert rejected(folder, LimitOptions(max_frames=7)) == (Reason.TOO_MANY_FRAMES, "8 frames, limits.max_frames is 7")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert rejected(folder, LimitOptions(max_bytes=size - 1))[0] == Reason.TOO_MANY_BYTES
    for name in ("00001.png", "00001.jpg"):
        many = tmp_path / name
        many.write_bytes((png if name.endswith("png") else jpeg)(number_image(1)))
        assert rejected(many, LimitOptions(max_pixels=96 * 64 - 1))[0] == Reason.TOO_MANY_PIXELS
    (folder / "00003.png").rename(folder / "3.png")
    assert len(series_of(os.listdir(folder)).names) == 8  # a number's width is of no importance
    (folder / "00003.jpg").write_bytes(b"")
    assert rejected(folder) == (Reason.FRAMES_MISSING, "number 3 is there twice: 00003.jpg, 3.png")
    (folder / "00003.jpg").unlink()
    (folder / "3.png").unlink()
    assert rejected(folder) == (Reason.FRAMES_MISSING, "no picture has number 3; 1 gaps in all")
    whole = (folder / "00004.png").read_bytes()
    (folder / "00003.png").write_bytes(whole[: len(whole) // 2])
    assert rejected(folder)[0] == Reason.DAMAGED
    assert rejected(folder)[1].startswith("00003.png: ")
    (folder / "00003.png").write_bytes(png(number_image(3, 112, 64)))
    assert rejected(folder) == (Reason.FRAMES_DIFFER, "00003.png: 112x64 pixels, the first frame has 96x64")
    (folder / "00003.png").write_bytes(b"#EXTM3U\n/etc/passwd\n")
    assert rejected(folder) == (Reason.NOT_A_VIDEO, "00003.png: neither JPEG nor PNG")
    (folder / "00003.png").unlink()
    (folder / "00003.png").symlink_to(folder / "00004.png")
    assert rejected(folder) == (Reason.UNREADABLE, "00003.png is not a regular file")
    (folder / "mask_00003.png").write_bytes(whole)
    assert rejected(folder) == (Reason.FRAMES_MISSING, "2 series of pictures, whose names begin with '', 'mask_'")
    (tmp_path / "empty").mkdir()
    assert rejected(tmp_path / "empty")[0] == Reason.NO_FRAMES
    with pytest.raises(RejectedError, match="frames_fps"):
        verify_and_transcode(folder, tmp_path / "out.mp4", EncodeOptions(), LIMITS)


def test_one_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    grey = np.full((64, 96), 200, np.uint8)
    colour = np.full((64, 96, 3), (200, 50, 100), np.uint8)
    clear = np.concatenate([colour, np.full((64, 96, 1), 9, np.uint8)], axis=2)
    pictures = {
        "grey.png": (png(grey), (200, 200, 200)),
        "rgb.png": (png(colour), (200, 50, 100)),
        "rgba.png": (png(clear), (200, 50, 100)),
        "palette.png": (png(np.ones((64, 96), np.uint8), palette=bytes([0, 0, 0, 200, 50, 100])), (200, 50, 100)),
        "a.jpeg": (jpeg(colour), (200, 50, 100)),
        "named wrongly.jpg": (png(colour), (200, 50, 100)),
    }
    for name, (data, rgb) in pictures.items():
        (tmp_path / name).write_bytes(data)
        report = verify_and_transcode(tmp_path / name, tmp_path / "out.mp4", EncodeOptions(), LIMITS)
        (frame,) = frames_of(tmp_path / "out.mp4")
        assert (report.num_frames, report.source.container) == (1, "image")
        assert np.abs(frame.astype(int) - rgb).max() <= 4, (name, frame[0, 0])
    (tmp_path / "link.png").symlink_to(tmp_path / "rgb.png")
    assert verify_and_transcode(tmp_path / "link.png", tmp_path / "out.mp4", EncodeOptions(), LIMITS).num_frames == 1
    assert rejected(tmp_path / "gone.png")[0] == Reason.MISSING
    os.mkfifo(tmp_path / "pipe.png")
    assert rejected(tmp_path / "pipe.png") == (Reason.UNREADABLE, "pipe.png is not a regular file")  # and nobody waits for a writer
    (tmp_path / "no.png").write_bytes(b"GIF89a")
    assert rejected(tmp_path / "no.png") == (Reason.NOT_A_VIDEO, "no.png: neither JPEG nor PNG")


def test_folders_tell_frames_from_images(tmp_path: Path) -> None:
    frames = touch(tmp_path / "frames", [f"run/{video}/{n}.jpg" for video in "ab" for n in range(3)] + ["jump/c/x/7.png"])
    manifest = read_manifest(frames, None)
    assert [(source.path, source.label, source.num_frames, source.size) for source in manifest.sources] == [
        ("jump/c/x", "jump", 1, 5),
        ("run/a", "run", 3, 15),
        ("run/b", "run", 3, 15),
    ]
    assert manifest.format == "class folders of videos as folders of numbered pictures (data.format=frames)"
    images = touch(tmp_path / "images", ["train/run/a1.jpg", "val/run/1.jpg", "val/jump/b.JPEG"])
    manifest = read_manifest(images, None)
    assert [(source.path, source.splits, source.num_frames) for source in manifest.sources] == [
        ("train/run/a1.jpg", ("train",), None),
        ("val/jump/b.JPEG", ("val",), None),
        ("val/run/1.jpg", ("val",), None),
    ]
    touch(images, ["val/run/deep/1.jpg"])
    with pytest.raises(ManifestError, match=r"data\.format=images"):
        read_manifest(images, None)
    assert len(read_manifest(images, None, format="images").sources) == 4
    labels = tmp_path / "list.txt"
    labels.write_text("run/a 3 0\njump/c/x 2 1\n")
    manifest = read_manifest(frames, labels)
    assert [(source.key, source.num_frames) for source in manifest.sources] == [("jump/c/x", 2), ("run/a", 3)]
    for stated, files in (("frames", labels), ("csv", None)):
        with pytest.raises(ManifestError, match=f"data.format={stated}"):
            read_manifest(frames, files, format=stated)
