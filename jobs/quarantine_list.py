"""posmlp data quarantine: what is not in a dataset, by reason, with a text for the person who has to act on it."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from rich.console import Console
from rich.table import Table

from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.location import Location
from pipeline.quarantine import Reason

COLUMNS = ("path", "label", "reason", "explanation", "detail", "start_s", "end_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A reason, how many videos have it, and what it means."""

    reason: str
    num: int
    text: str


def read(dataset: Dataset) -> pa.Table:
    """The rows of the dataset's quarantine list, the columns COLUMNS. Raises DatasetError when the list is missing or damaged."""
    path, root = dataset.copied(dataset.info.quarantine_file), dataset.where
    if not path.is_file():
        raise DatasetError(f"{path} is missing. Run 'posmlp data validate {root}', then build it again.")
    try:
        return pyarrow.parquet.read_table(path, columns=list(COLUMNS))
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}). Run 'posmlp data validate {root}', then build it again.") from None


def causes(table: pa.Table) -> list[Cause]:
    """The reasons in a quarantine list, the most frequent first."""
    first = {
        row["reason"]: row["explanation"]
        for row in table.group_by("reason").aggregate([("explanation", "min")]).rename_columns(["reason", "explanation"]).to_pylist()
    }
    found = [
        Cause(reason=str(entry["values"]), num=entry["counts"], text=_text(str(entry["values"]), first))
        for entry in pc.value_counts(table.column("reason")).to_pylist()
    ]
    return sorted(found, key=lambda cause: (-cause.num, cause.reason))


def _text(reason: str, stored: dict[str, str]) -> str:
    """Of this version; of the version that built the dataset where this one does not know the reason."""
    known = {each.value: each.text for each in Reason}
    return known.get(reason) or stored.get(reason) or "a reason that this version does not know"


def run(root: Location) -> dict[str, object]:
    """Counts, then every video: plain values, JSON-able. Raises DatasetError."""
    table = read(Dataset.open(root, overlays=False))
    counted = [{"reason": cause.reason, "num": cause.num, "text": cause.text} for cause in causes(table)]
    videos = table.select(["path", "label", "reason", "detail", "start_s", "end_s"]).to_pylist()
    return {"folder": str(root), "num": table.num_rows, "reasons": counted, "videos": videos}


def show(root: Location) -> None:
    """Prints the same for people: the reasons, then the videos of each. Raises DatasetError."""
    table = read(Dataset.open(root, overlays=False))
    console = Console()
    console.print(f"{root}: {table.num_rows} videos are not in the dataset", markup=False, highlight=False)
    if not table.num_rows:
        return
    found = causes(table)
    summary = Table("reason", "videos", "what it means")
    for cause in found:
        summary.add_row(cause.reason, str(cause.num), cause.text)
    console.print(summary)
    for cause in found:
        console.print(f"\n{cause.reason}", markup=False, highlight=False)
        for row in table.filter(pc.equal(table.column("reason"), cause.reason)).to_pylist():
            detail = f": {row['detail']}" if row["detail"] else ""
            console.print(f"  {row['path']}{window(row)}{detail}", markup=False, highlight=False, soft_wrap=True)


def window(row: dict[str, object]) -> str:
    """The part of the video that was wanted, where it was not the whole."""
    begin, end = row["start_s"], row["end_s"]
    if begin is None and end is None:
        return ""
    return f" [{0 if begin is None else begin:g} s to {'the end' if end is None else f'{end:g} s'}]"
