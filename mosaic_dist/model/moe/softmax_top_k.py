"""Router: softmax over all experts, then the best (Switch, arXiv 2101.03961; OLMoE, arXiv 2409.02060)."""

from torch import Tensor

from mosaic_dist.model.moe.router import Router, RouterModule


class SoftmaxTopK(Router, type="softmax_top_k"):
    """Softmax over all experts; the `top_k` largest probabilities are the weights.

    With `normalize` the weights of a token are scaled to sum to one; with one choice they are then all 1, and only the
    balance loss trains the router.
    """

    normalize: bool = True

    def build(self, dim: int, experts: int, top_k: int, bias: bool) -> RouterModule:
        """Router over `experts` logits."""
        return SoftmaxTopKRouter(dim, experts, top_k, bias, self.normalize)


class SoftmaxTopKRouter(RouterModule):
    """Weighs by a softmax over all experts, normalised over the chosen ones if asked."""

    def __init__(self, dim: int, experts: int, top_k: int, bias: bool, normalize: bool):
        super().__init__(dim, experts, top_k, bias)
        self.normalize = normalize

    def choose(self, logits_SE: Tensor) -> Tensor:
        """The `top_k` largest logits of each token."""
        return logits_SE.softmax(-1).topk(self.top_k, dim=-1).indices

    def weigh(self, logits_SE: Tensor, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen probabilities, and all of them for the balance loss."""
        probs_SE = logits_SE.softmax(-1)
        weights_SK = probs_SE.gather(-1, experts_SK)
        if self.normalize:
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        return probs_SE, weights_SK
