"""The command: its text, its JSON and picture, what it refuses, and the hardware that it knows."""

import json
import re

import pytest
import torch

from mosaic_dist.__main__ import main as run_main
from mosaic_dist.errors import UserError
from mosaic_dist.hardware import DEVICES, Device, device_called, find_device
from mosaic_dist.plan import calibrate as calibration
from mosaic_dist.plan.command import load_recipe, plan
from mosaic_dist.plan.layout import Span, make_layout
from mosaic_dist.plan.plan import setting_of
from mosaic_dist.plan.search import LONG_TOKENS, sharing
from mosaic_dist.plan.traffic import Flow
from mosaic_dist.spec import override
from tests.launch import ROOT

SMALL = str(ROOT / "recipes" / "nano_moe.py")


def told(capsys, *recipe, **words):
    plan(*recipe, **words)
    return capsys.readouterr().out


def test_json_has_the_figures_of_the_table_and_the_picture_is_drawn(capsys, tmp_path):
    words = {"nodes": 2, "gpus_per_node": 4, "gpu": "a100", "ep": 4, "zero": 2, "checkpointing": "full"}
    picture = tmp_path / "memory.png"
    figures = json.loads(told(capsys, SMALL, json=True, plot=str(picture), **words))
    table = told(capsys, SMALL, **words)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"{figures['memory_bytes']['peak'] / 2**30:.2f}" in table
    assert f"{figures['parameters']['total']:,}" in table
    assert figures["layout"]["ranks"] == 8
    assert figures["layout"]["expert_parallel"] == 4
    assert figures["seconds"]["step"] == pytest.approx(sum(v for k, v in figures["seconds"].items() if k != "step"))
    seconds = figures["budget_tokens"] / figures["tokens_per_second"]
    assert figures["gpu_hours"] == pytest.approx(8 * seconds / 3600)
    assert figures["mfu"] < DEVICES["a100"].reachable
    executed = figures["flops"]["executed_per_rank_and_step"] * 8 / figures["layout"]["batch_tokens"]
    assert executed > 4 / 3 * 0.9 * figures["flops"]["model_per_token"]


def test_recomputation_chunks_and_stages_change_what_they_should(capsys):
    def figures(**words):
        return json.loads(told(capsys, SMALL, json=True, gpus_per_node=4, **words))["memory_bytes"]

    plain = figures(zero=1)
    assert figures(zero=1, checkpointing="full")["activations"] < plain["activations"]
    assert figures(zero=3)["parameters"] < plain["parameters"]
    assert figures(zero=1, ep=1)["parameters"] > plain["parameters"]
    assert (
        figures(zero=2, sp=2, micro_batch_size=1)["activations"]
        < 0.6 * figures(zero=2, micro_batch_size=1)["activations"]
    )


def test_a_search_lets_ranks_share_long_sequences():
    """At most as many as a node has, which divide tokens and heads."""
    run = load_recipe(SMALL)
    assert list(sharing(run, 8)) == [1]
    assert list(sharing(override(run, {"parallel.sequence_parallel": 2}), 8)) == [2]
    long = override(run, {"model.max_seq_len": LONG_TOKENS, "data.seq_len": LONG_TOKENS})
    heads = {block.attention.heads for block in run.model.layers}
    assert list(sharing(long, 12)) == [n for n in (1, 2, 4) if all(count % n == 0 for count in heads)]


def test_what_is_offloaded_lies_in_the_nodes_memory(capsys):
    """Float32 weights and two moments of every parameter move, and its gradient, float32 as well, lies there too."""
    config = {"gpus_per_node": 4, "ds_config": "ds_configs/zero2_offload.json", "gpu": "a100"}
    figures = json.loads(told(capsys, SMALL, json=True, **config))
    memory, elements = figures["memory_bytes"], figures["parameters"]["total"]
    assert memory["optimizer"] == 0
    assert memory["host"] * 4 == pytest.approx(elements * (4 + 8 + 4), rel=1e-3)
    assert memory["node_host"] == 4 * (memory["host"] + memory["host_at_start"])
    text = told(capsys, SMALL, **config)
    assert f"{memory['host'] / 2**30:.2f} per rank" in text
    assert "what is offloaded is updated as fast as on the device" in text
    needed = memory["node_host"] / 2**30
    assert "are left" in told(capsys, SMALL, node_memory=2 * needed, **config)
    assert "does not fit" in told(capsys, SMALL, node_memory=needed / 2, **config)
    assert not json.loads(told(capsys, SMALL, json=True, node_memory=needed / 2, **config))["fits"]


