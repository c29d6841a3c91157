"""The manifest of a checkpoint: one JSON file, written last, that says what is where and proves it.

Whatever changes in a later format, its number stays among the first bytes of the file, where every version finds it.

{"xxh3_128": "<checksum of the manifest's text>", "manifest":
{"format": 1, "step": .., "time": .., "versions": {..}, "world_size": W, "state": {..},
 "files": [{"name": .., "bytes": .., "xxh3_128": ..}, ..W],
 "tensors": {name: {"shape": [..], "kinds": {kind: {"dtype": "F32", "blocks": [[start, stop, rank, offset_bytes,
            xxh3_128], ..by start]}}}},
 "rank_state": [{name: {"dtype": .., "shape": [..], "offset_bytes": .., "xxh3_128": ..}}, ..W]}
}
"""

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from mosaic_dist.checkpoint.tensor_shards import CheckpointError, UnknownFormatError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
_OPENING, _MIDDLE, _CLOSING = b'{"xxh3_128": "', b'", "manifest":\n', b"\n}\n"
_HEAD_BYTES = len(_OPENING) + 32 + len(_MIDDLE)
_FORMAT = re.compile(rb'"format": ?(\d+)')
_FORMAT_WITHIN_BYTES = 256


def rank_file_name(rank: int) -> str:
    """Name of a rank's data file."""
    return f"rank_{rank:05d}.safetensors"


def render_manifest(manifest: dict[str, Any]) -> bytes:
    """The file's content: the manifest as JSON, inside a frame with its checksum."""
    return _frame(json.dumps(manifest, separators=(",", ":")).encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and prove a manifest. Raises CheckpointError if it is missing, changed in any byte, or of another format."""
    refuse_unknown_format(directory)
    path = directory / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{directory} is not a whole checkpoint: {MANIFEST_NAME}: {error.strerror}") from error
    text = content[_HEAD_BYTES : -len(_CLOSING)]
    if content != _frame(text):
        raise CheckpointError(f"{path} is damaged: its {len(content)} bytes do not match their checksum")
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def refuse_unknown_format(directory: Path) -> None:
    """Raise UnknownFormatError for a checkpoint of another format. Says nothing about one that is missing or damaged.

    The number is taken from the first bytes without proof, as another format may have another way to prove itself.
    """
    path = directory / MANIFEST_NAME
    try:
        with open(path, "rb") as file:
            found = _FORMAT.search(file.read(_FORMAT_WITHIN_BYTES))
    except OSError:
        return
    if found and int(found[1]) != FORMAT:
        raise UnknownFormatError(
            f"{path} has format {int(found[1])}; this version reads format {FORMAT}: use the version of mosaic_dist "
            "that wrote it, or move it out of this folder to go on without it"
        )


def _frame(text: bytes) -> bytes:
    return _OPENING + xxhash.xxh3_128_hexdigest(text).encode() + _MIDDLE + text + _CLOSING


def check_plain(value: Any, path: str) -> None:
    """Refuse a state that JSON would not give back as it was. Tuples pass, and come back as lists.

    Raises CheckpointError with the dotted path: a mapping with keys that are no strings would silently get other keys.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: the key {key!r} is no string, and JSON would make it one")
            check_plain(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{path}[{i}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise CheckpointError(f"{path}: a {type(value).__name__} is not plain JSON")
