"""What a cluster runs for `posmlp submit`: looks whether the job can work here, then runs the command as if it were typed on the head.

Its files are an unpacked wheel of our package, as the submitter had it, with `submission.json` beside it: the command, and what it needs
of the cluster. Prints a line that begins with PASSED or REFUSED, by which the submitter knows, and in the end the exit code.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ORDER = "submission.json"
PASSED, REFUSED, ENDED = "preflight: passed", "preflight: refused", "posmlp: exit code"
REFUSED_EXIT = 78  # EX_CONFIG of sysexits.h


def main() -> int:
    """Returns the exit code of the command, or REFUSED_EXIT."""
    order = json.loads((Path(__file__).resolve().parent.parent / ORDER).read_text(encoding="utf-8"))
    problems = _preflight(order["needs"])
    if problems:
        print(f"{REFUSED}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems), flush=True)
        return REFUSED_EXIT
    return _command(order["command"])


def _preflight(needs: dict[str, object]) -> list[str]:
    from jobs.errors import JobError
    from jobs.packages import verify_packages

    try:
        verify_packages()
    except JobError as error:
        return [f"the head: {error}"]
    from cluster.errors import ClusterError
    from cluster.ray_session import ensure_ray
    from jobs import preflight
    from jobs.submission import Needs

    try:
        ensure_ray()
        verdict = preflight.run(Needs(**needs), ORDER)  # type: ignore[arg-type]
    except ClusterError as error:
        return [str(error)]
    for note in verdict.notes:
        print(f"preflight: note: {note}")
    if not verdict.problems:
        print(f"{PASSED} on {verdict.num_nodes} nodes in {verdict.seconds:.1f} s", flush=True)
    return verdict.problems


def _command(words: Sequence[str]) -> int:
    from jobs.cli import main as posmlp

    sys.argv = ["posmlp", *words]
    try:
        posmlp()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


if __name__ == "__main__":
    exit_code = main()
    print(f"{ENDED} {exit_code}", flush=True)
    sys.exit(exit_code)