def test_search_lists_what_fits_and_why_others_do_not(capsys):
    text = told(capsys, SMALL, gpus_per_node=2, search=True, best=2, gpu="t4")
    assert " layouts fit; the first 2:" in text
    assert "ZeRO stage 0 would train wrongly" in text
    _, *rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    speeds = [float(row[8].replace(",", "")) for row in rows]
    assert len(speeds) == 2
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ({"gpu": "h300"}, "t4, a100, h100"),
        ({"ep": 3}, "do not divide by expert_parallel (3)"),
        ({"zero": 0}, "ZeRO stage 0 would train wrongly"),
        ({"gpu": "t4", "precision": "bf16"}, "T4 has no bf16"),
        ({"micro_batch_size": 10007}, "does not divide them"),
        ({"zero": 1, "ds_config": "ds_configs/zero1.json"}, "both give a ZeRO stage"),
        ({"search": True, "json": True}, "--search prints a table"),
    ],
)
def test_what_cannot_be_is_refused(words, part):
    with pytest.raises(UserError, match=re.escape(part)):
        plan(SMALL, **words)


def test_one_recipe_is_wanted(tmp_path):
    with pytest.raises(UserError, match="give one recipe"):
        plan()
    with pytest.raises(UserError, match="there is no recipe"):
        plan(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="is no recipe"):
        plan(str(tmp_path / "empty.py"))


def test_the_command_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mosaic_dist", "plan", "--help"])
    with pytest.raises(SystemExit):
        run_main()
    assert "--checkpointing" in capsys.readouterr().out


def test_a_calibrated_machine_can_be_planned_for(tmp_path, monkeypatch, capsys):
    for name, value in (("PRODUCT_SIZE", 64), ("COPY_ELEMENTS", 1024), ("LEAST_SECONDS", 0.001)):
        monkeypatch.setattr(calibration, name, value)
    file = tmp_path / "here.yaml"
    plan(calibrate=str(file))
    device = Device.from_yaml(capsys.readouterr().out)
    assert find_device(str(file)) == device
    assert device.fp32 > 1e6
    assert device.memory_bytes > 1e8
    assert "CPU" in told(capsys, SMALL, gpu=str(file), gpus_per_node=2)
    with pytest.raises(UserError, match="exists"):
        plan(calibrate=str(file))


def test_calibration_multiplies_random_numbers(monkeypatch):
    """On constants a GPU is faster than in training."""
    operands: list[torch.Tensor] = []
    monkeypatch.setattr(calibration, "linear", lambda left, right: operands.extend((left, right)))
    calibration._product(64, torch.bfloat16, torch.device("cpu"))()
    assert all(operand.float().std() > 0.5 for operand in operands)
    assert len(operands) == 2


def test_an_a100_has_flash_attention_but_no_grouped_product():
    """Estimates follow the device: a grouped product exists on compute capability 9.0 and 10.0 only."""
    settings = {}
    for word in ("a100", "h100", "t4"):
        layout = make_layout(load_recipe(SMALL), {"zero_optimization": {"stage": 1}}, DEVICES[word], 1, 4)
        setting = setting_of(layout, DEVICES[word])
        settings[word] = (setting.attention, setting.grouped)
    assert settings == {"a100": ("flash", False), "h100": ("flash", True), "t4": ("efficient", False)}


def test_devices_are_known_by_their_drivers_names():
    assert device_called("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_called("NVIDIA H100 PCIe") is DEVICES["h100_pcie"]
    assert device_called("Tesla T4") is DEVICES["t4"]
    assert device_called("NVIDIA T400 4GB") is None
    assert all(device.source for device in DEVICES.values())


def test_a_ring_sends_most_inside_nodes_and_an_all_to_all_between_them():
    ring = Flow("all-reduce", "gradients of others", Span(16, 8), 160.0)
    assert (ring.sent, ring.sent_between) == (2 * 150.0, 300.0 / 8)
    exchange = Flow("all-to-all", "rows of tokens", Span(16, 8), 160.0)
    assert (exchange.sent, exchange.sent_between, exchange.sent_inside) == (150.0, 80.0, 70.0)
    assert Flow("all-gather", "weights of others", Span(8, 8), 80.0).sent_between == 0.0
