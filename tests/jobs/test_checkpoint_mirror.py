"""Checkpoints in an object store: a run goes on from them on an empty machine, and ends alike.

Nothing that is half-copied is taken for whole, a store that is away stops nothing, and a driver that was replaced changes nothing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cluster.checkpoint import MANIFEST, SCORE, STATE, CheckpointStore
from cluster.errors import CheckpointError, FencedError
from cluster.metrics import read_metrics
from jobs import evaluate, mirroring, train
from jobs.checkpoint_mirror import CHECKPOINTS, DRIVERS, Mirror
from jobs.cli import posmlp
from jobs.errors import JobError, RecipeError
from jobs.mirroring import mirror_of, mirrored, resume
from jobs.recipe import Recipe, load_recipe, parse_overrides
from jobs.run_folder import checkpoints, identity, newest_checkpoint, open_dataset
from pipeline.location import Location
from pipeline.options import RemoteOptions
from pipeline.remote import RemoteFolder
from tests.jobs.soak_train import Run
from tests.pipeline.s3 import CALM, Proxy, Weather, s3_server

META: dict[str, object] = {"dataset": "d", "optimizer.lr": 0.1}
AWAY = Weather({"error": 1.0})


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_server(seed=5) as server:
        yield server


@pytest.fixture(autouse=True)
def calm(proxy: Proxy) -> Iterator[None]:
    yield
    proxy.weather = CALM


@pytest.fixture(params=["store", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return f"s3://bucket/{tmp_path.name}" if request.param == "store" else tmp_path / "mirror"


def unfenced() -> None: ...


def store_in(folder: Path, keep: int = 2, keep_every: int = 0) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep, keep_every)


def save(store: CheckpointStore, step: int, score: float | None = None, meta: Mapping[str, object] = META) -> None:
    store.save(step, {"model.x": np.full(1000, step, np.float32)}, meta, fence=unfenced)
    if score is not None:
        store.judge(store.manifests()[0], [score], {}, fence=unfenced)


def copy(mirror: Mirror, store: CheckpointStore) -> list[int]:
    """The steps that were uploaded, in order."""
    steps: list[int] = []
    mirror.copy(store, META, lambda found, size, seconds: steps.append(found.step))
    return steps


def fetched(place: Location, folder: Path) -> tuple[list[int], list[str]]:
    """Steps in a fresh run folder after fetching, newest first, all of them whole; and what was said."""
    store, said = store_in(folder), list[str]()
    Mirror(place).fetch(store, None, said.append)
    for found in store.whole(META, warn=pytest.fail):
        assert found.load()["model.x"].tolist() == [found.step] * 1000
    return [found.step for found in store.manifests()], said


def steps_in(mirror: Mirror) -> list[int]:
    return [int(name[5:13]) for name, files in mirror.listing().items() if MANIFEST in files]


# --- as a user has it


def test_a_run_goes_on_from_the_mirror_and_ends_alike(tmp_path: Path, motion_dataset: Path, proxy: Proxy) -> None:
    url = "s3://bucket/runs/one"
    settings = ["train.steps=9", "launch.workers=1", "checkpoint.keep_every=3", f"checkpoint.mirror={url}", "loader.remote.retries=12"]
    run = Run(tmp_path / "run", motion_dataset, *settings)
    with run.driver() as driver:
        while run.last_step() < 1 and driver.poll() is None:
            time.sleep(0.02)
        proxy.weather = weather = Weather({"error": 1.0})
        while run.last_step() < 9 and driver.poll() is None:
            time.sleep(0.02)
        assert driver.poll() is None, "training went on to its end, which waits for the store"
        while not weather.seen["error"]:
            time.sleep(0.02)
        proxy.weather = CALM
        assert driver.wait(timeout=60) == 0, (run.folder / "driver.log").read_text()
    _, uninterrupted = run.tensors()
    events = read_metrics(run.dir / "metrics.jsonl")
    assert {event["step"] for event in events if event["event"] == "mirror"} == {3, 6, 9}

    there = RemoteFolder(url)
    there.delete([name for name in there.sizes() if "step-00000009" in name])  # as if the machine had been lost before
    shutil.rmtree(run.dir)
    run.finish()
    assert [event["step"] for event in read_metrics(run.dir / "metrics.jsonl") if event["event"] == "attempt"] == [6]
    step, resumed = run.tensors()
    assert step == 9
    assert {name: value.tobytes() for name, value in resumed.items()} == {name: value.tobytes() for name, value in uninterrupted.items()}

    recipe = load_recipe(str(run.dir / "recipe.yaml"))
    shutil.rmtree(run.dir)
    assert train.run(recipe) == 9  # nothing is trained, and there is a run folder to evaluate
    assert load_recipe(str(run.dir / "recipe.yaml")) == recipe
    assert not (run.dir / "attempts").exists()
    shutil.rmtree(run.dir / "checkpoints")
    assert evaluate.run(run.dir)["step"] == 9
    listed = CliRunner().invoke(posmlp, ["checkpoint", "list", url]).output.splitlines()
    assert [line.split()[:2] for line in listed] == [["step", step] for step in "963"]
    assert CliRunner().invoke(posmlp, ["checkpoint", "list", "s3://bucket/nothing"]).exception

    refuse_what_is_of_another_run(recipe, motion_dataset)


def refuse_what_is_of_another_run(recipe: Recipe, dataset: Path) -> None:
    other = parse_overrides(recipe.model_dump(mode="json"), ["optimizer.lr=0.5", f"run.dir={recipe.run_dir.parent / 'other'}"])
    opened = open_dataset(other, "train")
    drivers = Mirror(recipe.mirror or "")._drivers()
    for write in (False, True):
        with pytest.raises(CheckpointError, match=r"s3://bucket/runs/one/.* its optimizer\.lr is 0\.002, this run's is 0\.5\..*mirror"):
            resume(other, opened, mirror_of(other), write=write)
    assert Mirror(recipe.mirror or "")._drivers() == drivers
    assert newest_checkpoint(other, opened) is None


def test_a_store_that_does_not_answer_at_the_start(
    tmp_path: Path, motion_dataset: Path, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"run": {"dir": str(tmp_path)}, "data": {"dir": str(motion_dataset)}, "checkpoint": {"mirror": "s3://bucket/away"}}
    recipe = parse_overrides(places, ["loader.remote.retries=1", "train.micro_batch=8"])
    dataset = open_dataset(recipe, "train")
    proxy.weather = AWAY
    with pytest.raises(JobError, match=r"has no checkpoint, and checkpoint\.mirror=s3://bucket/away does not tell .* begin anew"):
        resume(recipe, dataset, mirror_of(recipe), write=True)
    proxy.weather = CALM
    gone = parse_overrides(recipe.model_dump(mode="json"), ["checkpoint.mirror=s3://bucket-that-is-not/x"])
    with pytest.raises(JobError, match="bucket-that-is-not"):
        resume(gone, dataset, mirror_of(gone), write=True)
    proxy.weather = AWAY
    save(checkpoints(recipe), 4, meta=identity(recipe, dataset))
    found = resume(recipe, dataset, mirror_of(recipe), write=True)
    assert found is not None
    assert found.step == 4
    assert "was not asked for a newer checkpoint than that of step 4" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["s3://user:secret@bucket/x", "s3://bucket/x::y", "s3://"])
def test_a_mirror_is_a_place_without_secrets(value: str) -> None:
    with pytest.raises(RecipeError, match=r"checkpoint\.mirror: got the URL"):
        parse_overrides({}, [f"checkpoint.mirror={value}"])


def test_a_mirror_may_be_a_folder_and_is_not_part_of_the_run(tmp_path: Path) -> None:
    recipe = parse_overrides({}, ["checkpoint.mirror=somewhere", "train.micro_batch=8"])
    assert recipe.mirror == Path("somewhere").absolute()
    assert recipe.numerics() == parse_overrides({}, ["train.micro_batch=8"]).numerics()


# --- beside training


def test_a_store_that_is_away_costs_no_time_and_is_said_once(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirroring, "POLL_S", 0.02)
    monkeypatch.setattr(mirroring, "RETRY_S", 0.05)
    monkeypatch.setattr(mirroring, "PATIENCE_S", 0.0)
    url, store, events = "s3://bucket/weather", store_in(tmp_path), list[Mapping[str, object]]()
    mirror = Mirror(url, RemoteOptions(retries=1))
    save(store, 1)
    proxy.weather = AWAY
    with mirrored(mirror, store, META, events.append):
        for step in (2, 3, 4):
            save(store, step)
            end = time.monotonic() + 20
            while not events and time.monotonic() < end:
                time.sleep(0.02)
        time.sleep(1.0)  # more than one retry
        assert [list(event) for event in events] == [["event", "error"]]
        assert "failed 2 times" in str(events[0]["error"])
        proxy.weather = CALM
    assert [event.get("step") for event in events[1:]] == [4]
    assert steps_in(mirror) == [4]


def beside(
    mirror: Mirror, store: CheckpointStore, step: int | None = None, error: BaseException | None = None
) -> list[Mapping[str, object]]:
    """A block that saves `step` and ends, with `error` if there is one; what was told meanwhile."""
    events: list[Mapping[str, object]] = []
    with mirrored(mirror, store, META, events.append):
        if step is not None:
            save(store, step)
        if error is not None:
            raise error
    return events


def test_at_the_end_it_is_an_error_and_the_same_command_copies(tmp_path: Path, proxy: Proxy) -> None:
    store, mirror = store_in(tmp_path), Mirror("s3://bucket/end", RemoteOptions(retries=0))
    proxy.weather = AWAY
    with pytest.raises(JobError, match=r"is not in checkpoint\.mirror=s3://bucket/end: .* Run the same command again, which copies it"):
        beside(mirror, store, 1)
    with pytest.raises(ZeroDivisionError):  # the block's own error comes first
        beside(mirror, store, error=ZeroDivisionError())
    proxy.weather = CALM
    assert [event["step"] for event in beside(mirror, store)] == [1]
    assert steps_in(mirror) == [1]


def test_a_stopped_run_is_copied_an_interrupted_one_does_not_wait(tmp_path: Path, proxy: Proxy) -> None:
    store, mirror = store_in(tmp_path), Mirror("s3://bucket/stopped")
    with pytest.raises(ZeroDivisionError):
        beside(mirror, store, 1, ZeroDivisionError())
    assert steps_in(mirror) == [1]
    proxy.weather = Weather({}, latency_s=15.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        beside(mirror, store, 2, KeyboardInterrupt())
    assert time.monotonic() - began < 10


# --- what is there, and what stays


def test_the_newest_is_copied_and_the_policy_holds_there_too(tmp_path: Path, place: Location) -> None:
    """keep=2, keep_every=4, the best at step 3: what was skipped is not copied later, unless it stays for good."""
    store, mirror = store_in(tmp_path, 2, 4), Mirror(place)
    assert copy(mirror, store) == []
    for step in (1, 2):
        save(store, step)
    assert copy(mirror, store) == [2]
    save(store, 3, 0.9)
    assert copy(mirror, store) == [3]
    for step in (4, 5, 6, 7):
        save(store, step, 0.5)
    assert copy(mirror, store) == [7, 4]
    assert steps_in(mirror) == [7, 4, 3]  # 2 newest: 7 and 4; regular: 4; best: 3
    save(store, 8)
    assert copy(mirror, store) == [8]
    assert steps_in(mirror) == [8, 7, 4, 3]
    store.judge(store.manifests()[0], [0.95], {}, fence=unfenced)
    assert copy(mirror, store) == []
    save(store, 9)
    assert copy(mirror, store) == [9]
    assert steps_in(mirror) == [9, 8, 4] == [found.step for found in store.manifests()]
    assert [SCORE in files for files in mirror.listing().values()] == [False, True, True]
    assert fetched(place, tmp_path / "fresh") == ([9, 8], [])


def test_the_best_comes_along_and_what_is_not_newer_stays_away(tmp_path: Path, place: Location) -> None:
    store, mirror = store_in(tmp_path, 1), Mirror(place)
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.5)):
        save(store, step, score)
        copy(mirror, store)
    assert fetched(place, tmp_path / "fresh") == ([3, 1], [])
    fresh = store_in(tmp_path / "fresh")
    best, newest = fresh.best(), fresh.newest(META, warn=pytest.fail)
    assert best is not None
    assert newest is not None
    assert (best.step, newest.step) == (1, 3)
    assert not Mirror(place).fetch(fresh, newest, pytest.fail)
    save(fresh, 4)  # the run goes on there, with the next number
    assert copy(mirror, fresh) == [4]
    assert fresh.manifests()[0].number == 4
    assert Mirror(place).fetch(store, store.manifests()[0], pytest.fail)
    assert store.manifests()[0].step == 4


def test_strangers_are_left_alone(tmp_path: Path, proxy: Proxy) -> None:
    there = RemoteFolder("s3://bucket/strangers")
    strangers = ["recipe.yaml", "checkpoints/notes.txt", "checkpoints/step-1/manifest.json", "checkpoints/step-00000001-000001-0/x"]
    for name in strangers:
        there.create(name, b"mine")
    store, mirror = store_in(tmp_path, 1), Mirror("s3://bucket/strangers")
    for step in (1, 2):
        save(store, step)
        copy(mirror, store)
    assert set(strangers) < set(there.sizes())
    assert steps_in(mirror) == [2]


def test_what_the_run_removes_meanwhile_is_still_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = tmp_path / "mirror", store_in(tmp_path, 1)
    save(store, 1)
    mirror = Mirror(place)
    upload = mirror._folder.upload

    def slow(file: Path, name: str) -> None:
        if not (place / CHECKPOINTS).exists():
            save(store, 2)  # which removes the first one
        upload(file, name)

    monkeypatch.setattr(mirror._folder, "upload", slow)
    assert copy(mirror, store) == [1, 2]
    assert fetched(place, tmp_path / "fresh") == ([2], [])


# --- kills, damage, fences


class Killed(BaseException):
    """The end of a process, at one of its calls to the store."""


def killing(mirror: Mirror, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror's process dies at its call number `after`; an upload then has copied half a file where a store would let it."""
    calls = iter(range(1000))

    def dying(call: object, name: str) -> object:
        def step(*arguments: object) -> object:
            if next(calls) < after:
                return call(*arguments)  # type: ignore[operator]
            if name == "upload" and str(arguments[1]).endswith(STATE):
                path = mirror.place / str(arguments[1])  # type: ignore[operator]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(Path(str(arguments[0])).read_bytes()[:1000])
            raise Killed

        return step

    for name in ("upload", "delete", "create", "sizes"):
        monkeypatch.setattr(mirror._folder, name, dying(getattr(mirror._folder, name), name))


