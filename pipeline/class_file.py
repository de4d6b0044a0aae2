"""A file that numbers classes, beside the label files that use the numbers.

JSON         an object of names and numbers from 0 on, such as Something-Something's labels.json
.pbtxt       a label map as AVA and TensorFlow write them: blocks of name and id (or label_id)
CSV          with the header id,name
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ManifestError
from pipeline.label_file import HEAD_BYTES, parsed_json, read_csv, unreadable

_BLOCK = re.compile(r"""(?:item|label)\s*:?\s*\{((?:[^{}"']|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')*)\}""")
_NAME = re.compile(r"""\bname\s*:\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""")
_NUMBER = re.compile(r"\b(?:label_)?id\s*:\s*(\d+)")


def read_classes(path: Path) -> dict[int, str]:
    """Number -> name of the classes in a file of classes, by number. Raises ManifestError where a number or a name comes twice."""
    read = _read_json_classes if _first_letter(path) == "{" else _read_csv_classes if path.suffix.lower() == ".csv" else _read_label_map
    names: dict[int, str] = {}
    for number, name in read(path):
        if number in names or not name:
            raise ManifestError(f"{path}: class {number} has {'two names' if name else 'no name'}. Each number needs one name.")
        names[number] = name
    if len(set(names.values())) < len(names) or not names:
        raise ManifestError(f"{path} names {'one class twice' if names else 'no class'}. Each class needs a name of its own.")
    return dict(sorted(names.items()))


def _first_letter(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()[:1]


def _read_json_classes(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers must be 0, 1, 2, ...: a gap in such a file is a class that was lost."""
    numbers = parsed_json(path, None)
    if not isinstance(numbers, dict) or not all(re.fullmatch(r"\d+", str(number)) for number in numbers.values()):
        raise ManifestError(f"{path} is a JSON object, but not one of class names and their numbers, as {{\"a\": 0, \"b\": 1}}. "
                            "JSON lines have one object with path and label on each line.")  # fmt: skip
    if sorted(int(str(number)) for number in numbers.values()) != list(range(len(numbers))):
        raise ManifestError(f"{path}: the numbers of its {len(numbers)} classes must be 0 to {len(numbers) - 1}, each once.")
    yield from ((int(str(number)), name.strip('"')) for name, number in numbers.items())  # PySlowFast's names carry quotes of their own


def _read_csv_classes(path: Path) -> Iterator[tuple[int, str]]:
    columns, records = read_csv(path, ",")
    number = columns.index("id" if "id" in columns else "label_id")
    for line, record in records:
        if not re.fullmatch(r"\d+", record[number].strip()):
            raise ManifestError(f"{path}, line {line}: id is '{record[number]}', expected a whole number.")
        yield int(record[number]), record[columns.index("name")].strip()


def _read_label_map(path: Path) -> Iterator[tuple[int, str]]:
    """Blocks `item { name: "..." id: 1 }`, or `label` and `label_id`, as AVA's label maps have them."""
    if path.stat().st_size > HEAD_BYTES:
        raise ManifestError(f"{path} has {path.stat().st_size} bytes, a label map may have {HEAD_BYTES}.")
    try:
        text = re.sub(r"(?m)^\s*#.*$", "", path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise unreadable(path, error) from None
    rest = 0
    for block in [*_BLOCK.finditer(text), None]:
        between = text[rest : len(text) if block is None else block.start()]
        if between.strip():
            line = 1 + text.count("\n", 0, rest + len(between) - len(between.lstrip()))
            raise ManifestError(f"{path}, line {line}: got '{between.strip()[:60]}', expected item {{ name: \"...\" id: 1 }}.")
        if block is None:
            return
        name, number = _NAME.search(block[1]), _NUMBER.search(_NAME.sub("", block[1]))
        if name is None or number is None:
            line = 1 + text.count("\n", 0, block.start())
            raise ManifestError(f"{path}, line {line}: a class needs a name and an id, got '{' '.join(block[1].split())[:60]}'.")
        yield int(number[1]), re.sub(r"\\(.)", r"\1", name[1] or name[2] or "")
        rest = block.end()
