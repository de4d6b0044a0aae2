"""What can go wrong with data, for users. Every message says what, where, what was expected and the next step.

PipelineError
├── ManifestError      labels or videos that the user gave do not fit together
├── DatasetError       a built dataset is missing, damaged or of another version
├── SampleError        one item's bytes cannot be read, checked or decoded
│   ├── ChecksumError      the bytes are not the bytes that were built
│   └── DecodeError        the bytes do not decode to the frames that the index promises
├── StorageError       an object store cannot be reached, or refuses
└── BudgetError        more damaged samples than the run allows
"""


class PipelineError(Exception):
    """Base of every error a user of `pipeline` may see; its text is written for that user."""


class ManifestError(PipelineError):
    """Videos and labels do not fit together."""


class DatasetError(PipelineError):
    """A built dataset is missing, incomplete, altered or of another version."""


class StorageError(PipelineError):
    """An object store failed for longer than is tried again, or refuses. Says nothing about the data: the same command goes on."""


class SampleError(PipelineError):
    """One item cannot be delivered. `key` names the video, `shard` the file that holds it."""

    def __init__(self, message: str, *, key: str, shard: str) -> None:
        super().__init__(f"{message} (video '{key}' in {shard})")
        self.key = key
        self.shard = shard


class ChecksumError(SampleError):
    """The bytes read differ from the bytes built."""


class DecodeError(SampleError):
    """The bytes do not decode to the promised frames."""


class BudgetError(PipelineError):
    """More samples were damaged than the run's budget allows."""
