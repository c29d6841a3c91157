"""Run by `test_standalone.py` with `python -I`: what transformers alone makes of exported folders.

`standalone_loads.py ROOT`: reads ROOT/inputs.safetensors and the folders that ROOT/names.json lists; writes results to
ROOT/outputs.safetensors and the errors that it provoked to ROOT/errors.json.
"""

# ruff: noqa: E402 - what must not be imported is blocked before transformers could try

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.modules |= dict.fromkeys(["mosaic_dist", "deepspeed", "xxhash", "streaming", "fire"])  # None: cannot be imported

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDER, NARROWER = 70, 50


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def load(name: str, **settings):
    """The model of a folder, without a tensor missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        root / name, trust_remote_code=True, dtype="auto", output_loading_info=True, **settings
    )
    assert not any(report.values()), report
    return model


def trained(model) -> dict[str, torch.Tensor]:
    """Gradients of all parameters in one row, and the bytes kept for them, without and with activation checkpoints."""
    found = {}
    model.train()
    for kind, settings in (
        ("plain", None),
        ("checkpointed", {"use_reentrant": False}),
        ("reentrant", {"use_reentrant": True}),
    ):
        if settings is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.nbytes), x)[1], lambda x: x):
            loss = model(tokens, labels=labels).loss
        model.zero_grad()
        loss.backward()
        found[f"gradients {kind}"] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found[f"bytes {kind}"] = torch.tensor(sum(kept))
    model.gradient_checkpointing_disable()
    model.eval()
    return found


@torch.no_grad()
def resized(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Logits and generated tokens with another number of tokens, from a model that was saved and loaded again."""
    model = load(name)
    assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
    model.save_pretrained(root / f"{name}-{rows}")
    model = load(f"{name}-{rows}")
    assert model.config.vocab_size == rows
    few = tokens.clamp(max=NARROWER - 1)
    generated = model.generate(few, max_new_tokens=3, do_sample=False)
    return {"resized": model(few).logits, "resized greedy": generated}


@torch.no_grad()
def offloaded(name: str) -> dict[str, torch.Tensor]:
    """Logits of a model whose weights come from memory or from files, part by part."""
    import accelerate

    cpu = torch.device("cpu")
    in_memory = accelerate.cpu_offload(load(name), execution_device=cpu)
    assert all(parameter.is_meta for parameter in in_memory.parameters())
    with tempfile.TemporaryDirectory() as folder:
        on_disk = accelerate.disk_offload(load(name), folder, execution_device=cpu)
        found = {"cpu_offload": in_memory(tokens).logits, "disk_offload": on_disk(tokens).logits}
    parts = {"embedding": "cpu", "position": "cpu", "norm": "disk", "head": "cpu"}
    layers = {f"layers.{i}": "disk" if i else "cpu" for i in range(len(in_memory.model.layers))}
    with tempfile.TemporaryDirectory() as folder:
        places = {f"model.{part}": place for part, place in (parts | layers).items()}
        found["device_map"] = load(name, device_map=places, offload_folder=folder)(tokens).logits
    return found


