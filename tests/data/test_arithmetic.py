import filecmp
import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.arithmetic import arithmetic
from mosaic_dist.cli import run_command
from mosaic_dist.data import Data
from mosaic_dist.data.arithmetic import arithmetic_tokenizer, prepare_arithmetic, read_rows, split_sizes
from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.expressions import Expressions, draw_rows
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.targets import IGNORE_INDEX

SEQ_LEN = 32
SPLITS = ("train", "validation", "test")
MIXED = Expressions(operands=3, low=-9, high=40, ops="+-*/")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A dataset of mixed expressions with rows of very unequal length."""
    output = tmp_path_factory.mktemp("arithmetic") / "set"
    return prepare_arithmetic(MIXED, output, 400, seq_len=SEQ_LEN, validation_fraction=0.1, test_fraction=0.1)


def value(prompt: str) -> Fraction:
    """Python's reading of a prompt, with every number a Fraction."""
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", prompt.removesuffix("=")), {"Fraction": Fraction})


def brute_force(operands: int, low: int, high: int, ops: str) -> dict[str, int]:
    """All expressions by trying every combination; each division must be whole where Python comes to it."""

    class Whole(int):
        def __mul__(self, other):
            return Whole(int(self) * int(other))

        def __truediv__(self, other):
            if int(self) % int(other):
                raise ZeroDivisionError
            return Whole(int(self) // int(other))

        def __neg__(self):
            return Whole(-int(self))

    found = {}
    for numbers in itertools.product(range(low, high + 1), repeat=operands):
        for operators in itertools.product(ops, repeat=operands - 1):
            text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
            try:
                found[f"{text}="] = int(eval(re.sub(r"(\d+)", r"Whole(\1)", text), {"Whole": Whole}))
            except ZeroDivisionError:
                continue
    return found


@pytest.mark.parametrize(
    "expressions",
    [
        Expressions(),
        MIXED,
        Expressions(operands=4, low=0, high=99, ops="*/"),
        Expressions(operands=2, low=1, high=100_000, ops="/"),
        Expressions(operands=5, low=-3, high=3, ops="-/"),
    ],
)
def test_every_result_is_right_and_whole(expressions):
    rows = draw_rows(expressions, 1500, seed=3)
    assert len({row.prompt for row in rows}) == 1500
    for row in rows:
        assert value(row.prompt) == int(row.target)
        assert str(int(row.target)) == row.target
        numbers = [int(n) for n in re.findall(r"(?:(?<=[-+*/])|^)-?\d+", row.prompt)]
        assert len(numbers) == expressions.operands
        assert expressions.low <= min(numbers) <= max(numbers) <= expressions.high
        operators = re.findall(r"(?<=\d)[-+*/]", row.prompt)
        assert len(operators) == expressions.operands - 1
        assert set(operators) <= set(expressions.ops)


@pytest.mark.parametrize(
    ("operands", "low", "high", "ops"),
    [(2, 0, 12, "+"), (2, -6, 9, "+-*/"), (3, 0, 6, "*/"), (3, -2, 2, "-/"), (2, 7, 40, "/"), (2, -30, -3, "/")],
)
def test_all_that_exist_can_be_had_and_no_more(operands, low, high, ops):
    expected = brute_force(operands, low, high, ops)
    expressions = Expressions(operands=operands, low=low, high=high, ops=ops)
    rows = draw_rows(expressions, len(expected), seed=0)
    assert {row.prompt: int(row.target) for row in rows} == expected
    with pytest.raises(UserError, match=rf"samples \({len(expected) + 1}\) are more than the {len(expected)} "):
        draw_rows(expressions, len(expected) + 1, seed=0)


def test_operators_take_turns_and_results_may_be_negative():
    rows = draw_rows(Expressions(ops="+-*/"), 4000, seed=0)
    for operator in "+-*/":
        assert 850 < sum(operator in row.prompt for row in rows) < 1150
    assert any(row.target.startswith("-") for row in rows)


def test_what_is_soon_used_up_reaches_every_split():
    expected = brute_force(2, 0, 20, "+/")
    rows = draw_rows(Expressions(high=20, ops="+/"), len(expected), seed=0)
    divisions = [("/" in row.prompt) for row in rows]
    assert 0.3 < sum(divisions[: len(rows) // 2]) / sum(divisions) < 0.7


def test_rows_are_a_function_of_the_seed(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        prepare_arithmetic(MIXED, tmp_path / name, 200, seed=seed, seq_len=SEQ_LEN)
    names = [str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names
    assert read_rows(tmp_path / "one", "train") != read_rows(tmp_path / "other", "train")
    same = draw_rows(Expressions(ops="+-"), 50, seed=1)
    assert same == draw_rows(Expressions(ops="+-"), 50, seed=1)


def test_splits_share_no_prompt(sums):
    parts = {split: {row.prompt for row in read_rows(sums.path, split)} for split in SPLITS}
    assert {split: len(prompts) for split, prompts in parts.items()} == {"train": 320, "validation": 40, "test": 40}
    assert len(set.union(*parts.values())) == 400


def test_jsonl_and_mds_hold_the_same_rows_in_order(sums):
    tokenizer = sums.load_tokenizer()
    assert tuple(sums.splits) == SPLITS
    for split in SPLITS:
        lines = [json.loads(line) for line in (sums.path / f"{split}.jsonl").read_text().splitlines()]
        assert [list(line) for line in lines] == [["prompt", "target", "text"]] * len(lines)
        assert [line["text"] for line in lines] == [line["prompt"] + line["target"] for line in lines]
        assert [(row.prompt, row.target) for row in read_rows(sums.path, split)] == [
            (line["prompt"], line["target"]) for line in lines
        ]
        shards = Shards(sums, split)
        samples = shards.read(np.arange(len(shards)))
        assert samples.shape == (sums.split(split).samples, SEQ_LEN + 1) == (len(lines), SEQ_LEN + 1)
        assert tokenizer.decode_batch(samples) == [line["text"] for line in lines]
        for row_T, line in zip(samples.tolist(), lines, strict=True):
            length = len(line["text"]) + 2
            assert row_T == [1, *tokenizer.encode(line["text"]), 2, *[0] * (SEQ_LEN + 1 - length)]
        assert sums.split(split).tokens == sum(len(line["target"]) + 1 for line in lines)


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_the_18_ids(sums):
    for tokenizer in (arithmetic_tokenizer(), Tokenizer.load(sums.path), Tokenizer.load(sums.tokenizer_path)):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 18)
        assert tokenizer.encode("0123456789+-*/=") == list(range(3, 18))
        assert tokenizer.digest == sums.tokenizer


def test_texts_come_back(sums):
    tokenizer = arithmetic_tokenizer()
    texts = [row.text for row in read_rows(sums.path, "train")]
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [len(ids) for ids in batch] == [len(text) for text in texts]
    assert tokenizer.decode_batch(batch) == texts
    padded = tokenizer.pad_batch([[1, *ids, 2] for ids in batch])
    assert padded.shape == (len(texts), max(map(len, texts)) + 2)
    assert tokenizer.decode_batch(padded) == texts
    assert tokenizer.decode([1, 4, 17, 4, 2, 0], skip_special_tokens=False) == "<|bos|>1=1<|eos|><|pad|>"
    assert tokenizer.encode("") == []


def test_a_prompt_begins_with_bos():
    tokenizer = arithmetic_tokenizer()
    assert tokenizer.encode_prompt("1+2=") == [1, 4, 13, 5, 17]
    assert tokenizer.encode_prompt("") == [1]


@pytest.mark.parametrize("text", ["1 +2=", "12\n", "2^3", "\u0661", "<|eos|>"])
def test_other_characters_are_refused(text):
    tokenizer = arithmetic_tokenizer()
    stranger = next(character for character in text if character not in "0123456789+-*/=")
    with pytest.raises(
        UserError, match=re.escape(f"cannot encode {text!r}: the tokenizer has no token for {stranger!r}")
    ):
        tokenizer.encode(text)
    with pytest.raises(UserError, match="has no token for"):
        tokenizer.encode_batch(["1+1=2", text])


def test_transformers_reads_the_file(sums):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(sums.tokenizer_path))
    assert theirs("12+7=")["input_ids"] == sums.load_tokenizer().encode_prompt("12+7=")
    assert theirs.decode([4, 5, 13, 10, 17, 4, 12]) == "12+7=19"


# --- the answer-only loss -----------------------------------------------------------------------------------------


def expected_targets(text: str, tokenizer: Tokenizer, seq_len: int) -> list[int]:
    """What is scored after each of BOS and the characters, told character by character."""
    targets, answering = [], False
    for before, character in zip(["", *text], [*text, "EOS"], strict=True):
        answering = answering or before == "="
        token = tokenizer.eos_id if character == "EOS" else tokenizer.encode(character)[0]
        targets.append(token if answering else IGNORE_INDEX)
    return targets + [IGNORE_INDEX] * (seq_len - len(targets))


@pytest.mark.parametrize(("seq_len", "workers"), [(SEQ_LEN, 0), (SEQ_LEN, 1), (16, 0)])
def test_answers_alone_are_scored(sums, seq_len, workers):
    if seq_len < SEQ_LEN:
        assert sums.answer_loss is not None
        assert sums.answer_loss.row_tokens <= seq_len + 1 < SEQ_LEN
    tokenizer = sums.load_tokenizer()
    data = Data(workers=workers, seq_len=seq_len)
    training = Loader(data, sums, global_batch=64, rank=0, world_size=1, seed=0)
    held_out = ValidationBatches(data, sums, batch=16, rank=0, world_size=1)
    for split, batches in (("train", itertools.islice(training, 6)), ("validation", held_out)):
        rows, scored, seen = read_rows(sums.path, split), 0, []
        for batch in batches:
            seen += [sample for sample in batch.sample_ids if sample != FILLER]
            for sample, inputs_T, targets_T in zip(batch.sample_ids, batch.inputs_BT, batch.targets_BT, strict=True):
                assert inputs_T.shape == targets_T.shape == (seq_len,)
                if sample == FILLER:
                    assert (targets_T == IGNORE_INDEX).all()
                    continue
                assert tokenizer.decode(inputs_T) == rows[sample].text
                assert targets_T.tolist() == expected_targets(rows[sample].text, tokenizer, seq_len)
                scored += int((targets_T != IGNORE_INDEX).sum())
        assert set(seen) == set(range(len(rows)))
        if split == "validation":
            assert scored == sums.split(split).tokens


def test_rows_are_never_cut(sums):
    with pytest.raises(UserError, match=r"seq_len \(8\) cuts rows of the dataset .*: the longest has 1\d tokens"):
        Loader(Data(seq_len=8), sums, global_batch=4, rank=0, world_size=1, seed=0)


def test_the_position_knows_how_answers_are_scored(sums, tmp_path):
    made = Loader(Data(workers=0), sums, global_batch=4, rank=0, world_size=1, seed=0)
    state = json.loads(json.dumps(made.state()))
    assert state["fingerprint"]["answer_loss"]["mark_id"] == 17
    Loader(Data(workers=0), sums, global_batch=4, rank=0, world_size=1, seed=0, state=state)
    del state["fingerprint"]["answer_loss"]
    with pytest.raises(UserError, match=r"answer_loss was None and is \{'mark_id': 17"):
        Loader(Data(workers=0), sums, global_batch=4, rank=0, world_size=1, seed=0, state=state)


def test_packed_data_scores_everything(dataset):
    assert dataset.answer_loss is None
    assert "answer_loss" not in json.loads((dataset.path / "dataset.json").read_text())
    made = Loader(Data(workers=0), dataset, global_batch=4, rank=0, world_size=1, seed=0)
    assert "answer_loss" not in made.fingerprint
    assert (next(iter(made)).targets_BT != IGNORE_INDEX).all()


# --- the command and its refusals ---------------------------------------------------------------------------------


def run(*words: object) -> None:
    run_command(arithmetic, "tool", [str(word) for word in words])


def test_the_command(tmp_path, capsys):
    words = ("--output", tmp_path / "set", "--samples", 100, "--low", 0, "--high", 99, "--seed", 0)
    run(*words, "--ops", "+-*/", "--operands", 2)
    info = DatasetInfo.load(tmp_path / "set")
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 90, "validation": 5, "test": 5}
    assert (info.seq_len, info.options["ops"], info.options["high"]) == (64, "+-*/", 99)
    assert "scored tokens" in capsys.readouterr().err
    run(*words, "--ops=-", "--test_fraction", 0, "--overwrite")
    assert list(DatasetInfo.load(tmp_path / "set").splits) == ["train", "validation"]
    assert not (tmp_path / "set" / "test.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ops", "+^"), "ops ('+^') must be some of +-*/: '^' is not known"),
        (("--ops", "++"), "ops ('++') must be some of +-*/: each at most once"),
        (("--low", 5, "--high", 4), "low (5) must not be more than high (4)"),
        (("--operands", 1), "operands (1) must be at least 2"),
        (("--high", 9, "--samples", 101), "samples (101) are more than the 100 different expressions"),
        (("--high", 0, "--ops", "/"), "samples (70000) are more than the 0 different"),
        (("--high", 0, "--ops", "/", "--samples", 1), "1 samples are too few for a row in every split"),
        (("--low", 0, "--high", 10**7, "--ops", "/"), "low..high (0..10000000) is too wide for division"),
        (("--samples", 50, "--seq_len", 8), "seq_len (8) must be at least 1"),
        (("--train_fraction", 0.5), "(train 0.5, validation 0.05, test 0.05) must sum to 1"),
        (("--validation_fraction", 1), "must sum to 1, and train be more than 0"),
        (("--samples", 5), "5 samples are too few for a row in every split"),
        (("--samples", 0), "0 must be at least 1"),
        (("--sample", 5), "unknown flag --sample; did you mean 'samples'?"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run("--output", tmp_path / "set", *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_expression_at_all():
    with pytest.raises(UserError, match=r"samples \(1\) are more than the 0 different"):
        draw_rows(Expressions(low=0, high=0, ops="/"), 1, seed=0)


def test_existing_output_is_kept(sums, tmp_path, capsys):
    before = (sums.path / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        prepare_arithmetic(MIXED, sums.path, 100)
    with pytest.raises(UserError, match=r"seq_len \(4\) must be at least"):
        prepare_arithmetic(MIXED, sums.path, 100, seq_len=4, overwrite=True)
    assert (sums.path / "train.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="is no dataset"):
        prepare_arithmetic(MIXED, tmp_path, 100, overwrite=True)


def test_bad_rows(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*test\.jsonl .*data_prep\.arithmetic"):
        read_rows(tmp_path)
    Path(tmp_path, "test.jsonl").write_text('{"prompt": "1+1="}\n')
    with pytest.raises(UserError, match=r"test\.jsonl is damaged \(KeyError"):
        read_rows(tmp_path)


def test_split_sizes():
    assert split_sizes(70_000, None, 0.05, 0.05) == {"train": 63_000, "validation": 3500, "test": 3500}
    assert split_sizes(7, 0.5, 0.2, 0.3) == {"train": 4, "validation": 1, "test": 2}
    assert split_sizes(10, 1.0, 0.0, 0.0) == {"train": 10}