def test_a_kill_at_any_call_leaves_a_whole_one_and_the_next_driver_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, after = store_in(tmp_path / "first", 1), 0
    save(first, 1)
    copy(Mirror(tmp_path / "begun"), first)
    save(first, 2)
    done = False
    while not done:
        place = tmp_path / f"mirror-{after}"
        shutil.copytree(tmp_path / "begun", place)
        mirror = Mirror(place)
        killing(mirror, after, monkeypatch)
        try:
            copy(mirror, first)
            done = True
        except Killed:
            after += 1
        steps, said = fetched(place, tmp_path / f"fresh-{after}-{done}")
        assert steps in ([1], [2])
        assert not said
        copy(Mirror(place), first)
        assert sorted(path.name for path in place.glob("checkpoints/*/*")) == [MANIFEST, STATE]
        assert fetched(place, tmp_path / f"again-{after}-{done}")[0] == [2]
    assert after >= 10


@pytest.mark.parametrize("harm", ["cut", "flipped", "no state", "no manifest", "torn manifest", "another step", "outside", "list", "deep"])
def test_what_is_not_whole_is_skipped_for_the_one_before(tmp_path: Path, proxy: Proxy, harm: str) -> None:
    url = f"s3://bucket/harm/{harm.replace(' ', '-')}"
    store, mirror, there = store_in(tmp_path), Mirror(url), RemoteFolder(url)
    for step in (1, 2):
        save(store, step)
        copy(mirror, store)
    newest = store.manifests()[0].path
    name = f"{CHECKPOINTS}/{newest.name}"
    state, manifest = bytearray((newest / STATE).read_bytes()), json.loads((newest / MANIFEST).read_text())
    if harm == "outside":
        for file in list(manifest["files"]):
            manifest["files"][f"../../../{file}"] = manifest["files"].pop(file)
        there.create(f"{name}/../../../{STATE}", bytes(state))
    elif harm == "another step":
        manifest["step"] = 10**9
    elif harm == "flipped":
        state[-1] ^= 1
    elif harm == "cut":
        del state[-1000:]
    texts = {"torn manifest": b'{"format": 1, "step":', "list": b"[]", "deep": b"[" * 100_000}
    there.delete([f"{name}/{MANIFEST}", f"{name}/{STATE}"])
    if harm != "no state":
        there.create(f"{name}/{STATE}", bytes(state))
    if harm != "no manifest":
        there.create(f"{name}/{MANIFEST}", texts.get(harm, json.dumps(manifest).encode()))
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    steps, said = fetched(url, tmp_path / "fresh" / "run")
    assert steps == [1]
    assert len(said) == (0 if harm == "no manifest" else 1)
    assert all(f"{url}/{name} is damaged" in text for text in said)
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - files
    folder = next((tmp_path / "fresh" / "run" / "checkpoints").glob("step-00000001-*"))
    assert written == {folder / STATE, folder / MANIFEST}
    fresh = store_in(tmp_path / "fresh" / "run", 1)
    save(fresh, 3)
    assert fresh.manifests()[0].number == (2 if harm == "no manifest" else 3)
    copy(mirror := Mirror(url), fresh)
    assert steps_in(mirror) == [3]
    assert fetched(url, tmp_path / "next") == ([3], [])


