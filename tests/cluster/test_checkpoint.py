"""Promises 8 and 12: a checkpoint is whole or absent, whatever happens while it is written, and loads without pickle."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from cluster import lease
from cluster.checkpoint import MANIFEST, STATE, Array, CheckpointStore, model_state, write_safetensors
from cluster.errors import CheckpointError, FencedError

META = {"dataset": "d1", "classes": ["a", "b"], "order": {"version": 1}}


def state(step: int) -> dict[str, Array]:
    generator = np.random.Generator(np.random.Philox(step))
    return {
        "model.weight": generator.standard_normal((7, 5)).astype(np.float32),
        "exp_avg.weight": generator.standard_normal((7, 5)).astype(np.float32),
        "buffer.num_batches_tracked": np.array(step, dtype=np.int64),
        "model.empty": np.zeros((0, 3), dtype=np.float32),
    }


def equal(left: dict[str, Array], right: dict[str, Array]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left
    )


def unfenced() -> None:
    return


def no_warning(text: str) -> None:
    raise AssertionError(text)


def saved(root: Path, *steps: int, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(root, keep)
    for step in steps:
        store.save(step, state(step), META, fence=unfenced)
    return store


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    assert store.newest(warn=no_warning) is None
    saved(tmp_path / "checkpoints", 10, 20, 30)
    found = store.newest(META, warn=no_warning)
    assert found is not None
    assert (found.step, dict(found.meta)) == (30, META)
    assert equal(found.load(), state(30))
    assert [checkpoint.step for checkpoint in store.manifests()] == [30, 20]
    assert store.at(found.number).path == found.path
    with pytest.raises(CheckpointError, match="no checkpoint number 99"):
        store.at(99)


def test_model_state_is_weights_and_buffers() -> None:
    assert model_state(state(1)).keys() == {"weight", "num_batches_tracked", "empty"}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        hnp.arrays(
            st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.bool_]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
        ),
        max_size=6,
    )
)
def test_the_library_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Array]) -> None:
    path = tmp_path_factory.mktemp("tensors") / STATE
    size, digest = write_safetensors(path, tensors)
    data = path.read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (read[name].dtype, read[name].shape, read[name].tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_strided_arrays_are_written_by_value(tmp_path: Path) -> None:
    value = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
    write_safetensors(tmp_path / STATE, {"x": value})
    assert np.array_equal(load_file(tmp_path / STATE)["x"], value)


def test_a_type_that_cannot_be_held_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'x' has dtype complex128"):
        CheckpointStore(tmp_path, 1).save(1, {"x": np.zeros(2, dtype=np.complex128)}, {}, fence=unfenced)


def test_a_tensor_may_lie_in_slices_over_files(tmp_path: Path) -> None:
    store = saved(tmp_path, 5)
    folder = store.manifests()[0].path
    whole = state(5)["model.weight"]
    manifest = json.loads((folder / MANIFEST).read_text())
    for index, (start, stop) in enumerate([(0, 20), (20, 35)]):
        size, digest = write_safetensors(folder / f"part{index}", {"w": whole.reshape(-1)[start:stop]})
        manifest["files"][f"part{index}"] = {"size": size, "sha256": digest}
    slices = [["part0", "w", 0, 20], ["part1", "w", 20, 35]]
    manifest["tensors"]["model.weight"]["slices"] = slices
    (folder / MANIFEST).write_text(json.dumps(manifest))
    found = store.newest(warn=no_warning)
    assert found is not None
    assert equal(found.load(), state(5))
    manifest["tensors"]["model.weight"]["slices"] = slices[:1]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"'model\.weight' does not fit"):
        store.manifests()[0].load()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "version"])
def test_a_damaged_one_is_skipped_for_the_one_before(tmp_path: Path, harm: str) -> None:
    store = saved(tmp_path, 1, 2)
    folder = store.manifests()[0].path
    match harm:
        case "flip":
            flip(folder / STATE, -3)
        case "truncate":
            os.truncate(folder / STATE, 100)
        case "remove":
            (folder / STATE).unlink()
        case "manifest":
            os.truncate(folder / MANIFEST, 50)
        case "version":
            (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format": 1', '"format": 99'))
    warnings: list[str] = []
    found = store.newest(META, warn=warnings.append)
    assert found is not None
    assert found.step == 1
    assert equal(found.load(), state(1))
    assert len(warnings) == 1
    assert str(folder) in warnings[0]
    # The run goes on from there: what it saves now is newer than the damaged one, though its step is not larger.
    saved(tmp_path, 2)
    found = store.newest(META, warn=no_warning)
    assert found is not None
    assert equal(found.load(), state(2))


def test_with_one_kept_a_new_save_outlives_a_damaged_one_of_a_larger_step(tmp_path: Path) -> None:
    store = saved(tmp_path, 300, keep=1)
    flip(store.manifests()[0].path / STATE, -1)
    saved(tmp_path, 250, keep=1)
    found = store.newest(warn=no_warning)
    assert found is not None
    assert found.step == 250


def test_another_run_is_an_error_that_prints_both_values(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"dataset is 'd1', this run's is 'd2'"):
        store.newest({**META, "dataset": "d2"}, warn=no_warning)
    with pytest.raises(CheckpointError, match=r"decoder is None, this run's is 'x'"):
        store.newest({"decoder": "x"}, warn=no_warning)
    assert store.newest({"classes": ("a", "b")}, warn=no_warning) is not None  # JSON knows no tuples


def test_a_fenced_writer_commits_and_removes_nothing(tmp_path: Path) -> None:
    store, attempt = saved(tmp_path / "checkpoints", 1), lease.begin_attempt(tmp_path)
    calls = 0

    def overtaken() -> None:  # while the data is being written
        nonlocal calls
        calls += 1
        if calls == 2:
            lease.begin_attempt(tmp_path)
        lease.check(tmp_path, attempt)

    with pytest.raises(FencedError):
        store.save(2, state(2), META, fence=overtaken)
    assert [checkpoint.step for checkpoint in store.manifests()] == [1]
    with pytest.raises(FencedError):
        store.save(2, state(2), META, fence=lambda: lease.check(tmp_path, attempt))
    store.save(3, state(3), META, fence=unfenced)  # the new attempt clears up behind the old one
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_in_the_background_errors_surface_at_the_next_call(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    store.save_in_background(1, state(1), META, fence=unfenced)
    store.wait()
    found = store.newest(warn=no_warning)
    assert found is not None
    assert found.step == 1

    def forbidden() -> None:
        raise FencedError("overtaken")

    store.save_in_background(2, state(2), META, fence=forbidden)
    with pytest.raises(FencedError, match="overtaken"):
        store.save_in_background(3, state(3), META, fence=unfenced)
    store.wait()  # it was told once


def test_a_disk_that_refuses_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = saved(tmp_path, 3)
    large = {"x": np.zeros(100_000, dtype=np.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 4 could not be written to .*same command then resumes"):
            store.save(4, large, META, fence=unfenced)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [checkpoint.step for checkpoint in store.manifests()] == [3]
    assert len(list(tmp_path.iterdir())) == 1


def _die_at(call: int) -> None:
    """From here on, this process is killed before its `call`-th file operation; exits 0 if it makes fewer."""
    made = 0

    def profile(frame: object, event: str, function: object) -> None:
        nonlocal made
        if event != "c_call":
            return
        owner = getattr(function, "__self__", None)
        if getattr(owner, "__name__", "") in ("posix", "io", "_io") or isinstance(owner, io.IOBase):
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for tests of order, not of durability, that sync a thousand times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_kill_at_every_file_operation_of_a_save_leaves_a_whole_checkpoint(memory_path: Path) -> None:
    base = memory_path / "base"
    saved(base, 1, 2)
    (base / "step-00000009-000099-0badcafe").mkdir()  # of a dead writer
    (base / "step-00000009-000099-0badcafe" / STATE).write_bytes(b"half")
    outcomes = []
    for call in range(1, 1000):
        root = memory_path / "copy"
        shutil.copytree(base, root)
        child = os.fork()
        if child == 0:
            _die_at(call)
            CheckpointStore(root, 2).save(3, state(3), META, fence=unfenced)
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        store = CheckpointStore(root, 2)
        found = store.newest(META, warn=no_warning)
        assert found is not None
        assert found.step in (2, 3)
        assert equal(found.load(), state(found.step))
        outcomes.append(found.step)
        if call % 5 == 0 or survived:  # and the next save works, and clears up
            store.save(4, state(4), META, fence=unfenced)
            assert [checkpoint.step for checkpoint in store.manifests()] == [4, outcomes[-1]]
            assert len(list(root.iterdir())) == 2
        shutil.rmtree(root)
        if survived:
            break
    assert survived
    assert outcomes == sorted(outcomes)  # one instant before which it is absent and after which it is whole
    assert len(outcomes) > 30
    assert outcomes[0] == 2


def test_newest_every_kth_and_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step, worth in ((2, 0.5), (4, 0.1), (6, 0.9), (8, 0.2), (10, None), (12, 0.3), (14, None)):
        store.save(step, {"a": np.zeros(3, np.float32)}, {}, fence=lambda: None)
        if worth is not None:
            store.judge(store.manifests()[0], [worth, -1.0], {"note": "x"}, fence=lambda: None)
    assert [found.step for found in store.manifests()] == [14, 12, 8, 6, 4]
    best = store.best()
    assert best is not None
    assert (best.step, best.judgement()) == (6, {"format": 1, "score": [0.9, -1.0], "note": "x"})
    store.save(16, {"a": np.zeros(3, np.float32)}, {}, fence=lambda: None)
    store.judge(store.manifests()[0], [0.95, 0.0], {}, fence=lambda: None)
    assert 6 in [found.step for found in store.manifests()]  # the old best stays until the new one stands and something is saved again
    store.save(18, {"a": np.zeros(3, np.float32)}, {}, fence=lambda: None)
    assert [found.step for found in store.manifests()] == [18, 16, 12, 8, 4]


def test_of_equal_scores_the_first_is_best_and_a_torn_score_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, {"a": np.zeros(3, np.float32)}, {}, fence=lambda: None)
        store.judge(store.manifests()[0], [0.5], {}, fence=lambda: None)
    best = store.best()
    assert best is not None
    assert best.step == 1
    (best.path / "score.json").write_text('{"format": 1, "sco')
    second = store.best()
    assert second is not None
    assert second.step == 2
