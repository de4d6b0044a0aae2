"""Pixel truth through the whole loader: in every sampling mode, from every decoder, a clip shows the frames that its parameters name."""

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.index import Dataset
from pipeline.keyed import eval_views
from pipeline.loader import Batch, Decoder, Loader
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
from pipeline.requests import eval_requests, train_requests
from tests.pipeline.numbered import H264, HEIGHT, MJPEG, VP9, WIDTH, Stream, Video, encode, read_number, write_dataset

SIDE, NUM = 96, 50  # a square that a crop of all of it shows as it is
WHOLE = AugmentOptions(size=SIDE, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
MODES = {
    "dense": ClipOptions(num_frames=6, stride=5),
    "dense in seconds": ClipOptions(num_frames=6, stride_s=0.15),
    "dense, longer than the video": ClipOptions(num_frames=16, stride=7),
    "segment": ClipOptions(num_frames=6, sampling="segment"),
    "uniform": ClipOptions(num_frames=6, sampling="uniform"),
}
SOURCES: dict[str, tuple[Stream, str, Decoder]] = {
    "h264, B-frames": (Stream(options={**H264.options, "preset": "medium", "bf": "3", "g": "24"}), "h264", "pyav"),
    "h264, variable rate": (Stream(options=H264.options, times=[i + i * i // 9 for i in range(NUM)]), "h264", "pyav"),
    "vp9 in PyAV": (VP9, "vp9", "pyav"),
    "vp9 in DALI": (VP9, "vp9", "dali"),
    "mjpeg in DALI": (MJPEG, "mjpeg", "dali"),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """Two videos of each kind; the second is a window of its file."""
    found = {}
    for number, (name, (stream, codec, _)) in enumerate(SOURCES.items()):
        videos = [
            Video(data=encode(NUM, stream, first=100 * row, width=SIDE, height=SIDE), num_frames=NUM - 7 * row, begin=7 * row, width=SIDE,
                  height=SIDE, codec=codec) for row in range(2)
        ]  # fmt: skip
        found[name] = write_dataset(tmp_path_factory.mktemp("truth") / str(number), videos)
    return found


def loaded(dataset: Dataset, clip: ClipOptions, decoder: Decoder, *, training: bool) -> list[Batch]:
    rows = dataset.rows("split", "train")
    shared = {"micro_batch": 2, "rank": 0, "world_size": 1, "clip": clip, "augment": WHOLE}
    if training:
        requests = train_requests(dataset, rows, seed=3, global_batch=4, start_step=0, end_step=2, **shared)  # type: ignore[arg-type]
    else:
        clips = 1 if clip.sampling == "uniform" else 3
        requests = eval_requests(dataset, rows, views=eval_views(clips, 1, False), **shared)  # type: ignore[arg-type]
    with Loader(
        dataset, requests, micro_batch=2, clip=clip, augment=WHOLE, options=LoaderOptions(), threads=2,
        on_damage="substitute" if training else "report", decoder=decoder,
    ) as loader:  # fmt: skip
        return list(loader)


def levels(batch: Batch, slot: int) -> npt.NDArray[np.float64]:
    """(T, H, W, 3), 0 to 255."""
    mean, std = np.array(WHOLE.mean), np.array(WHOLE.std)
    return np.asarray(255 * (batch.clips[slot].numpy().transpose(1, 2, 3, 0).astype(np.float64) * std + mean))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_clip_shows_the_frames_that_it_names(datasets: dict[str, Dataset], source: str, mode: str, training: bool) -> None:
    dataset, decoder, seen = datasets[source], SOURCES[source][2], 0
    for batch in loaded(dataset, MODES[mode], decoder, training=training):
        assert not batch.damaged
        for slot in np.flatnonzero(batch.valid).tolist():
            row = int(batch.keys[slot].removeprefix("video-"))
            expected = (100 * row + dataset.item(row).begin + batch.parameters[slot].frames).tolist()
            assert [read_number(frame[:HEIGHT, :WIDTH]) for frame in levels(batch, slot)] == expected
            seen += 1
    assert seen == (8 if training else 2 if MODES[mode].sampling == "uniform" else 6)


def test_decoders_agree_on_every_pixel(datasets: dict[str, Dataset]) -> None:
    """VP9 has one right result before colours are converted; the conversions differ by their rounding."""
    pairs = zip(*(loaded(datasets["vp9 in DALI"], MODES["segment"], decoder, training=True) for decoder in ("pyav", "dali")), strict=True)
    apart = [np.abs(levels(a, slot) - levels(b, slot)) for a, b in pairs for slot in range(2)]
    assert max(each.max() for each in apart) <= 6.0
    assert max(each.mean() for each in apart) <= 1.5
