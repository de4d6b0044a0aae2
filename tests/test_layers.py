"""The house stands as ARCHITECTURE.md draws it: layers, pure files, lazy imports, exactly four packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "nvidia", "ray", "deepspeed", "webdataset", "av", "fsspec"}
PURE = [
    "pipeline.errors",
    "pipeline.options",
    "pipeline.labels",
    "pipeline.label_file",
    "pipeline.class_file",
    "pipeline.box_labels",
    "pipeline.boxes",
    "pipeline.downloads",
    "pipeline.frame_folder",
    "pipeline.tar_source",
    "pipeline.manifest",
    "pipeline.index",
    "pipeline.order",
    "pipeline.keyed",
    "pipeline.augmentation",
    "pipeline.requests",
    "pipeline.prefetch",
    "pipeline.quarantine",
    "pipeline.canonical",
    "pipeline.durable",
    "pipeline.location",
    "pipeline.remote",
    "pipeline.folder",
    "pipeline.cache",
    "pipeline.overlay",
    "pipeline.video_folder",
    "pipeline.source_files",
    "cluster.errors",
    "cluster.options",
    "cluster.topology",
    "cluster.schedule",
    "cluster.lease",
    "cluster.checkpoint",
    "cluster.retention",
    "cluster.metrics",
    "model.presets",
    "jobs.errors",
    "jobs.recipe",
]


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", PURE)
def test_pure_files_import_no_framework(module: str) -> None:
    loaded = set(fresh(f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})").split())
    assert not loaded & HEAVY


def test_help_is_lazy() -> None:
    # The command line must answer before a framework could have been imported.
    modules = set(fresh("import sys, jobs.cli; print(*{name.split('.')[0] for name in sys.modules})").split())
    assert not modules & (HEAVY | {"pydantic", "pyarrow", "numpy"})


def test_four_packages_and_no_more() -> None:
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} == {"pipeline", "model", "cluster", "jobs"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == {"pipeline", "model", "cluster", "jobs"}


def test_a_shadowing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("")
    code = f"import jobs.packages, sys; sys.path.insert(0, {str(tmp_path)!r}); jobs.packages.verify_packages()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert f"JobError: Python finds package 'model' at {tmp_path}/model/__init__.py" in done.stderr
