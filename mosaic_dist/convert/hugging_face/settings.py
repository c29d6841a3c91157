"""Reading config.json so that nothing in it goes unseen: each setting is taken, known to play no part, or refused."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mosaic_dist.errors import UserError

WITHOUT_EFFECT = """
    _name_or_path architectures model_type transformers_version dtype torch_dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix auto_map
    attention_dropout output_router_logits router_aux_loss_coef
    task_specific_params problem_type finetuning_task id2label label2id return_dict output_attentions
    output_hidden_states output_scores return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    suppress_tokens temperature top_k top_p typical_p _attn_implementation_autoset transformers.js_config
    unsloth_fixed unsloth_version
"""
"""Settings without effect on logits: bookkeeping, generation, and choices of training (dropout, initial values, factors
of auxiliary losses), which belong to the run."""

MUST_BE_OFF = """
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder pruned_heads
    chunk_size_feed_forward num_nextn_predict_layers
"""
"""Settings of which we can represent only "no"."""

BOOKKEEPING, OFF = frozenset(WITHOUT_EFFECT.split()), frozenset(MUST_BE_OFF.split())

REQUIRED = object()


class Known(NamedTuple):
    """What an architecture's configuration class knows of its settings."""

    defaults: Mapping[str, Any]
    """The value that an absent key stands for. transformers 4.57 and 5.24 agree on all of them."""
    without_effect: Mapping[str, Collection[Any]] = {}
    """Keys of published configurations that transformers does not read, and the values in which they say nothing else
    than the architecture does."""


NOTHING_KNOWN = Known({})


class Settings:
    """A config.json, or a mapping in it, of which every key has to be accounted for. `where` begins error messages."""

    def __init__(self, values: dict[str, Any], known: Known = NOTHING_KNOWN, where: str = "config.json"):
        self.values, self.known, self.where = values, known, where
        self._seen: set[str] = set()

    def take(self, key: str) -> Any:
        """The value of a setting that we can represent; absent is the default. UserError where there is none."""
        self._seen.add(key)
        value = self.values.get(key, self.known.defaults.get(key, REQUIRED))
        if value is REQUIRED:
            raise UserError(f"{self.where} has no {key!r}, which is needed here")
        return value

    def count(self, key: str) -> int:
        """A whole number from 1 on."""
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} = {value!r} must be a whole number, at least 1")
        return value

    def number(self, key: str) -> float:
        """A number; None is for the default."""
        value = self.take(key)
        value = self.known.defaults.get(key) if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r} must be a number")
        return value

    def items(self, key: str) -> list[Any]:
        """A list; empty where it is None."""
        value = self.take(key) or []
        if not isinstance(value, list | tuple):
            raise UserError(f"{self.where}: {key} = {value!r} must be a list")
        return list(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        """A mapping, or None."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} = {value!r} must be a mapping")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """A setting that we can represent in some values only; absent is the default, which may be none of them."""
        self._seen.add(key)
        value = self.values.get(key, self.known.defaults.get(key, allowed[0]))
        if value not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            absent = "" if key in self.values else " (the default, as it is absent)"
            raise UserError(f"{self.where}: {key} = {value!r}{absent} cannot be represented here; only {choices}")

    def skip(self, *keys: str) -> None:
        """Settings that the architecture's code does not read, or that follow from others."""
        self._seen.update(keys)

    def version(self) -> tuple[int, int] | None:
        """The first two numbers of the version of transformers that wrote this; None where it is not recorded."""
        match = re.match(r"(\d+)\.(\d+)", str(self.values.get("transformers_version")))
        return None if match is None else (int(match[1]), int(match[2]))

    def finish(self) -> None:
        """Account for what was not taken: warn about settings without effect; UserError for the first other one."""
        ignored = []
        for key, value in self.values.items():
            if key in self._seen or key in BOOKKEEPING or (key in OFF and not value):
                continue
            is_default = key in self.known.defaults and value == self.known.defaults[key]
            if not is_default and value not in self.known.without_effect.get(key, ()):
                raise UserError(f"{self.where}: {key} = {value!r} is a setting that cannot be represented here")
            ignored.append(f"{key} = {value!r}")
        if ignored:
            warnings.warn(f"{self.where}: without effect on this model, ignored: {', '.join(ignored)}", stacklevel=2)
