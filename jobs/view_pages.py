"""The viewer's pages: a path and its fields in, HTML, pictures and videos out. Everything shown goes through an escaping template."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from urllib.parse import urlencode

import jinja2

from jobs.page import template
from jobs.view_http import Answer
from jobs.view_items import PAGE, Filter, Items
from jobs.view_tensor import Slot, Training, png
from pipeline.errors import PipelineError, SampleError
from pipeline.overlay import Kind

MAX_TEXT = 200  # characters of a search
NUMBER = re.compile(r"[0-9]{1,15}")
NUM_USES = 8  # epochs of which an item's page says when it is shown
KINDS = {"h264": "video/mp4", "hevc": "video/mp4", "av1": "video/mp4", "vp9": "video/mp4", "mjpeg": "video/mp4", "mpeg4": "video/mp4"}

OVERLAYS = {Kind.EXCLUDE.value: "left out", Kind.RELABEL.value: "relabelled"}
NAMES = {  # of clip parameters, for people
    "roi": "Crop (y0, x0, y1, x1)", "flip": "Mirrored", "operations": "RandAugment", "colour": "Brightness, contrast, saturation, hue",
    "erased": "Erased (t0, y0, x0, t1, y1, x1)", "noise": "Noise's seed, position, view",
}  # fmt: skip


class _RefusedError(Exception):
    """A request that cannot be answered, with its status and a text for the person before the browser."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class DatasetPages:
    """All pages of one dataset. training: None where the viewer was started without a recipe."""

    def __init__(self, items: Items, training: Training | None, name: str) -> None:
        self._items, self._training, self._name = items, training, name
        number = r"([0-9]{1,15})"
        self._routes: list[tuple[re.Pattern[str], Callable[..., Answer]]] = [
            (re.compile("/"), self._list),
            (re.compile("/out"), self._out),
            (re.compile(f"/item/{number}"), self._item),
            (re.compile(f"/video/{number}"), self._video),
            (re.compile(f"/seen/{number}/{number}/{number}"), self._seen),
            (re.compile("/seen"), self._chosen_step),
            (re.compile(f"/frame/{number}/{number}/{number}/{number}"), self._frame),
            (re.compile("/style.css"), self._style),
        ]

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        try:
            for pattern, page in self._routes:
                if found := pattern.fullmatch(path):
                    return page(query, *map(int, found.groups()))
            raise _RefusedError(404, "There is no such page.")
        except _RefusedError as error:
            return self.refusal(error.status, str(error))
        except (PipelineError, OSError) as error:
            return self.refusal(500, str(error))

    def refusal(self, status: int, text: str) -> Answer:
        """Names nothing of the dataset: it also goes to those who may not come in."""
        return Answer(status=status, body=_template().render(page="refusal", title="PosMLP-Video", text=text).encode())

    def _render(self, page: str, title: str, **values: object) -> Answer:
        items = self._items
        shared = {"name": self._name, "num_items": len(items), "num_out": items.quarantined.num_rows, "training": self._training}
        return Answer(body=_template().render(page=page, title=title, **shared, **values).encode())

    def _list(self, query: Mapping[str, str]) -> Answer:
        info = self._items.info
        splits = [(f"{column}:{code}", column, name) for column, names in info.splits.items() for code, name in enumerate(names)]
        splits += [(f"{column}:-1", column, "in none") for column in info.splits]
        wanted = self._filter(query)
        number = _number(query, "page")
        num, rows = self._items.page(wanted, number)
        chosen = {name: query[name] for name in ("q", "class", "split", "overlay") if query.get(name)}
        return self._render(
            "list",
            self._name,
            rows=[self._items.row(row) for row in rows],
            classes=info.classes,
            splits=splits,
            several=len(info.splits) > 1,
            overlays=OVERLAYS if self._items.dataset.overlay.files else {},
            chosen=chosen,
            first=number * PAGE,
            num=num,
            **_around(chosen, number, num),
        )

    def _filter(self, query: Mapping[str, str]) -> Filter:
        info = self._items.info
        label, split = None, None
        if query.get("class"):
            label = _number(query, "class")
            if label >= len(info.classes):
                raise _RefusedError(400, f"class: got {label}, expected 0 to {len(info.classes) - 1}.")
        if query.get("split"):
            column, _, code = query["split"].rpartition(":")
            if column not in info.splits or code not in {str(each) for each in range(-1, len(info.splits[column]))}:
                raise _RefusedError(400, "split: there is no such split.")
            split = (column, int(code))
        if query.get("overlay") and query["overlay"] not in OVERLAYS:
            raise _RefusedError(400, f"overlay: expected one of {', '.join(OVERLAYS)}.")
        return Filter(label=label, split=split, text=_text(query), overlay=query.get("overlay", ""))

    def _out(self, query: Mapping[str, str]) -> Answer:
        number, reason = _number(query, "page"), query.get("reason", "")
        if reason and reason not in {cause.reason for cause in self._items.causes}:
            raise _RefusedError(400, "reason: no video is out for such a reason.")
        num, rows = self._items.rejects(reason, _text(query), number)
        chosen = {name: query[name] for name in ("q", "reason") if query.get(name)}
        texts = {cause.reason: cause.text for cause in self._items.causes}
        around = _around(chosen, number, num)
        return self._render(
            "out",
            f"Not in {self._name}",
            rows=rows,
            causes=self._items.causes,
            texts=texts,
            chosen=chosen,
            first=number * PAGE,
            num=num,
            **around,
        )

    def _item(self, query: Mapping[str, str], number: int) -> Answer:
        self._exists(number)
        item, training = self._items.row(number), self._training
        step = _number(query, "step")
        uses = training.uses(number, training.first_epoch(step), NUM_USES) if training else []
        return self._render("item", item.key, item=item, uses=uses, step=step)

    def _video(self, query: Mapping[str, str], number: int) -> Answer:
        self._exists(number)
        try:
            body = self._items.video(number)
        except SampleError as error:
            return Answer(status=500, kind="text/plain; charset=utf-8", body=str(error).encode())
        kind = KINDS.get(self._items.dataset.text("codec", number), "application/octet-stream")
        return Answer(kind=kind, body=body, seekable=True)

    def _seen(self, query: Mapping[str, str], step: int, micro: int, slot: int) -> Answer:
        training = self._within(step, micro, slot)
        seen = training.seen(step, micro)
        shape = {"num_frames": seen.levels.shape[1], "size": seen.levels.shape[2]}
        chosen = seen.slots[slot]
        place = {"step": step, "micro": micro, "number": slot}
        return self._render("seen", f"Step {step}", seen=seen, slot=chosen, facts=_facts(chosen), **place, **shape)

    def _chosen_step(self, query: Mapping[str, str]) -> Answer:
        step, micro = _number(query, "step"), _number(query, "micro")
        self._within(step, micro, 0)
        return Answer(status=303, headers={"Location": f"/seen/{step}/{micro}/0"})

    def _frame(self, query: Mapping[str, str], step: int, micro: int, slot: int, frame: int) -> Answer:
        levels = self._within(step, micro, slot).seen(step, micro).levels
        if frame >= levels.shape[1]:
            raise _RefusedError(404, f"frame: got {frame}, expected 0 to {levels.shape[1] - 1}.")
        return Answer(kind="image/png", body=png(levels[slot, frame]))

    def _style(self, query: Mapping[str, str]) -> Answer:
        return Answer(kind="text/css; charset=utf-8", body=template("view.css.j2").render().encode())

    def _exists(self, number: int) -> None:
        if number >= len(self._items):
            raise _RefusedError(404, f"There is no item {number}; the dataset has {len(self._items)}.")

    def _within(self, step: int, micro: int, slot: int) -> Training:
        training = self._training
        if training is None:
            raise _RefusedError(404, "Start the viewer with --recipe RECIPE to see what a training gets.")
        bounds = (training.num_steps, training.num_micro, training.recipe.train.micro_batch)
        for name, got, bound in zip(("step", "micro-batch", "clip"), (step, micro, slot), bounds, strict=True):
            if got >= bound:
                raise _RefusedError(404, f"{name}: got {got}, expected 0 to {bound - 1}.")
        return training


