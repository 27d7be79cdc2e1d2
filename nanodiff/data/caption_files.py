"""Captions of a folder of pictures, read from text files, tables or folder names. File names decide which belongs to
which; order plays no role."""

import csv
import json
from pathlib import Path

from nanodiff.errors import UserError, nearest

FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
TEXT_COLUMNS = ("text", "caption", "prompt")


def find(root, files, source="auto"):
    """Captions (list of str, one for each of `files`) of a picture folder, or None.

    files   paths relative to root, with forward slashes
    source  None, "folders" (each picture's folder name), "txt" (a .txt file beside each picture), the path of a .csv
            or .jsonl file with a file column and a text column, or "auto": the first that exists of metadata.jsonl,
            metadata.csv, captions.csv, .txt files, sub-folders

    UserError when a picture has no caption or a table names a picture that does not exist.
    """
    root = Path(root)
    if source == "auto":
        tables = [name for name in ("metadata.jsonl", "metadata.csv", "captions.csv") if (root / name).is_file()]
        if tables:
            source = tables[0]
        elif any((root / file).with_suffix(".txt").is_file() for file in files):
            source = "txt"
        else:
            source = "folders" if any("/" in file for file in files) else None
    if source is None:
        return None
    if source == "folders":
        return [(root.resolve() / file).parent.name for file in files]
    if source == "txt":
        text_files = {file: (root / file).with_suffix(".txt") for file in files}
        texts = {file: " ".join(_text(path).split()) for file, path in text_files.items() if path.is_file()}
    else:
        texts = _table(root, files, source)
    uncaptioned = [file for file in files if file not in texts]
    if uncaptioned:
        raise UserError(f"{len(uncaptioned)} of {len(files)} pictures in {root} have no caption in '{source}'"
                        f" (the first is {uncaptioned[0]}): caption all of them or choose another source")
    return [texts[file] for file in files]


def _table(root, files, source):
    """{file: caption} of a .csv or .jsonl file. `source` is a path inside root or a path by itself."""
    path = root / source if (root / source).is_file() else Path(source)
    if path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file():
        raise UserError(f"captions '{source}' is neither 'auto', 'folders', 'txt' nor a .csv or .jsonl file in {root}")
    if path.suffix.lower() == ".jsonl":
        rows = _json_rows(path)
    else:
        rows = list(csv.DictReader(_text(path).splitlines(keepends=True)))
    file_set, texts = set(files), {}
    for number, row in enumerate(rows, 1):
        file = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        text = next((row[column] for column in TEXT_COLUMNS if row.get(column) is not None), None)
        if not isinstance(file, str) or not isinstance(text, str):
            raise UserError(f"entry {number} of {path} has the columns {sorted(map(str, row))}; expected one of"
                            f" {', '.join(FILE_COLUMNS)} and one of {', '.join(TEXT_COLUMNS)}")
        if file not in file_set:
            raise UserError(f"entry {number} of {path} names '{file}'; expected a picture in {root}"
                            f"{nearest(file, files)}")
        texts[file] = text
    return texts


def _json_rows(path):
    """The objects of a .jsonl file, list of dict; blank lines are skipped."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"line {number} of {path} is not a JSON object") from None
    return rows


def _text(path):
    """The text of a UTF-8 file; UserError when it has another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets often write a byte order mark first
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected a file saved as UTF-8") from None
