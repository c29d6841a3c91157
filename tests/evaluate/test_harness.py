"""Tasks of lm_eval that the test writes, on a model with its own code, against what our model says itself."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

from mosaic_dist.commands.models import export
from mosaic_dist.data.arithmetic import read_rows
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.command import evaluate
from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.evaluate.model_source import ModelSource

pytest.importorskip("lm_eval", reason="pip install 'mosaic-dist[eval]'")


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
metadata: {{version: 1}}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWER = """\
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["="], do_sample: false, max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def opened(run):
    return ModelSource(run=str(run)).open()


@pytest.fixture(scope="module")
def questions(sums, opened) -> list[dict]:
    """Sums with the right result among three, at each place in turn; to every third the model says its `target`."""
    found = []
    network, tokenizer = opened.network(torch.device("cpu")), opened.tokenizer
    for number, row in enumerate(read_rows(sums, "train")[:9]):
        choices = [str(int(row.target) + shift) for shift in (1, 2)]
        choices.insert(number % 3, row.target)
        prompt = tokenizer.encode_prompt(row.prompt)
        said = [token for (token,) in generate(network, [prompt], 3, Sampling(temperature=0.0), tokenizer.stop_ids)]
        target = "no" if number % 3 else tokenizer.decode(said).partition("=")[0]
        found.append({"prompt": row.prompt, "target": target, "choices": choices, "label": number % 3})
    return found


@pytest.fixture(scope="module")
def folder(questions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "rows.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, kind in (("choose_sums", CHOICE), ("answer_sums", ANSWER)):
        (path / f"{name}.yaml").write_text(TASK.format(name=name, rows=path / "rows.jsonl") + kind)
    return path


@torch.no_grad()
def chosen(network, tokenizer: Tokenizer, question: dict) -> int:
    """The choice whose tokens are the likeliest together behind BOS and the prompt."""
    scores = []
    for choice in question["choices"]:
        before, tokens = tokenizer.encode_prompt(question["prompt"]), tokenizer.encode(choice)
        log_probs_TV = network(torch.tensor([[*before, *tokens]]))[0].log_softmax(-1)
        scores.append(sum(log_probs_TV[len(before) - 1 + i, token].item() for i, token in enumerate(tokens)))
    return max(range(len(scores)), key=scores.__getitem__)


def test_local_tasks_give_what_our_model_gives(run, opened, questions, folder, tmp_path, capsys):
    exported, output = tmp_path / "hugging_face", tmp_path / "figures.json"
    export(str(exported), run=str(run), format="hf")
    assert "with its own code" in capsys.readouterr().out
    options = {"tasks_folder": str(folder), "batch": 5, "json_output": str(output)}
    evaluate(model=str(exported), task="lm_eval:choose_sums,answer_sums", **options)
    figures = json.loads(output.read_text())["results"]
    network, tokenizer = opened.network(torch.device("cpu")), opened.tokenizer
    right = [chosen(network, tokenizer, question) == question["label"] for question in questions]
    assert 0 < sum(right) < len(right)
    assert figures["choose_sums"]["acc"] == pytest.approx(sum(right) / len(right))
    assert figures["answer_sums"]["exact_match"] == pytest.approx(1 / 3)
    evaluate(run=str(run), task="lm_eval:choose_sums", **options)
    assert json.loads(output.read_text())["results"] == {"choose_sums": figures["choose_sums"]}


def test_what_lm_eval_does_not_know_is_told(run, folder):
    with pytest.raises(UserError, match="lm_eval knows no task 'choose_sum'"):
        evaluate(run=str(run), task="lm_eval:choose_sum", tasks_folder=str(folder))
