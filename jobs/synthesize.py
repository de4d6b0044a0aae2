"""Videos for the demo whose class is the motion, and nothing else.

A scene is a textured thing before a textured background. Each scene is filmed once per class; the thing starts at the same place,
turned the same way, and differs only in how it goes on. Position and turn live on closed tracks (a torus, a circle) and start
uniformly at random, so at every moment they are uniform whatever the class: one frame tells nothing, by construction. What a
network could learn by heart from a scene is of no use, because each scene belongs to all classes and the held-out scenes are others.
"""

import csv
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.media import write_video
from pipeline.options import EncodeOptions

SIZE = 128  # pixels, height and width
NUM_FRAMES = 40
FPS = 24.0
CLASSES = ("left", "right", "up", "down", "spin", "shake")
BUMP = 0.12  # height of a thing's bumps, as a share of its radius
SPIN, SHAKE = 4.0, 2.5  # speed of the edge in a spin, greatest speed in a shake, both in translations
HELD_OUT = 3  # every third scene is held out
MANIFEST = "synthetic.json"
VERSION = 1  # of what is drawn: another version makes other videos from the same seed

_SHIFT = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x to the right, y down
_ENCODE = EncodeOptions(short_side=SIZE, gop=NUM_FRAMES, crf=18)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that the classes of one scene share.

    thing, background: (SIZE, SIZE, 3) float32 textures in [0, 255] that close at their edges.
    radius: of the thing, in pixels; its outline has `bumps` bumps. x, y: its start in pixels; turn: in radians.
    speed: of a translation, in pixels per frame. spin: +1 or -1, the sense of a spin.
    axis: direction of a shake, in radians; period: of it, in frames; phase: where it starts, in radians.
    """

    thing: npt.NDArray[np.float32]
    background: npt.NDArray[np.float32]
    radius: float
    bumps: int
    x: float
    y: float
    turn: float
    speed: float
    spin: float
    axis: float
    period: float
    phase: float


def synthesize(out: Path, *, num_clips: int, seed: int) -> None:
    """Writes `num_clips` videos in class folders, a truncated one beside them, and `labels.csv` (path,label,split,group).

    group is the scene; every third scene is split `val`, the others `train`. The same arguments make the same bytes (equal library
    versions). A finished folder of these arguments is left alone; an unfinished one never carries the name `out`. Raises ValueError
    for a number of clips that is no multiple of the classes or too small to hold a scene out, FileExistsError where `out` holds
    anything that this function has not made.
    """
    if num_clips % len(CLASSES) or num_clips < HELD_OUT * len(CLASSES):
        raise ValueError(f"num_clips: got {num_clips}, expected a multiple of {len(CLASSES)}, at least {HELD_OUT * len(CLASSES)}")
    facts = {"version": VERSION, "num_clips": num_clips, "seed": seed}
    if _is_finished(out, facts):
        return
    _refuse_strangers(out)
    work = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _write(work, num_clips // len(CLASSES), seed)
    sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()}
    (work / MANIFEST).write_text(json.dumps({**facts, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.rename(work, out)


def make_scene(seed: int, number: int) -> Scene:
    """Scene `number` of a seed: a pure function of both."""
    rng = np.random.default_rng([seed, number])
    near, far = _palette(rng)
    return Scene(
        thing=_texture(rng, grain=rng.uniform(7.0, 10.0), colours=near),
        background=_texture(rng, grain=rng.uniform(6.0, 14.0), colours=far),
        radius=rng.uniform(30.0, 40.0),
        bumps=int(rng.integers(3, 7)),
        x=rng.uniform(0, SIZE),
        y=rng.uniform(0, SIZE),
        turn=rng.uniform(0, 2 * np.pi),
        speed=rng.uniform(1.5, 2.5),
        spin=float(rng.choice([-1.0, 1.0])),
        axis=rng.uniform(0, np.pi),
        period=rng.uniform(12.0, 16.0),
        phase=rng.uniform(0, 2 * np.pi),
    )


def film(scene: Scene, motion: str, num_frames: int = NUM_FRAMES) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (SIZE, SIZE, 3) uint8 RGB of one scene with one of CLASSES."""
    for frame in range(num_frames):
        yield _frame(scene, *pose(scene, motion, frame))


def pose(scene: Scene, motion: str, frame: int) -> tuple[float, float, float]:
    """(x, y, turn) of the thing in one frame; in frame 0 it is the same for all motions."""
    path = scene.speed * frame  # pixels
    if motion == "spin":
        return scene.x, scene.y, scene.turn + scene.spin * SPIN * path / scene.radius
    if motion == "shake":
        pace = 2 * math.pi / scene.period
        path = SHAKE * scene.speed / pace * (math.sin(pace * frame + scene.phase) - math.sin(scene.phase))
        right, down = math.cos(scene.axis), math.sin(scene.axis)
    else:
        right, down = _SHIFT[motion]
    return scene.x + right * path, scene.y + down * path, scene.turn