def exports_float32_experts() -> bool:
    """Whether torch can tell the shape of a grouped product in float32; 2.11 cannot."""
    with torch.device("meta"):
        x_RI, weight_eIO, ends_e = torch.empty(8, 8), torch.empty(1, 8, 8), torch.empty(1, dtype=torch.int32)
    try:
        torch.nn.functional.grouped_mm(x_RI, weight_eIO, offs=ends_e)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def exported(name: str) -> torch.Tensor:
    """Logits from torch.export's program of a model, which was made for another batch and length."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = load(name)

        def forward(self, input_ids, attention_mask=None):
            return self.model(input_ids, attention_mask).logits

    module, other = Logits(), torch.ones(3, 6, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", max=32)}
    program = torch.export.export(module, (other,), dynamic_shapes={"input_ids": sizes})
    errors[f"{name}/export"] = message_of(lambda: torch.export.export(module, (other, torch.ones_like(other))))
    assert torch.isfinite(module(other)).all()  # the model itself is as it was
    return program.module()(tokens)


def adapted(name: str) -> torch.Tensor:
    """Logits with random low-rank adapters on all linear layers, which are saved to a folder."""
    import peft

    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    model = peft.get_peft_model(load(name), adapters)
    model(input_ids=tokens, labels=labels).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(root / f"{name}-lora")
    again = peft.PeftModel.from_pretrained(load(name), root / f"{name}-lora")
    again.generate(input_ids=tokens, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        return again(tokens).logits


root = Path(sys.argv[1])
torch.set_num_threads(1)
given = load_file(root / "inputs.safetensors")
tokens, labels = given["tokens"], given["labels"]
padded = {"input_ids": given["left"], "attention_mask": given["mask"]}
outputs, errors = {}, {}
for name in json.loads((root / "names.json").read_text()):
    model = load(name)
    with torch.no_grad():
        outputs[f"{name}/logits"] = model(tokens).logits
        outputs[f"{name}/loss"] = model(tokens, labels=labels).loss
        outputs[f"{name}/left"] = model(**padded).logits
        outputs[f"{name}/unmasked"] = model(given["left"]).logits
        flipped = {key: value.flip(1) for key, value in padded.items()}
        outputs[f"{name}/right"] = model(**flipped).logits
        outputs[f"{name}/greedy"] = model.generate(**padded, max_new_tokens=6, do_sample=False)
        outputs[f"{name}/beams"] = model.generate(**padded, max_new_tokens=6, do_sample=False, num_beams=3)
        outputs[f"{name}/embeds"] = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
        for i, state in enumerate(model(tokens, output_hidden_states=True).hidden_states):
            outputs[f"{name}/state {i}"] = state
        prompt = {
            "inputs_embeds": model.get_input_embeddings()(padded["input_ids"]),
            "attention_mask": padded["attention_mask"],
        }
        outputs[f"{name}/greedy from embeds"] = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    model.save_pretrained(root / f"{name}-saved")
    outputs |= {f"{name}/{key}": values for key, values in trained(model).items()}
    for rows in (WIDER, NARROWER):
        outputs |= {f"{name}/{key} {rows}": values for key, values in resized(name, rows).items()}
    if find_spec("accelerate"):
        outputs |= {f"{name}/{key}": values for key, values in offloaded(name).items()}
    embeds = model.get_input_embeddings()(tokens)
    for kind, wrong in {
        "both": {"input_ids": tokens, "inputs_embeds": embeds},
        "neither": {"labels": labels},
        "attentions": {"input_ids": tokens, "output_attentions": True},
    }.items():
        errors[f"{name}/{kind}"] = message_of(lambda model=model, wrong=wrong: model(**wrong))
    errors[f"{name}/rows"] = message_of(lambda model=model: model.resize_token_embeddings(WIDER, mean_resizing=False))
    hole = torch.ones_like(tokens)
    hole[0, 3] = 0
    errors[f"{name}/hole"] = message_of(lambda model=model, hole=hole: model(tokens, attention_mask=hole))
    errors[f"{name}/config"] = message_of(
        lambda model=model: AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    )
for name in ("latent", "nano"):
    if name == "nano" or exports_float32_experts():
        outputs[f"{name}/exported"] = exported(name)
    if find_spec("peft"):
        outputs[f"{name}/adapted"] = adapted(name)
for name in ("nano-4.57.1", "nano-5.24.0"):
    with torch.no_grad():
        outputs[f"{name}/logits"] = load(name)(tokens).logits
words = AutoTokenizer.from_pretrained(root / "words")
outputs["words"] = load("words").generate(**words("one two", return_tensors="pt"), max_new_tokens=2, do_sample=False)
save_file({name: values.contiguous() for name, values in outputs.items()}, root / "outputs.safetensors")
(root / "errors.json").write_text(json.dumps(errors))
assert not [name for name in sys.modules if name.startswith(("mosaic_dist.", "deepspeed."))]
