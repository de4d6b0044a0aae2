"""A run's figures on Ray's metrics endpoint, which Prometheus scrapes: gauges named ray_posmlp_... (docs/grafana.json shows them)."""

import sys
from collections.abc import Callable, Mapping

NAMES = ("step", "epoch", "loss", "lr", "grad_norm", "clips_per_s", "data_wait", "step_s", "flops_share", "top1")


def gauges(run: str) -> Callable[[Mapping[str, object]], None] | None:
    """Shows an event's figures, tagged with the run's name; None in a process that is not Ray's."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.util.metrics import Gauge

    made = {name: Gauge(f"posmlp_{name}", description=f"{name} of a PosMLP-Video training", tag_keys=("run",)) for name in NAMES}

    def show(event: Mapping[str, object]) -> None:
        for name, gauge in made.items():
            value = event.get(name)
            if isinstance(value, int | float):
                gauge.set(value, tags={"run": run})

    return show
