"""A run's checkpoints in a second place, `checkpoint.mirror`: an object store, or another folder.

    URL/checkpoints/step-00000200-000003-5f2c91ab/state.safetensors   names and bytes are the run folder's; data first,
                                                  manifest.json       last, in one PUT: then the checkpoint is there
                                                  score.json          where it was judged
    URL/drivers/000002-9c41d2aa.json                                  who may write: the newest driver

What stays is what the same policy keeps of what is there (`cluster.retention`): a checkpoint that was skipped because the store was
slow costs no older one its place. Removal begins with the manifest. Names in the store are not trusted: of them only a
checkpoint's own become files, of the sizes that the store lists and the digests that the manifest gives.
"""

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from cluster.checkpoint import MANIFEST, SCORE, Checkpoint, CheckpointStore, named, read_manifest, read_score
from cluster.errors import FencedError
from cluster.retention import Saved, best_of, kept
from jobs.errors import JobError
from pipeline.durable import committed, sha256_of, sync
from pipeline.errors import StorageError
from pipeline.folder import folder_at
from pipeline.location import Location, within
from pipeline.options import RemoteOptions

CHECKPOINTS, DRIVERS = "checkpoints", "drivers"
MAX_MANIFEST_BYTES, MAX_SCORE_BYTES = 64 << 20, 1 << 20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DRIVER = re.compile(rf"{DRIVERS}/(\d{{6,9}})-([0-9a-f]{{8}})\.json")

Files = Mapping[str, int]  # of one checkpoint: name -> bytes


