"""Which parts do not go together, and what to use instead. Everything that is not named here must work."""

from mosaic_dist.model.attention import MLA, Attention, LinearAttention
from mosaic_dist.model.position import ALiBi, DecoupledRoPE, Position, RoPE
from mosaic_dist.spec import SpecError


def check_pair(attention: Attention, position: Position) -> None:
    """Refuse an attention that cannot work with the model's position: SpecError at `attention`."""
    for first, second, excepted, reason in REFUSED:
        if isinstance(attention, first) and isinstance(position, second) and not isinstance(position, excepted):
            names = f"{attention.type_name!r} with position {position.type_name!r}"
            raise SpecError("attention", f"{names}: {reason}")
    if isinstance(position, DecoupledRoPE) and not isinstance(attention, MLA):
        raise SpecError(
            "attention",
            f"{attention.type_name!r} with position 'decoupled_rope': only MLA has dimensions apart for it; "
            "use position 'rope', or attention 'mla'",
        )


REFUSED: tuple[tuple[type[Attention], type[Position], type[Position] | tuple[()], str], ...] = (
    (
        LinearAttention,
        ALiBi,
        (),
        "linear attention has no scores that a bias could be added to; use 'rope', 'sinusoidal', 'learned' or 'none'",
    ),
    (
        MLA,
        RoPE,
        DecoupledRoPE,
        "turned keys cannot be made from a cached latent, which is why MLA keeps them apart; use 'decoupled_rope', or "
        "attention 'gqa'",
    ),
)
"""Attention, position, exceptions of that position, and the reason with the alternatives."""
