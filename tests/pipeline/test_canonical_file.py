"""What is canonical already is copied, byte for byte, after all of it was decoded; what only looks like it is encoded again."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet

from pipeline.media import MediaReport, verify_and_transcode, write_video
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.segments import cut_evenly

FORMS = {
    "plain": EncodeOptions(gop=8),
    "layered": EncodeOptions(gop=8, form="layered"),
    "another quality": EncodeOptions(gop=8, crf=30),
    "another tune": EncodeOptions(gop=8, tune="film"),
    "longer groups": EncodeOptions(gop=12),
}


def transcode(source: Path, out: Path, options: EncodeOptions, **change: float) -> MediaReport:
    return verify_and_transcode(source, out, options, LimitOptions(), **change)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same video in each form: 45 frames at 25 per second, of drifting noise, which no encoder gives back as it was."""
    folder = tmp_path_factory.mktemp("canonical")
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    write_video(folder / "source.mp4", (noise[:64, 3 * i : 3 * i + 96] for i in range(45)), 25, EncodeOptions(crf=10))
    made = {name: folder / f"{name}.mp4" for name in FORMS}
    for name, options in FORMS.items():
        transcode(folder / "source.mp4", made[name], options)
    return made


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_copied_where_it_is_asked_for_and_nowhere_else(videos: dict[str, Path], name: str, tmp_path: Path) -> None:
    for other, options in FORMS.items():
        report = transcode(videos[name], tmp_path / "out.mp4", options)
        assert ((tmp_path / "out.mp4").read_bytes() == videos[name].read_bytes()) == (name == other), other
        assert (report.num_frames, report.source_frames, report.fps, report.size) == (45, 45, 25.0, (tmp_path / "out.mp4").stat().st_size)


@pytest.mark.parametrize("name", ["plain", "layered"])
def test_windows_of_a_long_video_are_copied_too(videos: dict[str, Path], name: str, tmp_path: Path) -> None:
    count = 0
    for num_frames in cut_evenly(videos[name], tmp_path / "window.mp4", 2):
        assert transcode(tmp_path / "window.mp4", tmp_path / "out.mp4", FORMS[name]).num_frames == num_frames
        assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "window.mp4").read_bytes()
        count += 1
    assert count == 3


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (EncodeOptions(gop=8, short_side=48), {}),
        (EncodeOptions(gop=8, fps=12.5), {}),
        (EncodeOptions(gop=8), {"start_s": 0.0}),
        (EncodeOptions(gop=8), {"end_s": 100.0}),
    ],
)
def test_what_has_to_change_is_encoded(videos: dict[str, Path], options: EncodeOptions, change: dict[str, float], tmp_path: Path) -> None:
    transcode(videos["plain"], tmp_path / "out.mp4", options, **change)
    assert (tmp_path / "out.mp4").read_bytes() != videos["plain"].read_bytes()


def test_a_stated_rate_that_it_has_changes_nothing(videos: dict[str, Path], tmp_path: Path) -> None:
    transcode(videos["plain"], tmp_path / "out.mp4", EncodeOptions(gop=8, fps=25.0))
    assert (tmp_path / "out.mp4").read_bytes() == videos["plain"].read_bytes()


def muxed(path: Path, out: Path, *, metadata: dict[str, str] | None = None, late: int = -1, keyframe: int = -1, drop: int = -1) -> None:
    """The packets again. late: a packet whose times are half a frame off; keyframe: one marked as such; drop: one left out."""
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path)) as source, av.open(str(out), "w", format="mp4", options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        container.metadata.update(metadata or {})
        packets = [packet for packet in source.demux(stream) if packet.size]
        origin = packets[0].pts or 0
        for number, packet in enumerate(packets):
            if number == drop:
                continue
            ours = Packet(bytes(packet))
            off = int(Fraction(1, 50) / (stream.time_base or 1)) if number == late else 0
            ours.pts, ours.dts, ours.time_base = (packet.pts or 0) - origin + off, (packet.dts or 0) - origin, stream.time_base
            ours.duration, ours.is_keyframe, ours.stream = packet.duration, packet.is_keyframe or number == keyframe, copy
            container.mux(ours)


@pytest.mark.parametrize("kind", ["as it was", "title", "late", "keyframe", "dropped", "longer"])
def test_what_only_looks_like_it_is_encoded(videos: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Every one of them opens, and decodes without an error."""
    source, plain = tmp_path / "in.mp4", videos["plain"]
    changes: dict[str, dict] = {
        "title": {"metadata": {"title": "x"}},
        "late": {"late": 44},
        "keyframe": {"keyframe": 4},
        "dropped": {"drop": 44},  # the last group is shorter by one: as our encoder would have made it
    }
    muxed(plain, source, **changes.get(kind, {}))
    if kind == "longer":
        source.write_bytes(source.read_bytes() + bytes(8) + b"free")
    report = transcode(source, tmp_path / "out.mp4", FORMS["plain"])
    assert ((tmp_path / "out.mp4").read_bytes() == source.read_bytes()) == (kind in ("as it was", "dropped"))
    assert report.num_frames == (44 if kind == "dropped" else 45)


def test_a_canonical_video_is_decoded_all_the_same(videos: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(videos["plain"].read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (tmp_path / "in.mp4").write_bytes(data)
    with pytest.raises(RejectedError) as caught:
        transcode(tmp_path / "in.mp4", tmp_path / "out.mp4", FORMS["plain"])
    assert caught.value.reason == Reason.DAMAGED