@cache
def _template() -> jinja2.Template:
    return template("view.html.j2")


def _facts(slot: Slot) -> dict[str, str]:
    """What was drawn for a clip, for people."""
    drawn = slot.parameters
    target = ", ".join(name if share == 1 else f"{name} {share:.3f}" for name, share in slot.target)
    facts = {"Video": slot.key, "Target": target, "Position": f"{slot.position:,}"}
    for name, value in drawn.items():
        if name != "frames" and value not in (None, []):
            facts[NAMES.get(name, name)] = _plain(value)
    return facts


def _plain(value: object) -> str:
    """Nested lists as people read them, numbers short."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(_plain, value)) if value and isinstance(value[0], list) else ", ".join(map(_plain, value))
    return str(value)


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "0")
    if not NUMBER.fullmatch(text):
        raise _RefusedError(400, f"{name}: expected a whole number from 0 on.")
    return int(text)


def _text(query: Mapping[str, str]) -> str:
    text = query.get("q", "")
    if len(text) > MAX_TEXT:
        raise _RefusedError(400, f"q: got {len(text)} characters, expected at most {MAX_TEXT}.")
    return text


def _around(chosen: Mapping[str, str], number: int, num: int) -> dict[str, str | None]:
    """The addresses of the pages before and after page `number` of `num` rows; None where there is none."""

    def at(page: int) -> str:
        return "?" + urlencode({**chosen, "page": page})

    return {"before": at(number - 1) if number else None, "after": at(number + 1) if (number + 1) * PAGE < num else None}
