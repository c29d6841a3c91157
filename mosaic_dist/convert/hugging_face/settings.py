"""Reading config.json so that nothing in it goes unseen: each setting is taken, known to play no part, or refused."""

from typing import Any

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
    suppress_tokens temperature top_k top_p typical_p
"""
"""Settings without effect on logits: bookkeeping, generation, and choices of training (dropout, initial values, factors
of auxiliary losses), which belong to the run."""

MUST_BE_OFF = """
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder pruned_heads
    chunk_size_feed_forward
"""
"""Settings that every configuration has, of which we can represent only "no"."""

NO_PART, OFF = frozenset(WITHOUT_EFFECT.split()), frozenset(MUST_BE_OFF.split())

REQUIRED = object()


class Settings:
    """A config.json, or a mapping in it, of which every key has to be accounted for. `where` begins error messages."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where = values, where
        self._seen: set[str] = set()

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a setting that we can represent; UserError if it is absent and has no default."""
        self._seen.add(key)
        if key not in self.values and default is REQUIRED:
            raise UserError(f"{self.where} has no {key!r}, which this architecture needs")
        return self.values.get(key, default)

    def count(self, key: str) -> int:
        """A required whole number from 1 on."""
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where}: {key} = {value!r} must be a whole number, at least 1")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A number; None is for the default."""
        value = self.take(key, default)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r} must be a number")
        return value

    def items(self, key: str) -> list[Any]:
        """A list; empty where it is absent or None."""
        value = self.take(key, None) or []
        if not isinstance(value, list | tuple):
            raise UserError(f"{self.where}: {key} = {value!r} must be a list")
        return list(value)

    def part(self, key: str) -> "Settings | None":
        """A mapping inside this one, to be read and finished by itself; None where it is absent."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} = {value!r} must be a mapping")
        return None if value is None else Settings(value, f"{self.where}, {key}")

    def expect(self, key: str, *allowed: Any) -> None:
        """A setting that we can represent in some values only; absent is allowed."""
        self._seen.add(key)
        if key in self.values and self.values[key] not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{self.where}: {key} = {self.values[key]!r} cannot be represented here; only {choices}")

    def skip(self, *keys: str) -> None:
        """Settings that the architecture's code does not read, or that follow from others."""
        self._seen.update(keys)

    def finish(self) -> None:
        """UserError naming the first setting that nothing has accounted for."""
        for key, value in self.values.items():
            if key in self._seen or key in NO_PART or (key in OFF and not value):
                continue
            raise UserError(f"{self.where}: {key} = {value!r} is a setting that cannot be represented here")
