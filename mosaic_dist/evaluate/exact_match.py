"""Exact match: how many answers a model gives to the letter, decoding greedily."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.model import TransformerModel


class Answer(NamedTuple):
    """A question, the right answer, and what the model said."""

    prompt: str
    target: str
    given: str


def answer_all(
    model: TransformerModel, tokenizer: Tokenizer, questions: Sequence[tuple[str, str]], batch: int = 256
) -> list[Answer]:
    """The model's answers to (prompt, target) pairs: the prompt, continued greedily up to EOS.

    A model that goes on beyond the longest target by more than a token is stopped there; its answer is wrong anyhow.
    """
    answers = []
    longest = max(len(tokenizer.encode(target)) for _, target in questions)
    with tqdm(total=len(questions), unit="question", desc="answering", disable=None) as bar:
        for start in range(0, len(questions), batch):
            part = questions[start : start + batch]
            prompts = [tokenizer.encode_prompt(prompt) for prompt, _ in part]
            given: list[list[int]] = [[] for _ in part]
            for step in generate(model, prompts, longest + 2, Sampling(temperature=0.0), tokenizer.eos_id):
                for tokens, token in zip(given, step, strict=True):
                    if token is not None:
                        tokens.append(token)
            texts = tokenizer.decode_batch(given)
            answers += [Answer(*question, text) for question, text in zip(part, texts, strict=True)]
            bar.update(len(part))
    return answers


def summarize(answers: Sequence[Answer]) -> dict[str, object]:
    """Share of exact answers, overall and by the length of the right answer in characters, with their numbers."""
    by_length: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        by_length[len(answer.target)].append(answer.given == answer.target)
    right = sum(sum(found) for found in by_length.values())
    lengths = {
        str(length): {"exact_match": sum(found) / len(found), "questions": len(found)}
        for length, found in sorted(by_length.items())
    }
    return {"exact_match": right / len(answers), "questions": len(answers), "by_answer_length": lengths}
