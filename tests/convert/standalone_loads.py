"""Run by `test_standalone.py` with `python -I`: what transformers alone makes of exported folders.

`standalone_loads.py ROOT`: reads ROOT/inputs.safetensors and the folders that ROOT/names.json lists; writes results to
ROOT/outputs.safetensors and the errors that it provoked to ROOT/errors.json.
"""

# ruff: noqa: E402 - what must not be imported is blocked before transformers could try

import json
import sys
from pathlib import Path

sys.modules |= dict.fromkeys(["mosaic_dist", "deepspeed", "xxhash", "streaming", "fire"])  # None: cannot be imported

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def message_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


root = Path(sys.argv[1])
torch.set_num_threads(1)
given = load_file(root / "inputs.safetensors")
tokens, labels = given["tokens"], given["labels"]
padded = {"input_ids": given["left"], "attention_mask": given["mask"]}
outputs, errors = {}, {}
for name in json.loads((root / "names.json").read_text()):
    model, report = AutoModelForCausalLM.from_pretrained(
        root / name, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        outputs[f"{name}/logits"] = model(tokens).logits
        outputs[f"{name}/loss"] = model(tokens, labels=labels).loss
        outputs[f"{name}/left"] = model(**padded).logits
        outputs[f"{name}/unmasked"] = model(given["left"]).logits
        flipped = {key: value.flip(1) for key, value in padded.items()}
        outputs[f"{name}/right"] = model(**flipped).logits
        outputs[f"{name}/greedy"] = model.generate(**padded, max_new_tokens=6, do_sample=False)
        outputs[f"{name}/beams"] = model.generate(**padded, max_new_tokens=6, do_sample=False, num_beams=3)
    model.save_pretrained(root / f"{name}-saved")
    hole = torch.ones_like(tokens)
    hole[0, 3] = 0
    errors[f"{name}/hole"] = message_of(lambda model=model, hole=hole: model(tokens, attention_mask=hole))
    errors[f"{name}/config"] = message_of(
        lambda model=model: AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    )
save_file({name: values.contiguous() for name, values in outputs.items()}, root / "outputs.safetensors")
(root / "errors.json").write_text(json.dumps(errors))
assert not [name for name in sys.modules if name.startswith(("mosaic_dist.", "deepspeed."))]
