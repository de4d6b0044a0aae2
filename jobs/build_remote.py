"""A build whose dataset lies in an object store.

    URL/build/plan.json            created only if there is none
    URL/shards/shard-000000.tar    uploaded by the task that made it, one PUT or one completed multipart upload
    URL/build/shard-000000.arrow   uploaded after it: where it exists, the shard is finished
    URL/quarantine.parquet, boxes.arrow, index.arrow, likeness.arrow, dataset.json   in this order; then build/ is removed

The driver works as for a local folder, in a temporary one that begins as a copy of what is finished at the URL, shards excepted. All that
a build knows is at the URL, so that any machine goes on with it. Two builds of one plan at a time waste work and make the same bytes.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pipeline.errors import DatasetError
from pipeline.index import MAX_INFO_BYTES, DatasetInfo
from pipeline.remote import RemoteFolder

PLAN = "build/plan.json"


class Upload:
    """The dataset at a URL while it is built. folder: where the driver works; its files become those at the URL."""

    def __init__(self, url: str, folder: Path) -> None:
        if url.startswith("memory:"):
            raise DatasetError(f"{url} is the memory of one process, and a build has several. Choose a folder or an object store.")
        self.url, self.folder = url, folder
        self._remote = RemoteFolder(url)

    @classmethod
    @contextmanager
    def begin(cls, url: str) -> Iterator[Self]:
        with tempfile.TemporaryDirectory(prefix="posmlp-build-") as name:
            upload = cls(url, Path(name))
            (upload.folder / "build").mkdir()
            upload.pull()
            yield upload

    def info(self) -> DatasetInfo | None:
        """The dataset that is there already. What a build killed in its very last step left is removed."""
        try:
            text = self._remote.read_all("dataset.json", MAX_INFO_BYTES)
        except FileNotFoundError:
            return None
        self._remote.delete(sorted(self._remote.sizes("build")))
        return DatasetInfo.from_json(text.decode(errors="replace"), f"{self.url}/dataset.json")

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all that is at the URL."""
        return self._remote.sizes()

    def pull(self) -> None:
        """Copies the plan and the records that are not here yet."""
        for name, size in self._remote.sizes("build").items():
            target = self.folder / name
            if target.parent == self.folder / "build" and not target.exists():
                self._remote.fetch(name, target, size)

    def plan(self) -> None:
        """Puts the plan there, unless that was done. Raises DatasetError when another build has just put another one."""
        if not self._remote.create(PLAN, (self.folder / PLAN).read_bytes()):
            raise DatasetError(f"Another build has just begun in {self.url}. Wait for it, or choose another data.dir.")

    def commit(self, info: DatasetInfo) -> None:
        """Uploads what the driver wrote, dataset.json last, and removes build/."""
        boxes = [] if info.boxes is None else [info.boxes_file]
        for name in (info.quarantine_file, *boxes, info.index_file, info.likeness_file, "dataset.json"):
            self._remote.upload(self.folder / name, name)
        self._remote.delete(sorted(self._remote.sizes("build"), key=lambda name: name == PLAN))
