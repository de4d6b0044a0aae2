"""The measurements of the build and its encodings: they run, on few videos, and their figures are of what they say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs import bench_build, bench_encode, bench_restart
from jobs.bench_cpu import family_cpu_s
from jobs.cli import posmlp
from jobs.errors import JobError
from pipeline.media import write_video
from pipeline.options import EncodeOptions
from tests.pipeline.numbered import number_image


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        noisy = (number_image(40 * number + i, 160, 128) + rng.normal(0, 6, (128, 160, 1)) for i in range(40))
        frames = [np.clip(image, 0, 255).astype(np.uint8) for image in noisy]
        write_video(folder / f"{number}.mp4", frames, 25.0, EncodeOptions(crf=8))
    (folder / "notes.txt").write_text("no video")
    (folder / "broken.mp4").write_bytes(b"no video either")
    return folder


def test_encoding_choices(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (bench_encode.DEFAULTS, bench_encode.LAYERED, "crf=18", "short_side=128", "fps=15")
    monkeypatch.setattr(bench_encode, "CHOICES", {choice: bench_encode.CHOICES[choice] for choice in kept})
    rows = {row.choice: row for row in bench_encode.run(videos, num_videos=2, repeats=1, frames=8)}
    assert list(rows) == [*kept[:2], bench_encode.BASE, *kept[2:]]
    default, finer = rows[bench_encode.DEFAULTS], rows["crf=18"]
    assert finer.psnr > default.psnr > 20
    assert 1 > finer.ssim > default.ssim > 0.5
    assert finer.share > default.share > 0
    assert finer.kbit_s > default.kbit_s > 0
    assert all(len(row.rates) == 1 and row.rates[0] > 0 for row in rows.values())
    assert all(line.count("|") == 10 for line in bench_encode.table(list(rows.values())).splitlines())


def test_a_folder_without_videos_that_are_long_enough(videos: Path) -> None:
    done = CliRunner().invoke(posmlp, ["bench", "encode", str(videos), "--frames", "100"])
    assert isinstance(done.exception, JobError)
    assert "no video of 397 frames or more" in str(done.exception)


def test_building_against_ffmpeg(videos: Path, tmp_path: Path) -> None:
    found = bench_build._videos(videos, tmp_path, 10)
    assert [source.path for source in found.sources] == ["0.mp4", "1.mp4"]
    assert found.sizes == [(160, 128)] * 2
    assert found.seconds == pytest.approx(3.2)
    assert bench_build._task(found, tmp_path / "task") > 0
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    assert 0.2 < bench_build._commands([busy] * 2) < 2
    with pytest.raises(JobError, match="exit code 3: no such codec"):
        bench_build._commands([[sys.executable, "-c", "import sys; sys.stderr.write('no such codec'); sys.exit(3)"]])


def test_cpu_time_of_all_processes_below() -> None:
    """Of children that are still there, and of a grandchild that one of them waited for."""
    busy = "import time\nwhile time.process_time() < 1: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}]); print('done', flush=True); sys.stdin.read()"
    before = family_cpu_s()
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert family_cpu_s() - before > 0.9  # the kernel tells whole hundredths only, of each process and kind


def test_without_ffmpeg_the_table_says_so() -> None:
    times = {bench_build.TASK: [50.0], **{name: [60.0] for name in bench_build.BUILDS.values()}}
    missing = {bench_build.FFMPEG: "ffmpeg is not installed (apt-get install ffmpeg)"}
    result = bench_build.Result(num_videos=2, seconds=4.0, cpu_ms=times, start_ms=None, missing=missing)
    text = bench_build.table(result)
    assert "not measured: ffmpeg is not installed" in text
    assert "two workers / one: 1.00" in text
    assert "task / ffmpeg" not in text


def test_from_a_kill_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_restart, "HARMS", ("worker killed", "driver killed"))  # a stopped one takes 20 s to be noticed
    worker, driver = bench_restart.run(["local"], 1)
    for row in (worker, driver):
        seconds = [float(str(row[part])) for part in bench_restart.PARTS]
        assert all(part > 0 for part in seconds[1:])
        assert row["lowest"] == row["whole"] == row["highest"] == pytest.approx(sum(seconds), abs=0.2)
    assert float(str(worker["noticed"])) > 0 == driver["noticed"]
    assert bench_restart.table([worker, driver]).count("killed") == 2


def test_no_round_measures_nothing() -> None:
    for command in ("restart", "train"):
        assert CliRunner().invoke(posmlp, ["bench", command, "--rounds", "0"]).exit_code == 2