class Mirror:
    """The checkpoints at `place`. Raises StorageError, or OSError for a folder, wherever the place does not do what is asked."""

    def __init__(self, place: Location, options: RemoteOptions | None = None) -> None:
        self.place = place
        self._folder = folder_at(place, options)
        self._driver: tuple[int, str] | None = None  # of this process: number and token
        self._scores: dict[str, list[float] | None] = {}  # read so far
        self._unusable: set[str] = set()  # here, and not to be copied

    def __str__(self) -> str:
        return str(self.place)

    def listing(self) -> dict[str, Files]:
        """Checkpoint -> its files, of all that lies there under a checkpoint's name, whole or not; newest first."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self._folder.sizes(CHECKPOINTS).items():
            parts = path.split("/")
            if len(parts) == 3 and named(parts[1], None):
                found.setdefault(parts[1], {})[parts[2]] = size
        return {name: found[name] for name in sorted(found, key=_number, reverse=True)}

    def manifest(self, name: str) -> Checkpoint | str:
        """One of those listed, by its manifest alone, or what is wrong with that. Its `path` is only a name."""
        try:
            text = self._folder.read_all(_at(name, MANIFEST), MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return "its manifest is gone"
        return read_manifest(text, Path(name))

    def score(self, name: str, files: Files) -> list[float] | None:
        """What the checkpoint's score is; None where it was not judged. Asked for once."""
        if SCORE not in files:
            return None
        if name not in self._scores:
            facts = self.judgement(name)
            self._scores[name] = list(facts["score"]) if facts else None
        return self._scores[name]

    def judgement(self, name: str) -> dict[str, Any] | None:
        """As `Checkpoint.judgement`."""
        try:
            return read_score(self._folder.read_all(_at(name, SCORE), MAX_SCORE_BYTES))
        except FileNotFoundError:
            return None

    # --- writing: the driver of a run

    def check(self, store: CheckpointStore, expect: Mapping[str, object]) -> None:
        """Raises CheckpointError, with both values, where the newest one is not as `expect` says."""
        for name, files in self.listing().items():
            newest = self.manifest(name) if MANIFEST in files else "not whole"
            if isinstance(newest, Checkpoint):
                store.check(newest, expect, where=str(within(self.place, f"{CHECKPOINTS}/{name}")), key="checkpoint.mirror")
                return

    def claim(self, store: CheckpointStore, expect: Mapping[str, object]) -> None:
        """Makes this process the one that may write: from now on every earlier one is refused. Raises as `check`."""
        self.check(store, expect)
        drivers = self._drivers()
        driver = (max(drivers, default=(0, ""))[0] + 1, secrets.token_hex(4))
        facts = {"format": 1, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        self._folder.create(_claim(driver), json.dumps(facts).encode())
        self._driver = driver
        self._folder.delete([_claim(earlier) for earlier in drivers])

    def _drivers(self) -> list[tuple[int, str]]:
        found = (_DRIVER.fullmatch(name) for name in self._folder.sizes(DRIVERS))
        return [(int(match[1]), match[2]) for match in found if match]

    def _fence(self) -> None:
        newest = max(self._drivers(), default=(0, ""))
        if self._driver is None or newest > self._driver:
            raise FencedError(
                f"checkpoint.mirror={self}: another driver of this run has begun since ({_claim(newest)}). "
                "No checkpoint there was changed. Stop one of the two, or give this run a mirror of its own."
            )

    def copy(self, store: CheckpointStore, expect: Mapping[str, object], said: Callable[[Checkpoint, int, float], None]) -> None:
        """Uploads what should be there, the newest first, then removes what need not stay.

        Of the older ones that are not there only those go that stay for good reason: multiples of `keep_every`, and the best.
        said: told of each upload: checkpoint, bytes, seconds. Raises FencedError where a newer driver has begun, and as `check`.
        """
        if self._driver is None:
            self.claim(store, expect)
        self._fence()
        there = self.listing()
        while chosen := self._missing(store, there):
            began = time.monotonic()
            size = self._upload(chosen)
            if size is not None:
                said(chosen, size, time.monotonic() - began)
            there = self.listing()
        for found in store.manifests():
            files = there.get(found.path.name, {})
            if MANIFEST in files and SCORE not in files and found.judgement() is not None:
                self._folder.upload(found.path / SCORE, _at(found.path.name, SCORE))
        self._remove_old(store)

    def _missing(self, store: CheckpointStore, there: Mapping[str, Files]) -> Checkpoint | None:
        here = {found.path.name: found for found in store.manifests()}
        known = [*(found.saved() for found in here.values()), *(one for one in self._saved(there) if one.name not in here)]
        wanted = kept(known, 1, store.keep_every) - self._unusable
        return next((found for name, found in here.items() if name in wanted and MANIFEST not in there.get(name, {})), None)

    def _saved(self, there: Mapping[str, Files]) -> list[Saved]:
        """The whole ones."""
        found = (named(name, self.score(name, files)) for name, files in there.items() if MANIFEST in files)
        return [one for one in found if one]

    def _upload(self, chosen: Checkpoint) -> int | None:
        """Bytes that are there now; None where the checkpoint is here no longer, or not whole."""
        name = chosen.path.name
        with ExitStack() as stack:
            try:
                # Held open, so that they can be read to the end when the run removes them meanwhile.
                files = {file: stack.enter_context((chosen.path / file).open("rb")) for file in [*chosen.files, MANIFEST]}
            except FileNotFoundError:
                self._unusable.add(name)
                return None
            sizes = {file: os.fstat(opened.fileno()).st_size for file, opened in files.items()}
            if any(sizes[file] != facts["size"] for file, facts in chosen.files.items()):
                self._unusable.add(name)
                return None
            for file, opened in files.items():  # the manifest is the last
                if file == MANIFEST:
                    self._fence()
                try:
                    self._folder.upload(Path(f"/proc/self/fd/{opened.fileno()}"), _at(name, file))
                except FileNotFoundError as error:
                    raise StorageError(f"{within(self.place, _at(name, file))} cannot be written: {error}. Is the bucket there?") from None
        return sum(sizes.values())

    def _remove_old(self, store: CheckpointStore) -> None:
        there = self.listing()
        # What stands here stays there too: the mirror's newest may be damaged, or another driver's of the same number.
        stay = kept(self._saved(there), store.keep, store.keep_every) | {found.path.name for found in store.manifests()}
        for name, files in there.items():
            if name not in stay:  # leftovers of dead writers too
                self._fence()
                self._folder.delete([_at(name, file) for file in sorted(files, key=lambda file: file != MANIFEST)])

    # --- reading: whoever goes on from it

    def fetch(self, store: CheckpointStore, found: Checkpoint | None, warn: Callable[[str], None]) -> bool:
        """Copies the newest whole checkpoint, and the best one, into `store` if they are newer than `found`, the newest here; whether.

        Damaged ones are passed over, telling `warn`.
        """
        there = {name: files for name, files in self.listing().items() if MANIFEST in files}
        newer = [name for name in there if found is None or _number(name) > found.number]
        best = best_of(self._saved(there)) if newer else None
        if best and best != newer[0] and not (store.root / best / MANIFEST).exists():
            self._download(store, best, there[best], warn)  # before the newest: after a kill it is still newer
        return any(self._download(store, name, there[name], warn) for name in newer)

    def _download(self, store: CheckpointStore, name: str, files: Files, warn: Callable[[str], None]) -> bool:
        target = store.root / name
        try:
            problem = self._problem(name, files, target)
        except BaseException:
            if not (target / MANIFEST).exists():
                shutil.rmtree(target, ignore_errors=True)
            raise
        if problem:
            if not (target / MANIFEST).exists():
                _make(target)  # empty: the next save takes a greater number than the damaged one's
            warn(f"{within(self.place, f'{CHECKPOINTS}/{name}')} is damaged ({problem}): it is skipped for the one before.")
        return not problem

    def _problem(self, name: str, files: Files, target: Path) -> str:
        """Copies a checkpoint to `target`, manifest last, unless something is wrong with it: what."""
        try:
            text = self._folder.read_all(_at(name, MANIFEST), MAX_MANIFEST_BYTES)
            found = read_manifest(text, target)
            problem = found if isinstance(found, str) else _unfit(found, name, files)
            if isinstance(found, str) or problem:
                return problem
            _make(target)
            _check_room(target, sum(files[file] for file in found.files))
            for file, facts in found.files.items():
                if not self._fetched(_at(name, file), target / file, files[file], facts["sha256"]):
                    return f"{file} has another SHA-256 than its manifest says"
            if SCORE in files:
                with committed(target / SCORE) as score:
                    score.write(self._folder.read_all(_at(name, SCORE), MAX_SCORE_BYTES))
        except FileNotFoundError as error:
            return f"{error} is not there"
        with committed(target / MANIFEST) as manifest:
            manifest.write(text)
        return ""

    def _fetched(self, name: str, target: Path, size: int, digest: str) -> bool:
        for _ in range(2):  # bytes that only came wrong are asked for again
            self._folder.fetch(name, target, size)
            if sha256_of(target) == digest:
                sync(target)
                return True
        return False


def _at(name: str, file: str) -> str:
    return f"{CHECKPOINTS}/{name}/{file}"


def _claim(driver: tuple[int, str]) -> str:
    return f"{DRIVERS}/{driver[0]:06d}-{driver[1]}.json"


def _number(name: str) -> int:
    saved = named(name, None)
    assert saved is not None
    return saved.number


def _unfit(found: Checkpoint, name: str, files: Files) -> str:
    """Why a manifest must not be believed; "" when it may be."""
    saved = named(name, None)
    if saved is None or (found.step, found.number) != (saved.step, saved.number):
        return f"its manifest is of step {found.step}, save {found.number}"
    try:
        for file, facts in found.files.items():
            if not _FILE.fullmatch(file) or file in (MANIFEST, SCORE):
                return f"{file!r} is no name of a checkpoint's file"
            if files.get(file) != facts["size"] or not isinstance(facts["sha256"], str):
                return f"{file} has {files.get(file)} bytes, expected {facts['size']}"
        slices = [part[0] for entry in found.tensors.values() for part in entry["slices"]]  # type: ignore[index]
    except (KeyError, IndexError, TypeError) as error:
        return f"its manifest is not one: {error!r}"
    strange = [file for file in slices if file not in found.files]
    return f"its tensors are in {strange[0]!r}, which is none of its files" if strange else ""


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise JobError(f"{folder}: a checkpoint of {size} bytes does not fit, {free} are free. Free some space and run the same command.")


def _make(folder: Path) -> None:
    """An empty folder, in the place of what a killed download left, or of a damaged checkpoint."""
    with suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
