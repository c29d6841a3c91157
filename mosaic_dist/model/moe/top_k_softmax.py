"""Router: the best logits, then softmax over these (Mixtral, arXiv 2401.04088; gpt-oss, arXiv 2508.10925)."""

from torch import Tensor

from mosaic_dist.model.moe.router import Router, RouterModule


class TopKSoftmax(Router, type="top_k_softmax"):
    """The `top_k` largest logits; their softmax is the weights.

    On paper this is `softmax_top_k` with normalised weights. In floats it is not where probabilities underflow: logits
    are still told apart there. The balance loss sees the softmax over all experts, as Mixtral's does.
    """

    def build(self, dim: int, experts: int, top_k: int, bias: bool) -> RouterModule:
        """Router over `experts` logits."""
        return TopKSoftmaxRouter(dim, experts, top_k, bias)


class TopKSoftmaxRouter(RouterModule):
    """Chooses by the logits and weighs by a softmax over the chosen ones."""

    def choose(self, logits_SE: Tensor) -> Tensor:
        """The `top_k` largest logits of each token."""
        return logits_SE.topk(self.top_k, dim=-1).indices

    def weigh(self, logits_SE: Tensor, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the chosen logits, and over all of them for the balance loss."""
        return logits_SE.softmax(-1), logits_SE.gather(-1, experts_SK).softmax(-1)