def _write(folder: Path, num_scenes: int, seed: int) -> None:
    rows = []
    for number in range(num_scenes):
        scene = make_scene(seed, number)
        split = "val" if number % HELD_OUT == HELD_OUT - 1 else "train"
        for motion in CLASSES:
            path = folder / motion / f"scene_{number:03d}.mp4"
            path.parent.mkdir(exist_ok=True)
            write_video(path, film(scene, motion), FPS, _ENCODE)
            rows.append((path.relative_to(folder).as_posix(), motion, split, f"scene_{number:03d}"))
    whole = folder / rows[0][0]
    broken = whole.with_name("truncated.mp4")  # as a download that broke off leaves it
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    rows.append((broken.relative_to(folder).as_posix(), rows[0][1], "train", "scene_000"))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label", "split", "group"), *rows])


def _manifest(out: Path) -> dict[str, object]:
    """What an earlier call wrote about its files; empty where there is none."""
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def _is_finished(out: Path, facts: dict[str, int]) -> bool:
    found = _manifest(out)
    files = found.get("files")
    if not isinstance(files, dict) or any(found.get(name) != value for name, value in facts.items()):
        return False
    return all((out / name).is_file() and (out / name).stat().st_size == size for name, size in files.items())


def _refuse_strangers(out: Path) -> None:
    """Raises FileExistsError where replacing `out` would delete a file that no earlier call wrote."""
    files = _manifest(out).get("files")
    own = {MANIFEST, *files} if isinstance(files, dict) else set()
    strangers = [path for path in sorted(out.rglob("*")) if not path.is_dir() and path.relative_to(out).as_posix() not in own]
    if strangers or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{strangers[0] if strangers else out} is not of the demo's making. Choose another folder, or move it away.")


def _frame(scene: Scene, x: float, y: float, turn: float) -> npt.NDArray[np.uint8]:
    """One picture with the thing's middle at (x, y) modulo SIZE, turned by `turn`."""
    reach = scene.radius * (1 + BUMP) + 2
    columns, from_x = _near(x, reach)
    rows, from_y = _near(y, reach)
    cos, sin = math.cos(turn), math.sin(turn)
    own_x, own_y = cos * from_x[None, :] + sin * from_y[:, None], cos * from_y[:, None] - sin * from_x[None, :]
    edge = scene.radius * (1 + BUMP * np.cos(scene.bumps * np.arctan2(own_y, own_x)))
    cover = np.clip((edge - np.hypot(own_x, own_y)) / 2 + 0.5, 0, 1)[..., None]
    picture = scene.background.copy()
    box = np.ix_(rows, columns)
    picture[box] += cover * (_sample(scene.thing, own_x, own_y) - picture[box])
    return np.asarray(np.rint(picture), dtype=np.uint8)


def _near(middle: float, reach: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Pixels of one axis within `reach` of `middle`, the nearest way round, and how far each is from it."""
    offset = (np.arange(SIZE, dtype=np.float32) - middle + SIZE / 2) % SIZE - SIZE / 2
    pixels = np.flatnonzero(np.abs(offset) < reach)
    return pixels, offset[pixels]


def _sample(texture: npt.NDArray[np.float32], x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Bilinear values of a texture (SIZE, SIZE, 3) that repeats; x, y in pixels, of one shape, any range."""
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right_share, bottom_share = (x - left)[..., None], (y - top)[..., None]
    i, j, below, beside = top % SIZE, left % SIZE, (top + 1) % SIZE, (left + 1) % SIZE
    upper = texture[i, j] * (1 - right_share) + texture[i, beside] * right_share
    lower = texture[below, j] * (1 - right_share) + texture[below, beside] * right_share
    return np.asarray(upper * (1 - bottom_share) + lower * bottom_share, dtype=np.float32)


def _texture(rng: np.random.Generator, *, grain: float, colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Smooth noise between two colours (2, 3), closed at its edges, with structures of about `grain` pixels. (SIZE, SIZE, 3)."""
    frequency = np.fft.fftfreq(SIZE)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    filtered = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * np.exp(-((radius * 2 * grain - 1) ** 2) * 6)).real
    mix = 0.5 + 0.5 * np.tanh(1.5 * filtered / filtered.std())[..., None]
    return np.asarray(colours[0] * mix + colours[1] * (1 - mix), dtype=np.float32)


def _palette(rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two colours (2, 3) in [0, 255] for the thing and two duller ones for the background."""
    hue = rng.uniform(0, 2 * np.pi)
    near = np.stack([_colour(hue, 225.0, 45.0), _colour(hue + rng.uniform(-0.6, 0.6), 70.0, 40.0)])
    far = np.stack([_colour(hue + np.pi + rng.uniform(-0.7, 0.7), 165.0, 18.0), _colour(hue + np.pi, 110.0, 18.0)])
    return near, far


def _colour(hue: float, light: float, strength: float) -> npt.NDArray[np.float64]:
    thirds = hue + np.array([0.0, 2.0, 4.0]) * np.pi / 3
    return np.asarray(np.clip(light + strength * np.cos(thirds), 0.0, 255.0))
