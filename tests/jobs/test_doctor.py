"""The doctor tries, in processes of their own: what crashes, hangs or is missing becomes a line with a remedy, and an exit code."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import doctor, probes, probes_video
from jobs.doctor import Probe, run_probe
from jobs.probes import Check

HERE = "tests.jobs.test_doctor"


def crashing() -> Iterator[Check]:
    yield Check(name="before", ok=True, required=False, detail="")
    ctypes.string_at(0)


def hanging() -> Iterator[Check]:
    child = subprocess.Popen(["sleep", "600"])
    yield Check(name="child", ok=True, required=False, detail=str(child.pid))
    time.sleep(600)


def raising() -> Iterator[Check]:
    print("noise that is no answer")
    raise ImportError("libsomething.so: cannot open shared object file")
    yield


def test_a_machine_that_runs_these_tests_is_ready(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "doctor", "--json", "--dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    result = json.loads(done.stdout)
    failed = [check for check in result["checks"] if check["required"] and not check["ok"]]
    assert done.returncode == 0, failed
    assert result["ok"]
    by_name = {check["name"]: check for check in result["checks"]}
    assert {"Python", "torch", "Ray", "DeepSpeed", "disk", "memory", "shared memory", "loopback ports", "open files"} <= by_name.keys()
    assert by_name["DALI decodes vp9 on the CPU"]["ok"]  # really decoded: the detail says how well
    assert "of 255" in by_name["DALI decodes vp9 on the CPU"]["detail"]
    assert str(tmp_path) in by_name["disk"]["detail"]
    assert all(check["remedy"] for check in result["checks"] if not check["ok"])
    assert "looking: " in done.stderr


def test_a_crash_costs_one_line() -> None:
    before, crash = run_probe(Probe(name="x", entry=f"{HERE}:crashing", remedy="mend it"))
    assert before.name == "before"
    assert (crash.name, crash.ok, crash.required, crash.remedy) == ("x", False, True, "mend it")
    assert "SIGSEGV" in crash.detail


def test_a_hang_ends_with_all_its_children() -> None:
    child, hang = run_probe(Probe(name="x", entry=f"{HERE}:hanging", required=False), timeout_s=3)
    assert "no answer within 3 s" in hang.detail
    assert not hang.required
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(child.detail)) and psutil.Process(int(child.detail)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "doctor", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    assert time.monotonic() - began < 30  # probes that hang would have their 60 seconds
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)


def test_an_exception_is_told_by_its_last_line() -> None:
    (check,) = run_probe(Probe(name="x", entry=f"{HERE}:raising"))
    assert check.detail == "ImportError: libsomething.so: cannot open shared object file"


def test_a_broken_library_makes_the_machine_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('made for another torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = run_probe(Probe(name="DeepSpeed", entry="jobs.probes:deepspeed_loads"))
    assert not doctor.healthy(checks)
    doctor.show(checks)
    shown = capsys.readouterr().out
    assert "not ready: DeepSpeed" in shown
    assert "made for another torch" in shown
    assert "-> Install" in shown


def test_few_open_files_are_noticed() -> None:
    code = (
        f"import json; from dataclasses import asdict; from {probes.__name__} import _open_files; print(json.dumps(asdict(_open_files())))"
    )
    limit = 256
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096)),
    )
    check = Check(**json.loads(done.stdout))
    assert (check.ok, check.required) == (False, True)
    assert "ulimit -n 4096" in check.remedy


def test_a_folder_that_cannot_be_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = list(probes.disk("/proc/sys/nowhere"))
    assert (checks[0].ok, checks[0].required) == (False, True)
    assert "/proc/sys" in checks[0].detail
    assert checks[1].ok


def test_decoding_is_checked_by_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    video = probes_video.tiny_video("mjpeg")
    monkeypatch.setattr(probes_video, "grey_level", lambda frame: 240 - 20 * frame)
    monkeypatch.setattr(probes_video, "tiny_video", lambda codec: video)  # its frames come in the wrong order now
    check = probes_video._dali("x", "mjpeg", None, required=False)
    assert not check.ok


def test_a_codec_that_cannot_be_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes_video.ENCODERS, "vp9", ("libnowhere", "webm"))
    check = probes_video._dali("x", "vp9", None, required=False)
    assert not check.ok
    assert "no encoder libnowhere" in check.detail


def test_disk_of_a_run_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    check = next(iter(probes.disk(str(tmp_path / "not" / "yet"))))
    assert check.ok
    assert check.detail.endswith(str(tmp_path))
    assert not os.listdir(tmp_path)