def test_bytes_that_only_come_wrong_are_asked_for_again(tmp_path: Path, proxy: Proxy) -> None:
    url, store = "s3://bucket/flips", store_in(tmp_path)
    save(store, 1)
    copy(Mirror(url), store)
    proxy.weather = Weather({"error": 0.1, "reset": 0.1, "cut": 0.1, "lie": 0.1})
    assert fetched(url, tmp_path / "first") == ([1], [])
    mirror, flips = Mirror(url), iter([1, 0, 0, 0])
    fetch = mirror._folder.fetch

    def flipping(name: str, target: Path, size: int) -> None:
        fetch(name, target, size)
        data = bytearray(target.read_bytes())
        data[-1] ^= next(flips)
        target.write_bytes(data)

    mirror._folder.fetch = flipping  # type: ignore[method-assign]
    assert mirror.fetch(store_in(tmp_path / "second"), None, pytest.fail)


def test_a_damaged_one_here_is_replaced_and_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = tmp_path / "mirror", store_in(tmp_path)
    for step in (1, 2):
        save(store, step)
        copy(Mirror(place), store)
    damaged = store.manifests()[0].path / STATE
    damaged.write_bytes(b"")
    found = store.newest(META, warn=lambda text: None)
    assert found is not None
    assert found.step == 1
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        with pytest.raises(JobError, match=r"a checkpoint of \d+ bytes does not fit, 0 are free"):
            Mirror(place).fetch(store_in(tmp_path / "full"), None, pytest.fail)
        assert not list((tmp_path / "full").rglob("step-*"))
    assert Mirror(place).fetch(store, found, pytest.fail)
    newest = store.newest(META, warn=pytest.fail)
    assert newest is not None
    assert newest.step == 2


