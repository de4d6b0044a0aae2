"""A run's state on disk: named arrays in safetensors files, and a JSON manifest with their digests, which is written last.

    checkpoints/step-00000200-000003-5f2c91ab/state.safetensors
                                              manifest.json

A checkpoint exists when its manifest exists. Data goes first, under a name that nobody else uses, is digested while it is written
and synced; then the fence is asked, then the manifest appears by a rename; only then are older checkpoints and the leftovers of dead
writers removed. Kill the writer anywhere and the newest whole checkpoint still loads. Nothing here knows ranks or frameworks.

A checkpoint that was judged has its `score.json` beside the manifest, written whole when the judging is done. The best one stays.

The second number in the name counts saves: a run that fell back to an older step saves later, not smaller, numbers.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cluster.errors import CheckpointError
from cluster.retention import Saved, best_of, kept
from cluster.tensor_file import BLOCK_BYTES
from cluster.tensor_file import Array as Array
from cluster.tensor_file import write_safetensors as write_safetensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.safetensors"
SCORE = "score.json"
_NAME = re.compile(r"step-(\d{8,})-(\d{6,})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One whole checkpoint. number: of the save in this run, unique and rising. meta: what `save` was given.

    files: name -> {"size", "sha256"}. tensors: name -> {"dtype", "shape", "slices"}.
    """

    step: int
    number: int
    path: Path
    meta: Mapping[str, object]
    files: Mapping[str, Any]
    tensors: Mapping[str, object]

    def judgement(self) -> dict[str, Any] | None:
        """What `CheckpointStore.judge` wrote about it: "score", a list of numbers, and facts; None where it was not judged."""
        try:
            return read_score((self.path / SCORE).read_bytes())
        except OSError:
            return None

    def saved(self) -> Saved:
        """As the policy sees it."""
        facts = self.judgement()
        return Saved(name=self.path.name, step=self.step, number=self.number, score=facts["score"] if facts else None)

    def load(self) -> dict[str, Array]:
        """All arrays by name. Raises CheckpointError when a file does not hold what the manifest says."""
        files: dict[str, dict[str, Array]] = {}
        found = {}
        for name, entry in self.tensors.items():
            try:
                found[name] = _assemble(entry, self.path, files)
            except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path}: '{name}' does not fit its manifest ({error!r}). Remove this folder.") from None
        return found


def _assemble(entry: object, folder: Path, files: dict[str, dict[str, Array]]) -> Array:
    """One array from its slices: [file, tensor, start, stop] are elements [start, stop) of the flattened array."""
    if not isinstance(entry, dict):
        raise TypeError(entry)
    shape, dtype, size = tuple(entry["shape"]), np.dtype(entry["dtype"]), int(np.prod(entry["shape"], dtype=np.int64))
    whole, filled = np.empty(size, dtype), 0
    for file, tensor, start, stop in entry["slices"]:
        if file not in files:
            files[file] = load_file(folder / file)
        part = files[file][tensor]
        if part.dtype != dtype or part.size != stop - start:
            raise ValueError(f"{part.size} x {part.dtype} instead of {stop - start} x {dtype}")
        if (start, stop) == (0, size):
            return part.reshape(shape)
        whole[start:stop] = part.reshape(-1)
        filled += stop - start
    if filled != size:
        raise ValueError(f"{filled} of {size} elements are there")
    return whole.reshape(shape)


def named(name: str, score: Sequence[float] | None) -> Saved | None:
    """A checkpoint by the name of its folder; None where that is not a checkpoint's."""
    found = _NAME.fullmatch(name)
    return Saved(name=name, step=int(found[1]), number=int(found[2]), score=score) if found else None


