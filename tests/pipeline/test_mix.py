"""Mixup and cutmix: equal to a plain NumPy reference, inside a micro-batch, the same for any ranks; and views of one decode."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import RecipeError
from jobs.recipe import parse_overrides
from model.objective import cross_entropy
from pipeline import software_decode
from pipeline.augment_mix import mix_clips, mixed_targets
from pipeline.augmentation import Mix, draw_mix, symmetric_beta
from pipeline.errors import PipelineError
from pipeline.index import Dataset
from pipeline.keyed import Purpose, words
from pipeline.loader import Batch, Loader
from pipeline.options import AugmentOptions, ClipOptions, EraseOptions, JitterOptions, LoaderOptions, MixOptions, RandAugmentOptions
from pipeline.requests import MicroBatchRequest, eval_requests, train_requests
from tests.pipeline.numbered import MJPEG, Video, encode, flip_byte, write_dataset

CLIP = ClipOptions(num_frames=4, stride=2)
PLAIN = AugmentOptions(size=32)
EVERYTHING = AugmentOptions(
    size=32,
    repeats=2,
    randaugment=RandAugmentOptions(),
    jitter=JitterOptions(hue=0.1, grey=0.2),
    erase=EraseOptions(probability=0.5),
    mix=MixOptions(),
)
MICRO, GLOBAL = 4, 16


def reference(clips: npt.NDArray[np.float32], labels: list[int], mix: Mix, num_classes: int) -> tuple[npt.NDArray[np.float64], ...]:
    """Pixel by pixel, class by class."""
    mixed, targets = clips.astype(np.float64), np.zeros((len(clips), num_classes))
    for i, (partner, share, box) in enumerate(zip(mix.partners, mix.shares, mix.boxes, strict=True)):
        if box is None:
            mixed[i] = share * clips[i] + (1 - share) * clips[partner]
        else:
            y0, x0, y1, x1 = box
            for y, x in itertools.product(range(y0, y1), range(x0, x1)):
                mixed[i, :, :, y, x] = clips[partner, :, :, y, x]
        targets[i, labels[i]] += share
        targets[i, labels[int(partner)]] += 1 - share
    return mixed, targets


@pytest.mark.parametrize("options", [MixOptions(), MixOptions(mixup=0), MixOptions(cutmix=0), MixOptions(probability=0.5)])
@pytest.mark.parametrize("views", [1, 2])
def test_mixing_equals_the_reference(options: MixOptions, views: int) -> None:
    clips = torch.randn(8, 3, 2, 16, 16)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 2])
    for first in range(0, 80, 8):
        mix = draw_mix(options, 16, np.arange(first, first + 8 // views).repeat(views), views=views, seed=7)
        mixed, targets = reference(clips.numpy(), labels.tolist(), mix, 5)
        tested = clips.clone()
        mix_clips(tested, mix)
        assert np.abs(tested.numpy() - mixed).max() < 1e-6
        assert np.abs(mixed_targets(labels, mix, 5).numpy() - targets).max() < 1e-6


def test_label_smoothing_counts_once() -> None:
    """(1 - s) * mixed + s / K, written out."""
    mix = draw_mix(MixOptions(), 16, np.arange(4), views=1, seed=1)
    labels, logits = torch.tensor([0, 1, 2, 1]), torch.randn(4, 3)
    _, targets = reference(np.zeros((4, 3, 1, 16, 16), dtype=np.float32), labels.tolist(), mix, 3)
    smooth = 0.9 * targets + 0.1 / 3
    expected = -(smooth * logits.double().log_softmax(1).numpy()).sum(1).mean()
    assert float(cross_entropy(logits, mixed_targets(labels, mix, 3), 0.1)) == pytest.approx(expected, abs=1e-6)


def test_training_minimises_against_the_mixed_targets(dataset: Dataset) -> None:
    from jobs.train import _loss

    batch = load(dataset, replace(PLAIN, mix=MixOptions()))[0]
    assert batch.targets is not None
    logits = torch.randn(MICRO, batch.targets.shape[1])
    loss = _loss(0.1, lambda clips: logits, batch)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(float(cross_entropy(logits, batch.targets, 0.1)))
    assert float(loss) != pytest.approx(float(cross_entropy(logits, batch.labels, 0.1)))


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(2, 12), views=st.integers(1, 3), seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40))
def test_partners_are_other_samples(samples: int, views: int, seed: int, first: int) -> None:
    mix = draw_mix(MixOptions(), 32, np.arange(first, first + samples).repeat(views), views=views, seed=seed)
    assert sorted(mix.partners.tolist()) == list(range(samples * views))
    assert (mix.partners // views != np.arange(samples * views) // views).all()
    for share, box in zip(mix.shares, mix.boxes, strict=True):
        assert 0 <= share <= 1
        if box is not None:
            y0, x0, y1, x1 = box
            assert 0 <= y0 <= y1 <= 32
            assert 0 <= x0 <= x1 <= 32
            assert share == pytest.approx(1 - (y1 - y0) * (x1 - x0) / 32**2)


def test_all_partners_occur_equally() -> None:
    drawn = [draw_mix(MixOptions(), 32, np.arange(3 * i, 3 * i + 3), views=1, seed=1).partners.tolist() for i in range(600)]
    assert {tuple(partners) for partners in drawn} == {(1, 2, 0), (2, 0, 1)}
    assert 240 < sum(partners == [1, 2, 0] for partners in drawn) < 360


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    values = np.array([symmetric_beta(alpha, *words(1, i, Purpose.MIX, count=2)) for i in range(20_000)])
    ours, expected = np.sort(values), np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    distance = np.abs(np.searchsorted(expected, ours) / len(expected) - np.arange(len(ours)) / len(ours)).max()
    assert distance < 0.015  # Kolmogorov and Smirnov's; 1 % of honest draws exceed it


@pytest.mark.parametrize("alpha", [0.05, 1.0, 100.0])
def test_extreme_words_give_shares(alpha: float) -> None:
    extremes = [symmetric_beta(alpha, first, second) for first in (0, 2**64 - 1) for second in (0, 2**62, 2**63, 2**64 - 1)]
    assert all(0 <= share <= 1 for share in extremes)


def test_switch_and_probability() -> None:
    mixes = [draw_mix(MixOptions(switch=0.3, probability=0.5), 64, np.arange(10 * i, 10 * i + 10), views=1, seed=1) for i in range(200)]
    untouched = np.mean([(mix.shares == 1).mean() for mix in mixes])
    cut = np.mean([np.mean([box is not None for box in mix.boxes]) for mix in mixes])
    assert untouched == pytest.approx(0.5, abs=0.04)
    assert cut == pytest.approx(0.15, abs=0.03)


# In the stream


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    videos = [Video(data=encode(20, first=100 * row, width=96, height=64), num_frames=20, width=96, height=64) for row in range(10)]
    return write_dataset(tmp_path_factory.mktemp("mix") / "d", videos)


def requests_of(dataset: Dataset, augment: AugmentOptions, **change: int) -> Iterator[MicroBatchRequest]:
    values: dict = {"seed": 5, "global_batch": GLOBAL, "micro_batch": MICRO, "rank": 0, "world_size": 1, "start_step": 0, "end_step": 2}
    return train_requests(dataset, dataset.rows("split", "train"), clip=CLIP, augment=augment, **{**values, **change})


def load(dataset: Dataset, augment: AugmentOptions, requests: Iterator[MicroBatchRequest] | None = None, **change: object) -> list[Batch]:
    values: dict = {"options": LoaderOptions(max_damaged=0.5), "threads": 2, "on_damage": "substitute", **change}
    requests = requests_of(dataset, augment) if requests is None else requests
    with Loader(dataset, requests, micro_batch=MICRO, clip=CLIP, augment=augment, **values) as loader:
        return list(loader)


def facts(batch: Batch) -> tuple[object, ...]:
    targets = None if batch.targets is None else batch.targets.numpy().tobytes()
    return batch.positions.tolist(), batch.keys, batch.labels.tolist(), targets, batch.clips.numpy().tobytes()


@pytest.fixture(scope="module")
def stream(dataset: Dataset) -> dict[tuple[int, int], tuple[object, ...]]:
    return {(batch.step, batch.micro): facts(batch) for batch in load(dataset, EVERYTHING)}


@pytest.mark.parametrize(("world_size", "start_step"), [(1, 1), (2, 0), (4, 0), (4, 1)])
def test_mixed_batches_are_equal_on_any_ranks_and_after_any_resume(
    dataset: Dataset, stream: dict[tuple[int, int], tuple[object, ...]], world_size: int, start_step: int
) -> None:
    seen = {}
    for rank in range(world_size):
        requests = requests_of(dataset, EVERYTHING, rank=rank, world_size=world_size, start_step=start_step)
        seen.update({(batch.step, batch.micro): facts(batch) for batch in load(dataset, EVERYTHING, requests, threads=1 + rank)})
    assert seen == {place: value for place, value in stream.items() if place[0] >= start_step}


def test_new_keys_move_nothing_in_the_old_stream(dataset: Dataset) -> None:
    """Frames, crops and flips are those of a recipe that has none of them."""
    augment = replace(EVERYTHING, repeats=1)
    for plain, rich in zip(requests_of(dataset, PLAIN), requests_of(dataset, augment), strict=True):
        assert plain.rows.tolist() == rich.rows.tolist()
        for one, other in zip(plain.parameters, rich.parameters, strict=True):
            assert one.as_lists() == replace(other, augmentation=None).as_lists()
            assert set(one.as_lists()) == {"frames", "roi", "flip"}


def test_what_is_off_by_probability_gives_the_plain_clips(dataset: Dataset) -> None:
    """The torch path normalises to the bit as the graph does, on the CPU."""
    silent = replace(PLAIN, randaugment=RandAugmentOptions(probability=0), erase=EraseOptions(probability=0), mix=MixOptions(probability=0))
    for plain, other in zip(load(dataset, PLAIN), load(dataset, silent), strict=True):
        assert torch.equal(plain.clips, other.clips)
        assert other.targets is not None
        assert torch.equal(other.targets.argmax(1), plain.labels)
        assert plain.targets is None


def test_evaluation_is_never_augmented(dataset: Dataset) -> None:
    def judged(augment: AugmentOptions) -> list[Batch]:
        rows = dataset.rows("split", "train")
        requests = eval_requests(dataset, rows, micro_batch=MICRO, rank=0, world_size=1, clip=CLIP, augment=augment)
        return load(dataset, augment, requests, on_damage="report")

    for plain, rich in zip(judged(PLAIN), judged(EVERYTHING), strict=True):
        assert facts(plain) == facts(rich)


# Repeated augmentation


def test_views_come_from_one_decode(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, original = [], software_decode.decode

    def counting(*arguments: object, key: str, shard: str) -> None:
        decoded.append(key)
        original(*arguments, key=key, shard=shard)  # type: ignore[arg-type]

    monkeypatch.setattr(software_decode, "decode", counting)
    augment = replace(PLAIN, repeats=2)
    batches = load(dataset, augment)
    assert len(decoded) == sum(len(batch.keys) for batch in batches) // 2
    for batch in batches:
        assert batch.keys[::2] == batch.keys[1::2]
        assert batch.positions[::2].tolist() == batch.positions[1::2].tolist()
        for one, other in zip(batch.parameters[::2], batch.parameters[1::2], strict=True):
            assert one.frames.tolist() == other.frames.tolist()
            assert one.roi != other.roi
    positions = [position for batch in batches for position in batch.positions[::2].tolist()]
    assert positions == list(range(2 * GLOBAL // 2))  # two steps of half as many samples


def test_the_first_view_is_the_clip_without_views(dataset: Dataset) -> None:
    one = load(dataset, PLAIN, requests_of(dataset, PLAIN, global_batch=8, micro_batch=2))
    two = load(dataset, replace(PLAIN, repeats=2))
    for single, double in zip(one, two, strict=True):
        assert torch.equal(single.clips, double.clips[::2])
        assert not torch.equal(single.clips, double.clips[1::2])


def test_views_decoded_in_the_graph_are_those_of_single_requests(tmp_path: Path) -> None:
    """The path that runs on GPUs, on a codec that DALI decodes without one."""
    videos = [Video(data=encode(12, MJPEG, first=100 * row), num_frames=12, codec="mjpeg") for row in range(4)]
    dataset = write_dataset(tmp_path / "d", videos)
    augment = replace(PLAIN, repeats=2)
    inside = load(dataset, augment, requests_of(dataset, augment, end_step=1), decoder="dali")
    outside = load(dataset, augment, requests_of(dataset, augment, end_step=1), decoder="pyav")
    for one, other in zip(inside, outside, strict=True):
        assert one.keys == other.keys
        assert float((one.clips - other.clips).abs().mean()) * 255 * 0.225 < 2  # the decoders' own difference


def test_a_damaged_sample_is_replaced_in_all_its_views(dataset: Dataset, tmp_path: Path) -> None:
    for path in dataset.root.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(dataset.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    broken = Dataset.open(tmp_path)
    flip_byte(broken, 3)
    batches = load(broken, replace(PLAIN, repeats=2))
    damages = [damage for batch in batches for damage in batch.damaged]
    assert damages
    assert len({damage.position for damage in damages}) == len(damages)
    for batch in batches:
        assert "video-3" not in batch.keys
        assert batch.keys[::2] == batch.keys[1::2]
        assert batch.clips.flatten(1).std(dim=1).min() > 0


# Labels of flipped clips


def test_a_flipped_clip_of_a_pair_has_the_label_of_the_other(dataset: Dataset) -> None:
    first, second = dataset.info.classes[:2]
    augment = replace(PLAIN, flip_labels=((first, second),))
    flipped = 0
    for plain, batch in zip(load(dataset, PLAIN), load(dataset, augment), strict=True):
        assert torch.equal(plain.clips, batch.clips)
        for before, after, parameters in zip(plain.labels.tolist(), batch.labels.tolist(), batch.parameters, strict=True):
            flipped += parameters.flip and before < 2
            assert after == ({0: 1, 1: 0}.get(before, before) if parameters.flip else before)
    assert flipped > 0


def test_an_unknown_class_is_refused(dataset: Dataset) -> None:
    with pytest.raises(PipelineError, match=r"augment\.flip_labels: got 'nowhere'"):
        load(dataset, replace(PLAIN, flip_labels=(("nowhere", "there"),)))


# Recipes


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["augment.mix={}", "train.micro_batch=1"], "augment.mix: got a micro-batch of one sample, expected at least 2"),
        (["augment.mix.mixup=0.3", "augment.repeats=2", "train.micro_batch=2"], "set train.micro_batch=4"),
        (["augment.repeats=3"], r"augment.repeats: got 3, expected a divisor of train.micro_batch \(8\)"),
        (["augment.mix={mixup: 0, cutmix: 0}"], "augment.mix.mixup: got 0.* expected a positive alpha"),
        (["augment.randaugment.mm=3"], "augment.randaugment.mm: unknown key; did you mean 'augment.randaugment.m'"),
        (["augment.erase.fill=noise"], "augment.erase.fill: got 'noise'"),
    ],
)
def test_wrong_recipes_are_explained(overrides: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_overrides({}, overrides)


def test_sections_are_part_of_a_runs_identity() -> None:
    off, on = parse_overrides({}, []).numerics(), parse_overrides({}, ["augment.mix={}"]).numerics()
    assert off["augment.mix"] is None
    assert on["augment.mix"] == {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "probability": 1.0}
    assert {key for key in on if on[key] != off.get(key)} == {"augment.mix"}
    assert on.keys() == off.keys()
    assert parse_overrides({}, ["augment.repeats=4"]).samples_per_step == 8
