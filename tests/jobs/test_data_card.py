"""The dataset's card: every item is in every histogram once, and the page is complete in itself."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs import data_card
from jobs.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from jobs.cli import posmlp
from pipeline.index import Dataset
from tests.jobs.browser import find_browser, open_page


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [1.0, 2.0, 2.0, 40.0], [30.0] * 9, [0.1, 0.30000000000000004, 1e6], list(range(1000))]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_histogram_counts_every_value_once(values: list[float], whole: bool) -> None:
    chart = data_card.histogram(np.array(values, dtype=np.float64), title="t", x_label="x", whole=whole)
    assert chart is not None
    assert sum(int(bar.text.rpartition(" ")[2].replace(",", "")) for bar in chart.bars) == len(values)
    for bar in chart.bars:
        assert LEFT <= bar.x <= bar.x + bar.width <= WIDTH - RIGHT + 0.1
        assert bar.y >= TOP - 0.1
        assert bar.y + bar.height == pytest.approx(HEIGHT - BOTTOM, abs=0.02)


def test_without_items_there_is_no_histogram() -> None:
    assert data_card.histogram(np.empty(0), title="t", x_label="x") is None


def test_the_card_in_a_browser(motion_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "card.html"
    done = CliRunner().invoke(posmlp, ["data", "info", str(motion_dataset), "--html", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    page = out.read_text()
    info = Dataset.open(motion_dataset).info
    for text in [*info.classes, info.fingerprint, "Length in frames", "Frame rate", "train", "val"]:
        assert text in page
    found = open_page(page, (1280, 400), find_browser())
    assert found.foreign == []
    assert found.violations == []
    for frame in found.frames:
        assert frame["content"] == frame["room"], "the page must not scroll sideways"
        assert frame["outside"] == []
        assert frame["broken"] == []
        assert frame["videos"] == data_card.NUM_VIDEOS
