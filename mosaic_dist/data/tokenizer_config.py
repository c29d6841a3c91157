"""Settings of a tokenizer that its tokenizer.json lacks, from the files that Hugging Face keeps next to it.

`tokenizer_config.json` (in older folders `special_tokens_map.json`) names the special tokens, `generation_config.json`
or else `config.json` lists the tokens that end a generated text, and chat templates are in `tokenizer_config.json`, or
in files of their own since transformers 4.51.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mosaic_dist.errors import UserError

CONFIG_NAME, GENERATION_NAME = "tokenizer_config.json", "generation_config.json"
BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = ROLES = ("bos_token", "eos_token", "pad_token")

ChatTemplate = str | list[dict[str, str]]
"""A Jinja template, or several as `{"name": ..., "template": ...}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What to add to a tokenizer.json.

    `tokens` maps a role to its token, or to None if the tokenizer has no such token; a role that no file mentions is
    missing. `add_bos_token` asks for a BOS before each text. `stop_ids` end generation, in addition to the EOS.
    """

    tokens: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    add_bos_token: bool = False
    stop_ids: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings in a folder, empty if it has none of the files. UserError for a damaged file."""
        config = _read_json(folder / CONFIG_NAME)
        named = _read_json(folder / "special_tokens_map.json") | config
        return cls(
            tokens={role: _content(folder / CONFIG_NAME, role, named[role]) for role in ROLES if role in named},
            add_bos_token=config.get("add_bos_token") is True,
            stop_ids=_stop_ids(folder),
            chat_template=_chat_template(folder) or config.get("chat_template"),
        )


NO_CONFIG = TokenizerConfig()


def _read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, not a mapping")
    return content


def _content(file: Path, role: str, token: Any) -> str | None:
    """The name of a token, which may be an object with more settings of the token."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise UserError(f"{file}: {role} = {token!r} must be a token's text, or an object with its `content`")
    return name


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end generation; `config.json` counts only if `generation_config.json` does not list any."""
    for file in (folder / GENERATION_NAME, folder / "config.json"):
        found = _read_json(file).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise UserError(f"{file}: eos_token_id = {found!r} must be a token id or a list of them")
            return tuple(ids)
    return ()


def _chat_template(folder: Path) -> ChatTemplate | None:
    """The chat templates that have files of their own."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if found.keys() <= {"default"}:
        return found.get("default")
    return [{"name": name, "template": template} for name, template in found.items()]
