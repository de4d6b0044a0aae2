"""What a user of Ray tasks sees when nothing happens."""

import os
import signal
import subprocess
import sys

PROGRAM = """
import os, cluster.tasks
cluster.tasks.SILENCE_S = 1.0
for _ in cluster.tasks.run_tasks(os.path.basename, ["never"], num_cpus=0):
    pass
"""


def test_tasks_that_no_machine_has_room_for_are_not_waited_for_in_silence() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said = next(line for line in process.stderr if line.startswith("waiting: "))
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert "needs 1 CPU, the largest machine of this Ray cluster has 0. Add machines" in said
