"""Which videos are the same: no pair is missed by the grid, digests survive encoding again, and other videos have others."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import duplicates, likeness
from pipeline.duplicates import alike, groups_of
from pipeline.likeness import CONTENT_BYTES, SOURCE_BYTES, STILL_BYTES, Likeness, source_digest
from pipeline.media import verify_and_transcode, write_video
from pipeline.options import EncodeOptions, LimitOptions


def plain_groups(equal: npt.NDArray[np.bool_]) -> list[int]:
    """The smallest row that is reached by equal pairs, by brute force."""
    reach = equal | np.eye(len(equal), dtype=np.bool_)
    for _ in range(len(equal)):
        reach = reach @ reach
    return [int(np.flatnonzero(row)[0]) for row in reach]


def plain_alike(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    """By the definition in words."""
    still = np.abs(a[:STILL_BYTES].astype(float) - b[:STILL_BYTES]).mean()
    moves = [each[STILL_BYTES:].view(np.int8).astype(float) / likeness.STEPS for each in (a, b)]
    moving = (np.abs(moves[0]).mean() + np.abs(moves[1]).mean()) / 2
    return bool(still <= duplicates.STILL and np.abs(moves[0] - moves[1]).mean() <= duplicates.MOTION * moving + duplicates.NOISE + 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 30), spread=st.sampled_from([3, 4, 6]))
def test_no_pair_is_missed(seed: int, num: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, num)
    base = rng.integers(60, 120, (4, CONTENT_BYTES))
    values = (base[kinds] + rng.integers(-spread, spread + 1, (num, CONTENT_BYTES))).astype(np.uint8)
    values[:, STILL_BYTES:] = (base[kinds, STILL_BYTES:] + rng.integers(-1, 2, (num, CONTENT_BYTES - STILL_BYTES))).astype(np.uint8)
    equal = np.array([[plain_alike(a, b) for b in values] for a in values])
    assert alike(values).tolist() == plain_groups(equal)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(0, 40))
def test_groups_join_bytes_and_content(seed: int, num: int) -> None:
    rng = np.random.default_rng(seed)
    sources = rng.integers(0, 12, (num, 1)).astype(np.uint8).repeat(SOURCE_BYTES, axis=1)
    contents = (20 * rng.integers(0, 12, (num, 1))).astype(np.uint8).repeat(CONTENT_BYTES, axis=1)
    known = rng.random(num) < 0.8
    equal = (sources[:, None, 0] == sources[None, :, 0]) | (contents[:, None, 0] == contents[None, :, 0])
    equal &= known[:, None] & known[None, :]
    first = plain_groups(equal)
    expected = [first[row] if first.count(first[row]) > 1 and known[row] else -1 for row in range(num)]
    assert groups_of(sources, contents, known).tolist() == expected


def scene(seed: int, speed: float = 1.0) -> Iterator[npt.NDArray[np.uint8]]:
    """A bright square over a grey background, drawn by `seed`; `speed` is the square's own."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(40, 180, (6, 8, 1)).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1).repeat(3, axis=2)
    for number in range(24):
        frame = picture.copy()
        x = int(8 + 3 * speed * number) % 90
        frame[30:60, x : x + 30] = 250
        yield frame


def content(source: Path, folder: Path) -> npt.NDArray[np.uint8]:
    report = verify_and_transcode(source, folder / "out.mp4", EncodeOptions(short_side=96), LimitOptions())
    return np.frombuffer(bytes.fromhex(report.content), np.uint8)


def test_encoding_again_is_alike_and_other_videos_are_not(tmp_path: Path) -> None:
    first, other, still = (tmp_path / name for name in ("first.mp4", "other.mp4", "moves.mp4"))
    write_video(first, scene(1), 25.0, EncodeOptions(crf=18))
    write_video(other, scene(2), 25.0, EncodeOptions(crf=18))
    write_video(still, scene(1, speed=0.4), 25.0, EncodeOptions(crf=18))  # the same place, and something else happens in it
    again, small = tmp_path / "again.mkv", tmp_path / "small.avi"
    for path, codec, size in ((again, "libx264", (128, 96)), (small, "mpeg4", (96, 72))):
        with av.open(str(first)) as source, av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.bit_rate = 400_000
            for frame in source.decode(video=0):
                out.mux(stream.encode(frame.reformat(*size)))
            out.mux(stream.encode(None))
    values = np.stack([content(path, tmp_path) for path in (first, other, still, again, small)])
    assert alike(values).tolist() == [0, 1, 2, 0, 0]


def test_the_digest_of_a_file_is_of_its_bytes_and_of_the_part() -> None:
    def digest(data: bytes, start_s: float | None = None, end_s: float | None = None) -> bytes:
        return source_digest(io.BufferedReader(io.BytesIO(data)), start_s, end_s)  # type: ignore[arg-type]

    assert digest(b"a") == digest(b"a")
    assert len({digest(b"a"), digest(b"b"), digest(b"a", 1.0), digest(b"a", None, 1.0), digest(b"a", 1.0, 2.0)}) == 5


def test_a_video_of_one_frame_has_a_digest_without_motion() -> None:
    seen = Likeness()
    seen.add(np.full((16, 24), 77, dtype=np.uint8))
    assert seen.digest() == bytes([77] * STILL_BYTES + [0] * (CONTENT_BYTES - STILL_BYTES))


def test_tables_keep_what_is_not_known(tmp_path: Path) -> None:
    unknown = pa.table([pa.nulls(2, field.type) for field in duplicates.COLUMNS], schema=pa.schema(duplicates.COLUMNS))
    rows = [{"bytes": bytes([i] * SOURCE_BYTES), "content": bytes([90 * i] * CONTENT_BYTES)} for i in (1, 2, 1)]
    with (tmp_path / "likeness.arrow").open("wb") as file:
        duplicates.write_table(file, [unknown, pa.Table.from_pylist(rows, schema=pa.schema(duplicates.COLUMNS))])
    table = duplicates.read_table(tmp_path / "likeness.arrow")
    assert table is not None
    assert table.column("group").to_pylist() == [-1, -1, 2, -1, 2]
    assert table.column("content").null_count == 2
