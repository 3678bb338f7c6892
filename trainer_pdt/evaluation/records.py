"""Records of finished pieces: what they measured, without weights, kept beside the report for other machines."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs import RECIPE_FILE, RESULT_FILE, Run
from ..telemetry import REPORT_FILE, read_json, write_json
from .sections import DOCUMENTS_FILE

KEPT_FILES = (RECIPE_FILE, "evaluation.json", DOCUMENTS_FILE, f"model/{REPORT_FILE}", RESULT_FILE)
"""Files of a piece that the report reads; the result, which says that the piece is finished, comes last."""


def record_file(run: Run, output: Path, records: Path) -> Path:
    """Where the record of a piece lies: its folder below `output`, as one file below `records`."""
    return records / f"{run.folder.relative_to(output).as_posix()}.json.gz"


def keep_records(runs: Sequence[Run], output: Path, records: Path) -> list[Path]:
    """
    Writes the records of the finished pieces that have none yet; equal pieces give equal bytes.

    Args:
        runs (`Sequence[Run]`): The whole list.
        output (`Path`), records (`Path`): Folders of the pieces and of their records.

    Returns:
        `list[Path]`: What was written.
    """
    written = []
    for run in runs:
        result, path = run.result(), record_file(run, output, records)
        if result is None or _read(path).get(RESULT_FILE) == result:
            continue
        files = {name: read_json(run.folder / name) for name in KEPT_FILES if (run.folder / name).is_file()}
        text = json.dumps(files, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
        partial.replace(path)
        written.append(path)
    return written


def restore_records(runs: Sequence[Run], output: Path, records: Path) -> list[Run]:
    """
    Gives pieces that have no result the files of their records, where these hold for their settings.

    Args:
        runs (`Sequence[Run]`), output (`Path`), records (`Path`): As in [`keep_records`].

    Returns:
        `list[Run]`: Pieces that are finished now.
    """
    restored = []
    for run in runs:
        if run.result() is not None:
            continue
        files = _read(record_file(run, output, records))
        if files.get(RESULT_FILE, {}).get("settings") == run.mark:
            for name in KEPT_FILES:
                if name in files:
                    write_json(run.folder / name, files[name])
            restored.append(run)
    return restored


def _read(path: Path) -> dict[str, Any]:
    """The files of a record by name; none where there is no record."""
    return json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}
