"""Blocks compiled by torch: each block in one piece, or where it has experts all of it but the way to them and back.

A piece is compiled whole or not at all (`fullgraph`), so nothing falls back to slow code in silence; but a piece that
holds attention leaves out that to the documents of long packed sequences (`_attend_documents`). What follows the data
stays outside: which expert a token goes to, how many rows each gets, and where these travel. So shapes are those of the
micro-batch, and nothing is compiled again while they stay. Equal blocks share what was compiled for the first.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mosaic_dist.errors import UserError
from mosaic_dist.model.activation_checkpointing import ActivationCheckpointing
from mosaic_dist.model.attention import blocks as attention_blocks
from mosaic_dist.model.attention import kernel as attention_kernel
from mosaic_dist.model.block import BlockModule
from mosaic_dist.model.moe import MixtureOfExperts

CXX = "clang++" if sys.platform == "darwin" else "g++"
"""What torch takes where CXX names nothing (torch/_inductor/config.py)."""
VERSIONS = 4
"""Of a piece: with and without gradients, of packed documents and plain text."""


def compile_layers(
    model: nn.Module, checkpointing: ActivationCheckpointing, device: torch.device | str, backend: str = "inductor"
) -> None:
    """Let the blocks of a `TransformerModel` be compiled for `device` when they first run. Names and values stay.

    To be called before `apply_activation_checkpointing` with the same `checkpointing`: parts that run again do so from
    the outside.
    """
    # here, for these two import torch's whole compiler, which other processes do without
    documents_apart = torch.compiler.disable(attention_blocks._attend_documents)
    attention_blocks._attend_documents = documents_apart
    attention_kernel.flash_shares_heads = torch.compiler.assume_constant_result(attention_kernel.flash_shares_heads)
    layers: Any = model.layers
    place = torch.empty(0, device=device).device  # with its index, as tensors have it
    # the limit is one of all blocks together, for they share their code, and each may be of a kind of its own
    limit = max(torch._dynamo.config.recompile_limit, VERSIONS * len(layers))
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for i, block in enumerate(layers):
        block.attention.position.prepare(place)  # a first call unlike all others would be compiled apart
        for owner, name in pieces(block, checkpointing.parts_of(i)):
            is_whole = owner is not block.attention and (owner, name) not in ((block, "forward"), (block, "before_ffn"))
            compiled = torch.compile(getattr(owner, name), fullgraph=is_whole, dynamic=False, backend=backend)
            setattr(owner, name, compiled)  # of the instance, where it hides the class's and leaves all names alone


def pieces(block: BlockModule, recomputed: str) -> Iterator[tuple[nn.Module, str]]:
    """Methods of a block and its parts that are compiled; `recomputed` is the part of it that activation checkpointing
    runs again.
    """
    mixture = block.ffn if isinstance(block.ffn, MixtureOfExperts) else None
    if mixture is None and recomputed not in ("attention", "ffn"):
        yield block, "forward"
        return
    yield (block.attention, "forward") if recomputed == "attention" else (block, "before_ffn")
    yield block, "after_ffn"
    if mixture is None:
        yield block.ffn, "forward"
        return
    yield mixture.router, "weigh"
    yield mixture, "measure"
    if mixture.shared is not None:
        yield mixture.shared, "forward"


def check_compiler(on_gpu: bool) -> None:
    """Raise UserError where torch.compile would not find what it needs: a compiler, and the headers of Python.

    On CPUs the blocks become C++. On GPUs they become Triton kernels, which C code starts.
    """
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if on_gpu else ("C++", "CXX", (CXX,))
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(shutil.which(program) for program in chosen or usual):
        raise UserError(
            f"parallel.compile needs a {language} compiler, and there is no {' or '.join(chosen or usual)} on "
            f"the PATH; install one (apt-get install g++), name one in {variable}, or use "
            "--parallel.compile false"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise UserError(
            f"parallel.compile needs the headers of Python, and there is no {header}; install them (apt-get "
            "install python3-dev), or use --parallel.compile false"
        )
