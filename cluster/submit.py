"""Jobs on a running Ray cluster, over the HTTP address of its dashboard. The only file that knows Ray's Jobs API.

A cluster that takes orders from anybody is refused, unless it is on this very machine's loopback interface. Whether it does is asked
without a token before anything is sent.
"""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import requests

from cluster.errors import SubmitError
from cluster.job import STOPPED_EXIT
from cluster.openness import CLOSE_IT, on_loopback

State: TypeAlias = Literal["pending", "running", "finished", "failed", "stopped"]

CONNECT_S, REQUEST_S = 5.0, 30.0  # how long a head may take to answer at all, and to answer in full
STOP_WAIT_S = 900  # from SIGTERM to SIGKILL: a step, a save
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_STATES: Mapping[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as the cluster knows it. state: "stopped" also when it ended itself early with everything saved (exit code 75).

    exit_code: of its command, None before its end or when the cluster ended it. message: why it failed.
    started, ended: seconds since 1970. metadata: what was submitted with it.
    """

    id: str
    state: State
    exit_code: int | None
    message: str
    started: float
    ended: float | None
    metadata: Mapping[str, str]
    environment: Mapping[str, object]

    @property
    def over(self) -> bool:
        return self.state not in ("pending", "running")


def address_of(address: str | None) -> str:
    """The dashboard's URL: as given, or what RAY_API_SERVER_ADDRESS or RAY_ADDRESS say. Raises SubmitError when that is no HTTP address."""
    for name, value in [("--address", address), *((name, os.environ.get(name)) for name in ADDRESS_VARIABLES)]:
        if value and urlsplit(value).scheme in ("http", "https") and urlsplit(value).hostname:
            return value.rstrip("/")
        if value and name == "--address":
            raise SubmitError(f"--address {value}: expected the address of the cluster's dashboard, for example http://HEAD:8265.")
    raise SubmitError("Which cluster? Add --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS to that.")


class Jobs:
    """The jobs of one cluster. Raises SubmitError when it does not answer, is open to anybody, or refuses our token."""

    def __init__(self, address: str) -> None:
        self.address = address
        closed = self._needs_token()
        if not closed and not on_loopback(urlsplit(address).hostname or ""):
            raise SubmitError(f"{address}: this Ray cluster asks for no token. {CLOSE_IT}")
        if closed:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported; it then looks for the token where Ray keeps it
        self._client = self._connect()

    def _needs_token(self) -> bool:
        try:
            answer = requests.get(f"{self.address}/api/jobs/", timeout=(CONNECT_S, REQUEST_S), allow_redirects=False)
        except requests.RequestException as error:
            raise SubmitError(
                f"{self.address}: no Ray dashboard answers there ({_reason(error)}). Is that the head, and its port?"
            ) from None
        if answer.status_code == 200 and not answer.headers.get("Content-Type", "").startswith("application/json"):
            raise SubmitError(f"{self.address}: something answers there, but not Ray's Jobs API.")
        return bool(answer.status_code != 200)

    def _connect(self) -> Any:
        from cluster.ray_session import ray  # with its settings; takes a second

        from ray.job_submission import JobSubmissionClient  # isort: skip

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):  # which say what they upload
            logging.getLogger(name).setLevel(logging.WARNING)

        class Client(JobSubmissionClient):  # type: ignore[misc]
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": (CONNECT_S, REQUEST_S), **options})

        kept = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}  # they would win over our address
        try:
            return Client(self.address)
        except ray.exceptions.AuthenticationError as error:
            raise SubmitError(
                f"{self.address}: the cluster refuses this token: {str(error).splitlines()[0]} Ask for the cluster's token and set "
                "RAY_AUTH_TOKEN_PATH to the file that holds it."
            ) from None
        except (ConnectionError, RuntimeError, requests.RequestException) as error:
            raise SubmitError(f"{self.address}: {_reason(error)}") from None
        finally:
            os.environ.update(kept)

    def submit(
        self, name: str, command: Sequence[str], *, folder: Path | None, like: Submission | None, metadata: Mapping[str, str]
    ) -> bool:
        """Runs a command on the head, with `folder` (or what `like` was submitted with) as its working folder and first on every
        Python's path. name: its id. False when a job of that id is there already, which is then left alone."""
        files = {"working_dir": str(folder)} if like is None else {"working_dir": like.environment["working_dir"]}
        environment = {**files, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        try:
            self._client.submit_job(entrypoint=shlex.join(command), submission_id=name, runtime_env=environment, metadata=dict(metadata))
        except (RuntimeError, requests.RequestException) as error:
            if f"{name} already exists" in str(error):
                return False
            raise SubmitError(f"{self.address}: the job was not taken: {_reason(error)}") from None
        return True

    def all(self) -> list[Submission]:
        """Every submitted job, the newest first."""
        found = [_submission(details) for details in self._ask(self._client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: -job.started)

    def get(self, name: str) -> Submission:
        return _submission(self._ask(self._client.get_job_info, name))

    def log(self, name: str) -> str:
        """What the job has printed so far."""
        return str(self._ask(self._client.get_job_logs, name))

    def stop(self, name: str) -> None:
        """Sends SIGTERM to the job's processes, and SIGKILL after STOP_WAIT_S. Returns at once."""
        self._ask(self._client.stop_job, name)

    def delete(self, name: str) -> None:
        """Forgets a job that is over."""
        self._ask(self._client.delete_job, name)

    def _ask(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except (RuntimeError, ConnectionError, requests.RequestException) as error:
            raise SubmitError(f"{self.address}: {_reason(error)}") from None


def _submission(details: Any) -> Submission:
    stopped = details.driver_exit_code == STOPPED_EXIT
    return Submission(
        id=details.submission_id,
        state="stopped" if stopped else _STATES[str(getattr(details.status, "value", details.status))],
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=details.metadata or {},
        environment=details.runtime_env or {},
    )


def _reason(error: Exception) -> str:
    """One line of what went wrong. Of a lost connection the innermost reason, without the library's account of it."""
    inner: BaseException = error
    while inner.__context__ is not None:
        inner = inner.__context__
    text = str(error) if isinstance(error, RuntimeError) else str(inner)
    return " ".join(text.split())[-400:]