def test_a_damaged_newest_there_costs_no_whole_one(tmp_path: Path) -> None:
    """keep=1, resumed from the one before: that one stays there until a new one is."""
    place, first, second = tmp_path / "mirror", store_in(tmp_path / "first", 1), store_in(tmp_path / "second", 1)
    save(first, 1)
    copy(Mirror(place), first)
    shutil.copytree(place, tmp_path / "copy")
    save(first, 2)
    copy(Mirror(place), first)
    shutil.copytree(tmp_path / "copy", place, dirs_exist_ok=True)  # as if the removal had not been made
    (place / CHECKPOINTS / first.manifests()[0].path.name / STATE).write_bytes(b"")
    mirror = Mirror(place)
    assert mirror.fetch(second, None, lambda text: None)
    copy(mirror, second)
    assert steps_in(mirror) == [2, 1]
    save(second, 2)
    copy(mirror, second)
    assert fetched(place, tmp_path / "third") == ([2], [])


def digest(folder: RemoteFolder) -> dict[str, str]:
    return {name: hashlib.sha256(folder.read_all(name, 1 << 20)).hexdigest() for name in folder.sizes()}


def test_a_driver_that_should_be_dead_changes_nothing(tmp_path: Path, proxy: Proxy) -> None:
    url = "s3://bucket/fence"
    old, new, there = Mirror(url), Mirror(url), RemoteFolder(url)
    ours, theirs = store_in(tmp_path / "old", 1), store_in(tmp_path / "new", 1)
    save(ours, 1)
    copy(old, ours)
    new.fetch(theirs, None, pytest.fail)
    new.claim(theirs, META)
    save(theirs, 2)
    copy(new, theirs)
    before = digest(there)
    assert len([name for name in before if name.startswith(DRIVERS)]) == 1
    for step in (2, 3, 4):
        save(ours, step)
        with pytest.raises(FencedError, match="another driver of this run has begun since"):
            copy(old, ours)
    assert digest(there) == before
    with pytest.raises(FencedError):
        beside(old, ours)
    assert digest(there) == before


