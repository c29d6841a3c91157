"""What is in a folder, for people and for programs: a run, its checkpoints, one of them, or a model."""

import math
from pathlib import Path
from typing import Any

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.facts import LARGEST_TOLD, checkpoint_facts, list_checkpoints
from mosaic_dist.checkpoint.rank_file import DTYPES
from mosaic_dist.convert.locate import CHECKPOINTS, Located
from mosaic_dist.convert.reading import read_json, read_weight_map
from mosaic_dist.convert.verify import read_headers
from mosaic_dist.convert.writing import CHECKSUMS

UNITS = ("B", "kB", "MB", "GB", "TB")


def describe(found: Located) -> dict[str, Any]:
    """Plain values of a folder; of a run or its checkpoints, a list of them and the newest that opens in full."""
    told: dict[str, Any] = {"kind": found.kind, "path": str(found.path)}
    if found.kind == "model":
        return told | model_facts(found.path)
    if found.kind == "checkpoint":
        return told | checkpoint_facts(Checkpoint.open(found.path))
    rows = list_checkpoints(found.path / CHECKPOINTS if found.kind == "run" else found.path)
    whole = [row["path"] for row in rows if row["problem"] is None]
    newest = checkpoint_facts(Checkpoint.open(whole[-1])) if whole else None
    return told | {"checkpoints": rows, "newest": newest}


def model_facts(folder: Path) -> dict[str, Any]:
    """Origin, sizes by dtype and the largest tensors of an exported model, or of another in Hugging Face's form."""
    config, files = read_json(folder / "config.json"), set(read_weight_map(folder).values())
    kinds: dict[str, dict[str, Any]] = {}
    tensors: list[dict[str, Any]] = []
    for name, (dtype, shape) in read_headers(folder).items():
        elements = math.prod(shape)
        size_bytes = elements * DTYPES[dtype].itemsize if dtype in DTYPES else 0
        row = kinds.setdefault(dtype, {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": [dtype]})
        row["tensors"] += 1
        row["elements"] += elements
        row["bytes"] += size_bytes
        tensors.append({"name": name, "shape": list(shape), "elements": elements, "bytes": size_bytes})
    origin = {key: config[key] for key in ("model_type", "run", "step", "dtype", "ternary") if key in config}
    return origin | {
        "parameters": sum(row["elements"] for row in kinds.values()),
        "files": len(files),
        "bytes": sum((folder / file).stat().st_size for file in files),
        "has_checksums": (folder / CHECKSUMS).exists(),
        "kinds": dict(sorted(kinds.items())),
        "largest_tensors": sorted(tensors, key=lambda row: -row["bytes"])[:LARGEST_TOLD],
    }


# --- for people ---------------------------------------------------------------------------------------------------


def render(facts: dict[str, Any]) -> str:
    """`describe`'s values as aligned tables."""
    lines = [f"{facts['kind']} {facts['path']}"]
    if "checkpoints" not in facts:
        return "\n".join([*lines, *_details(facts)])
    header = ("step", "tokens", "time", "size", "")
    rows = [
        (row["step"], _count(row.get("tokens")), row.get("time", ""), _size(row.get("bytes")), row["problem"] or "")
        for row in facts["checkpoints"]
    ]
    lines += _table([header, *rows]) if rows else ["  no checkpoint yet"]
    newest = facts["newest"]
    return "\n".join([*lines, *(["", f"newest: {newest['path']}", *_details(newest)] if newest else [])])


def _details(facts: dict[str, Any]) -> list[str]:
    """A checkpoint's or a model's values: one per line, then sizes by kind, then the largest tensors."""
    plain = ("model_type", "run", "step", "tokens", "time", "dtype", "ternary", "has_checksums")
    rows = [(key, f"{facts[key]:,}" if type(facts[key]) is int else facts[key]) for key in plain if key in facts]
    rows += [(key, _pairs(facts[key])) for key in ("layout", "versions", "data") if facts.get(key)]
    rows += [("parameters", f"{facts['parameters']:,}"), ("files", f"{facts['files']}, {_size(facts['bytes'])}")]
    kinds = [
        (name, row["tensors"], f"{row['elements']:,}", _size(row["bytes"]), ", ".join(row["dtypes"]))
        for name, row in facts["kinds"].items()
    ]
    largest = [
        (row["name"], " x ".join(map(str, row["shape"])) or "scalar", f"{row['elements']:,}", _size(row["bytes"]))
        for row in facts["largest_tensors"]
    ]
    return [
        *_table(rows, numbers=False),
        "",
        *_table([("kind", "tensors", "elements", "size", "dtype"), *kinds]),
        "",
        *_table([("largest tensors", "shape", "elements", "size, all kinds"), *largest]),
    ]


def _table(rows: list[tuple[Any, ...]], numbers: bool = True) -> list[str]:
    """Rows in columns; the first is aligned left, and with `numbers` the others right, but for the last."""
    columns = list(zip(*[[str(cell) for cell in row] for row in rows], strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        middle = [cell.rjust(width) if numbers else cell for cell, width in zip(cells[1:-1], widths[1:-1], strict=True)]
        lines.append("  " + "  ".join([cells[0].ljust(widths[0]), *middle, cells[-1]]).rstrip())
    return lines


def _pairs(values: dict[str, Any]) -> str:
    """Keys and values in a line; those of inner mappings too."""
    parts = [_pairs(value) if isinstance(value, dict) else f"{key} {value}" for key, value in values.items()]
    return ", ".join(parts)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _size(size_bytes: int | None) -> str:
    """Bytes with three digits or so, in powers of ten."""
    if size_bytes is None:
        return ""
    power = min(max(0, len(str(size_bytes)) - 1) // 3, len(UNITS) - 1)
    return f"{size_bytes / 1000**power:.3g} {UNITS[power]}" if power else f"{size_bytes} B"
