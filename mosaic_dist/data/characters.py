"""A tokenizer of single characters, as a tokenizer.json like any other."""

from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from mosaic_dist.data.tokenizer import BOS, EOS, PAD, Tokenizer

ANY_CHARACTER = r"[\s\S]"  # a dot would not match a line's end


def character_tokenizer(characters: str) -> Tokenizer:
    """PAD, BOS, EOS as ids 0, 1, 2 and then one id per character, in the order given.

    There is no unknown token: `Tokenizer.encode` raises UserError for any other character. `Tokenizer.encode_prompt`
    begins with BOS, and so does `transformers` with this file.
    """
    assert len(set(characters)) == len(characters), "a character can have one id only"
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, *characters])}
    # The model wants the name of an unknown token; since the vocabulary lacks it, unknown characters are an error.
    inner: Any = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    inner.add_special_tokens([PAD, BOS, EOS])
    return Tokenizer(inner.to_str(), "the character tokenizer")