def test_a_driver_overtaken_during_its_upload_does_not_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = tmp_path / "mirror", store_in(tmp_path)
    save(store, 1)
    old = Mirror(place)
    upload = old._folder.upload

    def overtaken(file: Path, name: str) -> None:
        upload(file, name)
        Mirror(place).claim(store, META)

    monkeypatch.setattr(old._folder, "upload", overtaken)
    with pytest.raises(FencedError):
        copy(old, store)
    assert steps_in(old) == []


def test_it_is_not_written_to_before_it_is_known_to_be_this_runs(tmp_path: Path, place: Location) -> None:
    store = store_in(tmp_path)
    save(store, 1)
    copy(Mirror(place), store)
    other = Mirror(place)
    with pytest.raises(CheckpointError, match=r"its dataset is 'd', this run's is 'e'\. .*another checkpoint\.mirror"):
        other.copy(store, {"dataset": "e"}, lambda found, size, seconds: None)
    assert len(other._drivers()) == 1


def test_errors_of_a_folder_are_no_end(tmp_path: Path) -> None:
    """A mirror on a disk that is not mounted any more: said, tried again."""
    (tmp_path / "mirror").write_text("not a folder")
    store = store_in(tmp_path)
    with pytest.raises(JobError, match=r"is not in checkpoint\.mirror"):
        beside(Mirror(tmp_path / "mirror"), store, 1)
    (tmp_path / "mirror").unlink()
    beside(Mirror(tmp_path / "mirror"), store)
    assert steps_in(Mirror(tmp_path / "mirror")) == [1]
