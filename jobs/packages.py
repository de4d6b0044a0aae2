"""Our four packages have common names; another `model` or `jobs` on the path would be imported instead, silently."""

import importlib.util
from pathlib import Path

from jobs.errors import JobError

PACKAGES = ("pipeline", "model", "cluster", "jobs")


def verify_packages() -> None:
    """Raises JobError naming the path that shadows one of our packages. Imports none of them."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
        if found != home / name / "__init__.py":
            raise JobError(
                f"Python finds package '{name}' at {found}, not at {home / name}. Something on PYTHONPATH or in the current "
                "folder shadows it: run from another folder, or remove that path."
            )
