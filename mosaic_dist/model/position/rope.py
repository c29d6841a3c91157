"""Rotary positions (RoFormer, arXiv 2104.09864), their scaling to longer contexts, and the decoupled form of MLA."""

import math

import torch
from torch import Tensor

from mosaic_dist.model.position.position import Constants, HeadPosition, Position
from mosaic_dist.spec import Positive, PositiveFloat, Spec, SpecError


class Scaling(Spec):
    """Family of ways to use rotary positions beyond the length that they were trained at, by a `factor`."""

    factor: PositiveFloat

    def frequencies(self, plain: list[float], theta: float, head_dim: int) -> list[float]:
        """Angles per position of each pair of dimensions, from the unscaled ones."""
        raise TypeError(f"{type(self).__name__} has no frequencies: choose a kind of scaling")

    def magnitude(self) -> float:
        """Factor on rotated queries and keys."""
        return 1.0


class LinearScaling(Scaling, type="linear"):
    """Positions divided by the factor (Chen et al., arXiv 2306.15595)."""

    def frequencies(self, plain: list[float], theta: float, head_dim: int) -> list[float]:
        """All lowered alike."""
        return [frequency / self.factor for frequency in plain]


class NTKScaling(Scaling, type="ntk"):
    """A larger base, so that fast pairs stay and slow ones stretch by the factor ("NTK-aware", bloc97 2023)."""

    def frequencies(self, plain: list[float], theta: float, head_dim: int) -> list[float]:
        """base * factor^(width / (width - 2))."""
        return _plain_frequencies(theta * self.factor ** (head_dim / (head_dim - 2)), head_dim)


class YaRN(Scaling, type="yarn"):
    """Slow pairs stretched, fast ones kept, a ramp between (Peng et al., arXiv 2309.00071).

    The ramp runs over the pairs that turn `beta_slow` to `beta_fast` times within `original_max_seq_len`; `truncate`
    rounds its ends to whole pairs, as the paper's code does and gpt-oss does not. Attention is sharpened by 0.1
    ln(factor) + 1 on queries and keys each, unless `attention_factor` says otherwise.
    """

    original_max_seq_len: Positive
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True
    attention_factor: PositiveFloat | None = None

    def frequencies(self, plain: list[float], theta: float, head_dim: int) -> list[float]:
        """Interpolated below the ramp, as they are above it."""

        def pair_of(turns: float) -> float:
            return head_dim * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high if high > low else low + 0.001
        kept = [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
        return [f * share + f / self.factor * (1 - share) for f, share in zip(plain, kept, strict=True)]

    def magnitude(self) -> float:
        """The attention factor."""
        default = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return default if self.attention_factor is None else self.attention_factor


class Llama3Scaling(Scaling, type="llama3"):
    """Wavelengths beyond `original_max_seq_len / low_frequency_factor` stretched, short ones kept (Llama 3.1)."""

    original_max_seq_len: Positive = 8192
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0

    def frequencies(self, plain: list[float], theta: float, head_dim: int) -> list[float]:
        """Interpolated by wavelength."""
        out = []
        for frequency in plain:
            turns = self.original_max_seq_len * frequency / (2 * math.pi)
            spread = self.high_frequency_factor - self.low_frequency_factor
            share = min(max((turns - self.low_frequency_factor) / spread, 0.0), 1.0)
            out.append(share * frequency + (1 - share) * frequency / self.factor)
        return out


class RoPE(Position, type="rope"):
    """Queries and keys turned by angles that grow with position.

    Dimension i is paired with i + H/2, as in GPT-NeoX and in the Hugging Face form of Llama.
    """

    theta: PositiveFloat = 10_000.0
    scaling: Scaling | None = None

    def for_heads(self, heads: int, head_dim: int) -> HeadPosition:
        """Angles for heads of this width, which must be even."""
        if head_dim % 2:
            raise SpecError("position", f"rotary positions need an even head width, not {head_dim}")
        return Rotation(self, head_dim)


class DecoupledRoPE(RoPE, type="decoupled_rope"):
    """Rotary positions on `rope_head_dim` dimensions beside the position-free ones, for MLA (DeepSeek-V2, arXiv
    2405.04434).
    """

    rope_head_dim: Positive = 32


def _plain_frequencies(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


class Rotation(HeadPosition):
    """Applies `RoPE`. Angles are made in float32 for the positions at hand, so nothing is stored or limited in
    length.
    """

    def __init__(self, spec: RoPE, head_dim: int):
        plain = _plain_frequencies(spec.theta, head_dim)
        scaling = spec.scaling
        self.frequencies = plain if scaling is None else scaling.frequencies(plain, spec.theta, head_dim)
        self.magnitude = 1.0 if scaling is None else scaling.magnitude()
        self._kept = Constants(self.frequencies)

    def prepare(self, device: torch.device) -> None:
        """Keep the frequencies there."""
        self._kept.on(device)

    def rotate(self, x_BTNH: Tensor, positions_BT: Tensor) -> Tensor:
        """Turn each pair of dimensions by position * frequency."""
        angles = positions_BT[:, :, None, None].float() * self._kept.on(x_BTNH.device)
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        first, second = x_BTNH.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTNH.dtype)
