"""What several tests need: real videos where they are, and one small dataset built once by the real build."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does: two test processes share the cores

# A shell's background job ignores Ctrl-C, and so do its children: the tests that send it to theirs must not begin like that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real videos: POSMLP_TEST_DATA, by default `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("POSMLP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real videos at {folder}: set POSMLP_TEST_DATA to the folder that holds weizmann/ and jhmdb12/")
    return folder


@pytest.fixture(scope="session")
def motion_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 24 synthetic clips, built by the real build."""
    from jobs import build
    from jobs.recipe import parse_overrides
    from jobs.synthesize import synthesize

    folder = tmp_path_factory.mktemp("motion")
    synthesize(folder / "videos", num_clips=24, seed=1)
    paths = {"videos": str(folder / "videos"), "labels": str(folder / "videos" / "labels.csv"), "dir": str(folder / "dataset")}
    build.build_dataset(parse_overrides({"data": paths}, []))
    return folder / "dataset"
