"""Colour jitter and erasing against plain references; their draws are keyed, in range and as likely as the recipe says."""

import colorsys
import json
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.augment_clip import TO_YIQ, augment_levels, erase, jitter, noise
from pipeline.augmentation import draw_augmentation, draw_boxes, draw_colour, swapped_labels
from pipeline.errors import PipelineError
from pipeline.keyed import Augmentation
from pipeline.options import AugmentOptions, EraseOptions, JitterOptions, RandAugmentOptions

GOLDEN = {
    "operations": [["ShearX", 0.22486024430351695], ["ShearY", 0.20796125784166547]],
    "colour": [1.2307007466605842, 0.6641721865936043, 1.1056334982006086, 0.00876997852825663],
    "erased": [[0, 20, 11, 4, 49, 58]],
    "noise": [3, 11, 1],
}
WEIGHTS = np.array([0.299, 0.587, 0.114])


def clip_of(seed: int, length: int = 3, height: int = 12, width: int = 18) -> torch.Tensor:
    """uint8 (3, T, H, W)"""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, length, height, width), dtype=np.uint8))


def reference(frames: npt.NDArray[np.uint8], colour: tuple[float, float, float, float]) -> npt.NDArray[np.float64]:
    """One change after the other, in float64, levels cut off at the end."""
    brightness, contrast, saturation, turn = colour
    x = brightness * frames.astype(np.float64)
    mean = np.einsum("c,cthw->thw", WEIGHTS, x).mean(axis=(1, 2))[None, :, None, None]
    x = mean + contrast * (x - mean)
    grey = np.einsum("c,cthw->thw", WEIGHTS, x)[None]
    x = grey + saturation * (x - grey)
    y, i, q = np.einsum("dc,cthw->dthw", TO_YIQ, x)
    cosine, sine = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    turned = np.stack([y, cosine * i - sine * q, sine * i + cosine * q])
    return np.clip(np.einsum("dc,cthw->dthw", np.linalg.inv(TO_YIQ), turned), 0, 255)


def jittered(frames: torch.Tensor, colour: tuple[float, float, float, float]) -> npt.NDArray[np.float32]:
    clip = frames.float()
    jitter(clip, colour)
    return clip.numpy()


@pytest.mark.parametrize(
    "colour",
    [(1, 1, 1, 0), (0.6, 1, 1, 0), (1, 1.7, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 2, 0), (1, 1, 1, 0.3), (1.3, 0.7, 1.4, -0.2)],
)
def test_jitter_equals_the_reference(colour: tuple[float, float, float, float]) -> None:
    frames = clip_of(1)
    assert np.abs(jittered(frames, colour) - reference(frames.numpy(), colour)).max() < 2e-3


def test_without_colour_channels_are_equal_and_greys_have_no_hue() -> None:
    flat = jittered(clip_of(2), (1, 1, 0, 0.4))
    assert np.abs(flat - flat[:1]).max() < 1e-3
    grey = clip_of(3)[:1].repeat(3, 1, 1, 1)
    assert np.abs(jittered(grey, (1, 1, 1, 0.37)) - grey.numpy()).max() < 1e-3


def test_a_third_of_a_turn_moves_the_hue_by_about_a_third() -> None:
    red = torch.tensor([150, 100, 100], dtype=torch.uint8).view(3, 1, 1, 1)
    hue, _, _ = colorsys.rgb_to_hsv(*(jittered(red, (1, 1, 1, 1 / 3)).flatten() / 255).tolist())
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.07


def test_a_clip_that_is_not_changed_is_only_normalised() -> None:
    frames = clip_of(4)[None]
    clips = frames.float()
    augment_levels(clips, [Augmentation()], AugmentOptions())
    assert torch.allclose(clips, (frames / 255 - 0.45) / 0.225, atol=1e-6)


