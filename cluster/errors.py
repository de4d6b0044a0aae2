"""What can go wrong with a run, for users. Every message says what, where, what was expected and the next step.

ClusterError
├── TopologyError      batches, micro-batches and workers do not divide
├── CheckpointError    a checkpoint is missing, damaged, or of another run
├── LaunchError        workers could not start, or died more often than the restart budget allows
├── SubmitError        a cluster does not answer, takes orders from anybody, or refuses a job
├── StoppedError       it was asked to stop before its end, and did; the same command goes on
└── FencedError        another, newer driver owns this run folder
"""


class ClusterError(Exception):
    """Base of every error a user of `cluster` may see; its text is written for that user."""


class TopologyError(ClusterError):
    """Batches, micro-batches and workers do not divide."""


class CheckpointError(ClusterError):
    """A checkpoint is missing, damaged or of another run."""


class LaunchError(ClusterError):
    """Workers could not start, or died more often than allowed."""


class SubmitError(ClusterError):
    """A cluster does not answer, takes orders from anybody, or refuses a job."""


class StoppedError(ClusterError):
    """It was asked to stop before its end, and did: not a failure. The same command goes on."""


class FencedError(ClusterError):
    """Another, newer driver owns this run folder; this one must not write to it."""
