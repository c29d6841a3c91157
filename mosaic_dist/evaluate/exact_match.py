"""Exact match: how many answers a model gives to the letter, decoding greedily."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from mosaic_dist.data.arithmetic import read_rows
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.evaluate.evaluation import Evaluation, in_one_process
from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.evaluate.model_source import LoadedModel
from mosaic_dist.model import TransformerModel
from mosaic_dist.parallel import World
from mosaic_dist.spec import NonNegative, Positive


class ExactMatch(Evaluation, type="exact_match"):
    """Answers to the questions of `data`, made by `python -m data_prep.arithmetic`; `samples` of them are shown."""

    data: str
    split: str = "test"
    limit: Positive | None = None
    samples: NonNegative = 5

    def made_on(self) -> str:
        """The dataset and its split."""
        return f"{self.data} ({self.split})"

    def measure(self, opened: LoadedModel, world: World) -> dict[str, Any]:
        """Generate an answer to each question and compare it with the expected one."""
        in_one_process(world, "exact_match")
        questions = [(row.prompt, row.target) for row in read_rows(self.data, self.split)[: self.limit]]
        answers = answer_all(opened.network(world.device), opened.tokenizer, questions)
        for answer in answers[: self.samples]:
            verdict = "right" if answer.given == answer.target else f"wrong, it is {answer.target}"
            print(f"  {answer.prompt}{answer.given}  ({verdict})")
        told = {"task": "exact_match"} | opened.facts | {"data": self.data, "split": self.split}
        return summarize(answers) | told

    def measures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The numbers that comparisons show."""
        return {"exact match": figures["exact_match"]}


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
            for step in generate(model, prompts, longest + 2, Sampling(temperature=0.0), tokenizer.stop_ids):
                for tokens, token in zip(given, step, strict=True):
                    if token is not None:
                        tokens.append(token)
            texts = tokenizer.decode_batch(given)
            answers += [Answer(*question, text) for question, text in zip(part, texts, strict=True)]
            bar.update(len(part))
    return answers


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
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