def test_colours_are_drawn_in_range() -> None:
    options = JitterOptions(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, grey=0.25)
    drawn = np.array([draw_colour(options, (1, position, 0)) for position in range(1000)])
    coloured = drawn[:, 2] > 0
    assert 0.2 < 1 - coloured.mean() < 0.3
    spread = np.array([0.4, 0.3, 0.2, 0.1])
    for column, (centre, width) in enumerate(zip((1, 1, 1, 0), spread, strict=True)):
        values = drawn[coloured, column]
        assert (np.abs(values - centre) <= width).all()
        assert values.std() == pytest.approx(width / 3**0.5, rel=0.1)
    assert draw_colour(options, (1, 2, 0)) != draw_colour(options, (1, 2, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU and GPU: runs where torch finds a GPU")
def test_a_gpu_gives_the_clips_of_a_cpu() -> None:
    augment = AugmentOptions(size=96, jitter=JitterOptions(hue=0.2), erase=EraseOptions(probability=1.0))
    drawn = [draw_augmentation(augment, 3, seed=1, position=position, view=0) for position in range(4)]
    present = [one for one in drawn if one is not None]
    on_cpu = torch.stack([clip_of(seed, 3, 96, 96) for seed in range(4)]).float()
    on_gpu = on_cpu.cuda()
    for clips in (on_cpu, on_gpu):
        augment_levels(clips, present, augment)
        erase(clips, present)
    assert ((on_gpu.cpu() - on_cpu).abs() * 255 * 0.225).max() < 1e-3  # of a level


# Erasing


def plainly_erased(clip: npt.NDArray[np.float32], augmentation: Augmentation) -> npt.NDArray[np.float32]:
    values = iter(noise(augmentation.noise, clip.size * 9).tolist() if augmentation.noise else ())
    clip = clip.copy()
    for t0, y0, x0, t1, y1, x1 in augmentation.erased:
        for c in range(3):
            for t in range(t0, t1):
                for y in range(y0, y1):
                    for x in range(x0, x1):
                        clip[c, t, y, x] = next(values) if augmentation.noise else 0.0
    return clip


@pytest.mark.parametrize("cube", [True, False])
@pytest.mark.parametrize("fill", ["constant", "pixel"])
def test_erasing_equals_the_reference(fill: str, cube: bool) -> None:
    options = EraseOptions(probability=1.0, fill=fill, cube=cube, count=2)  # type: ignore[arg-type]
    augment = AugmentOptions(size=16, erase=options)
    drawn = [draw_augmentation(augment, 3, seed=1, position=position, view=0) for position in range(4)]
    clips = torch.rand(5, 3, 3, 16, 16) + 1
    expected = [plainly_erased(clip.numpy(), one) if one else clip.numpy() for clip, one in zip(clips, [*drawn, None], strict=True)]
    erase(clips, [*drawn, None])
    assert np.array_equal(clips.numpy(), np.stack(expected))
    assert (clips[:4] < 1).any()
    assert (clips[4] >= 1).all()


def test_boxes_have_the_share_asked_for() -> None:
    options = EraseOptions(probability=0.25, area=(0.1, 0.2), aspect=(0.5, 2.0))
    drawn = [draw_boxes(options, 100, 8, (1, position, 0)) for position in range(2000)]
    hit = [boxes for boxes in drawn if boxes]
    assert 0.22 < len(hit) / 2000 < 0.28
    for (box,) in hit:
        t0, y0, x0, t1, y1, x1 = box
        assert (t0, t1) == (0, 8)
        assert 0 <= y0 < y1 <= 100
        assert 0 <= x0 < x1 <= 100
        assert 0.09 < (y1 - y0) * (x1 - x0) / 10_000 < 0.21
        assert 0.48 < (x1 - x0) / (y1 - y0) < 2.1


def test_a_cube_stays_and_others_flicker() -> None:
    still, moving = (draw_boxes(EraseOptions(probability=1.0, cube=cube), 64, 6, (1, 1, 0)) for cube in (True, False))
    assert [(box[0], box[3]) for box in still] == [(0, 6)]
    assert [(box[0], box[3]) for box in moving] == [(t, t + 1) for t in range(6)]
    assert len({(box[1], box[2]) for box in moving}) > 1


def test_noise_is_normal_and_keyed() -> None:
    values = noise((1, 2, 0), 400_000)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert (np.abs(values) < 1.96).mean() == pytest.approx(0.95, abs=0.002)
    assert np.array_equal(noise((1, 2, 0), 1000), values[:1000])
    assert not np.array_equal(noise((1, 2, 1), 1000), values[:1000])


# Draws as a whole


def test_a_recipe_without_augmentation_draws_none() -> None:
    assert draw_augmentation(AugmentOptions(), 4, seed=1, position=1, view=0) is None


def test_golden_values() -> None:
    """Resumed runs depend on these: they change only together with KEYED_VERSION."""
    augment = AugmentOptions(
        size=64,
        randaugment=RandAugmentOptions(probability=1.0, n=2),
        jitter=JitterOptions(hue=0.1),
        erase=EraseOptions(probability=1.0),
    )
    drawn = draw_augmentation(augment, 4, seed=3, position=11, view=1)
    assert drawn is not None
    plain = drawn.as_lists()
    assert json.loads(json.dumps(plain)) == plain
    assert plain == GOLDEN


def test_sections_do_not_move_each_other() -> None:
    both = AugmentOptions(jitter=JitterOptions(), erase=EraseOptions(probability=1.0), randaugment=RandAugmentOptions())
    alone = AugmentOptions(erase=EraseOptions(probability=1.0))
    first, second = (draw_augmentation(augment, 4, seed=3, position=5, view=0) for augment in (both, alone))
    assert first is not None
    assert second is not None
    assert first.erased == second.erased


def test_draws_cost_little() -> None:
    """Under 0.3 ms for everything; they happen in the thread that feeds the decoders."""
    augment = AugmentOptions(jitter=JitterOptions(), erase=EraseOptions(probability=1.0), randaugment=RandAugmentOptions())
    times = []
    for _ in range(5):
        began = time.process_time()
        for position in range(100):
            draw_augmentation(augment, 16, seed=1, position=position, view=0)
        times.append((time.process_time() - began) / 100)
    assert min(times) < 3e-4


def test_flipped_labels() -> None:
    assert swapped_labels(["a", "b", "c"], [("a", "c")]) == {0: 2, 2: 0}
    assert swapped_labels(["a"], []) == {}
    with pytest.raises(
        PipelineError, match=r"augment.flip_labels: got 'pull', expected one of the dataset's 2 classes; did you mean 'pulls'"
    ):
        swapped_labels(["pulls", "push"], [("pull", "push")])


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        (RandAugmentOptions, {"m": 11}, "m"),
        (RandAugmentOptions, {"n": 0}, "n"),
        (JitterOptions, {"hue": 0.6}, "hue"),
        (JitterOptions, {"contrast": -0.1}, "contrast"),
        (EraseOptions, {"area": (0.5, 0.2)}, "area"),
        (EraseOptions, {"count": 0}, "count"),
        (AugmentOptions, {"repeats": 0}, "repeats"),
        (AugmentOptions, {"flip_labels": (("a", "b"), ("b", "c"))}, "flip_labels"),
        (AugmentOptions, {"flip_labels": (("a", "a"),)}, "flip_labels"),
    ],
)
def test_options_out_of_range(section: type, values: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: got"):
        section(**values)