class CheckpointStore:
    """The checkpoints of one run under `root`. One writer at a time; readers need no lock.

    keep: how many whole ones stay, the newest, beside the best of those that were judged (`judge`). keep_every: so do those of multiples
    of so many steps, unless 0.
    absent: what the meta of older checkpoints means where it says nothing: the defaults of keys that were not there yet.
    save_s: how long the last finished save took.
    """

    def __init__(self, root: Path, keep: int, keep_every: int = 0, absent: Mapping[str, object] | None = None) -> None:
        self.root = root
        self.keep, self.keep_every = keep, keep_every
        self._absent = absent or {}
        self.save_s = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Array], meta: Mapping[str, object], *, fence: Callable[[], None]) -> None:
        """Commits one checkpoint.

        fence: called before anything is written, before the commit and before anything is removed; raises to forbid it.
        Raises CheckpointError when the disk refuses.
        """
        self.wait()
        self._save(step, tensors, meta, fence)

    def save_in_background(self, step: int, tensors: Mapping[str, Array], meta: Mapping[str, object], *, fence: Callable[[], None]) -> None:
        """The same in a thread; waits for an unfinished save first. The arrays must be copies that nobody changes.

        What the save raises is raised by the next call of `save`, `save_in_background` or `wait`.
        """
        self.wait()

        def run() -> None:
            try:
                self._save(step, tensors, meta, fence)
            except BaseException as error:  # whatever it is, the next caller gets it
                self._error = error

        self._thread = threading.Thread(target=run, name=f"save step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way; raises what the last one raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, step: int, tensors: Mapping[str, Array], meta: Mapping[str, object], fence: Callable[[], None]) -> None:
        began = time.perf_counter()
        fence()
        number = max((number for number, _ in self._folders()), default=0) + 1
        folder = self.root / f"step-{step:08d}-{number:06d}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True)
            size, digest = write_safetensors(folder / STATE, tensors)
            manifest = {
                "format": FORMAT_VERSION,
                "step": step,
                "number": number,
                "time": time.time(),
                "meta": dict(meta),
                "files": {STATE: {"size": size, "sha256": digest}},
                "tensors": {
                    name: {"dtype": value.dtype.name, "shape": value.shape, "slices": [[STATE, name, 0, value.size]]}
                    for name, value in tensors.items()
                },
            }
            _sync_folder(folder)
            temporary = folder / f"{MANIFEST}.tmp"
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(manifest, file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            fence()
            os.replace(temporary, folder / MANIFEST)
            _sync_folder(folder)
            _sync_folder(self.root)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            fence()  # a newer attempt may have removed the folder: then that is the reason
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {folder} ({error.strerror or error}). "
                "Free space or permissions there; the same command then resumes from the checkpoint before."
            ) from error
        fence()
        self._remove_old()
        self.save_s = time.perf_counter() - began

    def _folders(self) -> list[tuple[int, Path]]:
        """(number, folder) of everything that looks like a checkpoint, whole or not, newest first."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        matches = ((name, _NAME.fullmatch(name)) for name in names)
        return sorted(((int(match[2]), self.root / name) for name, match in matches if match), reverse=True)

    def _remove_old(self) -> None:
        kept = self._kept()
        for _, folder in self._folders():
            if folder in kept:
                continue
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed one never looks whole
            shutil.rmtree(folder, ignore_errors=True)

    def _kept(self) -> set[Path]:
        newest = [folder for _, folder in self._folders() if (folder / MANIFEST).exists()][: self.keep]
        chosen = kept([found.saved() for found in self.manifests()], self.keep, self.keep_every)
        return {*newest, *(self.root / name for name in chosen)}

    def judge(self, checkpoint: Checkpoint, score: Sequence[float], facts: Mapping[str, object], *, fence: Callable[[], None]) -> None:
        """Writes down what a checkpoint is worth: `score`, the greater the better, compared number by number; facts: JSON beside it."""
        fence()
        temporary = checkpoint.path / f"{SCORE}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT_VERSION, "score": list(score), **facts}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, checkpoint.path / SCORE)
        _sync_folder(checkpoint.path)

    def best(self) -> Checkpoint | None:
        """The checkpoint of the greatest score, of equal ones the first saved; None where none was judged. Bytes are not looked at."""
        found = {one.path.name: one for one in self.manifests()}
        return found.get(best_of(one.saved() for one in found.values()) or "")

    def manifests(self) -> list[Checkpoint]:
        """Checkpoints with a readable manifest, newest first; their bytes are not looked at."""
        return [found for found in (_read(folder) for _, folder in self._folders()) if isinstance(found, Checkpoint)]

    def newest(self, expect: Mapping[str, object] | None = None, *, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose bytes are whole; None when there is none. See `whole`."""
        return next(self.whole(expect, warn=warn), None)

    def whole(self, expect: Mapping[str, object] | None = None, *, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
        """Checkpoints whose bytes are whole, newest first, each checked when it is asked for. Damaged ones are skipped, telling `warn`.

        expect: values that their meta must have (fingerprints). Raises CheckpointError that prints both when they differ.
        """
        for _, folder in self._folders():
            if not (folder / MANIFEST).exists():
                continue  # of a dead writer
            found = _read(folder)
            problem = found if isinstance(found, str) else _damage(found.path)
            if isinstance(found, str) or problem:
                warn(f"{folder} is damaged ({problem}): it is skipped for the one before.")
                continue
            self.check(found, expect or {}, where=str(found.path), key="run.dir")
            yield found

    def check(self, found: Checkpoint, expect: Mapping[str, object], *, where: str, key: str) -> None:
        """Raises CheckpointError, with both values, where the meta is not as `expect` says. key: the recipe's, that led to `where`."""
        for name, value in expect.items():
            wanted, got = (json.loads(json.dumps(of)) for of in (value, found.meta.get(name, self._absent.get(name))))
            if wanted != got:
                raise CheckpointError(
                    f"{where} is of another run: its {name} is {got!r}, this run's is {wanted!r}. "
                    f"Resume with what it was made with, or choose another {key}."
                )

    def at(self, number: int) -> Checkpoint:
        """The checkpoint of that number, which another process has found whole. Raises CheckpointError when it is gone."""
        for found, folder in self._folders():
            if found == number and isinstance(checkpoint := _read(folder), Checkpoint):
                return checkpoint
        raise CheckpointError(f"{self.root} has no checkpoint number {number}. Do all workers see the same run.dir?")


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in one folder, its bytes compared with their digests. Raises CheckpointError saying what is wrong."""
    found = _read(folder)
    problem = found if isinstance(found, str) else _damage(folder)
    if isinstance(found, str) or problem:
        raise CheckpointError(f"{folder} is damaged: {problem}. Use another checkpoint.")
    return found


def _read(folder: Path) -> Checkpoint | str:
    """A checkpoint from its manifest, or what is wrong with that."""
    try:
        return read_manifest((folder / MANIFEST).read_bytes(), folder)
    except OSError as error:
        return str(error)


def read_manifest(text: bytes, folder: Path) -> Checkpoint | str:
    """A checkpoint, in `folder`, from its manifest's text, or what is wrong with that."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT_VERSION:
            return f"format version {raw['format']}, expected {FORMAT_VERSION}"
        step, number, parts = raw["step"], raw["number"], [raw[name] for name in ("meta", "files", "tensors")]
        if not (isinstance(step, int) and isinstance(number, int) and all(isinstance(part, dict) for part in parts)):
            return "its manifest is not one"
        return Checkpoint(step=step, number=number, path=folder, meta=parts[0], files=parts[1], tensors=parts[2])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its manifest is not readable: {error!r}"


def read_score(text: bytes) -> dict[str, Any] | None:
    """What a `score.json` says: "score", a list of numbers, and facts; None where it is none."""
    try:
        found = json.loads(text)
        usable = found["format"] == FORMAT_VERSION and all(isinstance(number, int | float) for number in found["score"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if usable else None


def _damage(folder: Path) -> str:
    """What is wrong with the bytes beside the manifest; "" when nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            size = (folder / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes, expected {facts['size']}"
            digest = hashlib.sha256()
            for block in _blocks(folder / name):
                digest.update(block)
            if digest.hexdigest() != facts["sha256"]:
                return f"{name} has SHA-256 {digest.hexdigest()[:12]}..., expected {facts['sha256'][:12]}..."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return ""


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def model_state(tensors: Mapping[str, Array], *, averaged: bool = True) -> dict[str, Array]:
    """The weights and buffers among a checkpoint's arrays, named as the model's own state dict names them.

    averaged: the running average of those that have one (`optimizer.ema`) instead of their last values.
    """
    prefixes = ("model.", "buffer.", "ema.") if averaged else ("model.", "buffer.")
    last_first = sorted(tensors, key=lambda name: name.startswith("ema."))  # so that an average replaces the last value
    return {name.split(".", 1)[1]: tensors[name] for name in last_first if name.startswith(prefixes)}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
