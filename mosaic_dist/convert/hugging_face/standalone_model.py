"""A model of ours as one of transformers' classes, for exported folders that load where this package is not installed.

Nothing here imports this file: `standalone.py` joins it with the model's own code and writes it into the folder. So
it is the one place of the package that imports transformers.
"""

# mypy: disable-error-code="import-not-found,misc,override,assignment,attr-defined,arg-type"
# transformers may be absent, and its own two base classes disagree

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mosaic_dist.model.transformer import Transformer


class MosaicConfig(PretrainedConfig):
    """config.json: `mosaic` is the model in full, as mosaic_dist writes it; the rest repeats parts of it for tools."""

    model_type = "mosaic"

    def __init__(self, mosaic: dict[str, Any] | None = None, **settings: Any):
        self.mosaic = mosaic
        super().__init__(**settings)


class MosaicForCausalLM(PreTrainedModel, GenerationMixin):
    """The model, unchanged, as `model`; its tensors have the names of mosaic_dist after `model.`.

    Generation computes the whole text anew for each token: there is no cache of past tokens, whatever `use_cache` says.
    The loss of `labels` is the cross-entropy alone, without the balance losses of pretraining.
    """

    config_class = MosaicConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    """The Trainer passes `num_items_in_batch`."""
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - transformers wants it so
    """Where the configuration says `tie_word_embeddings`; older versions look at the keys only."""

    def __init__(self, config: MosaicConfig):
        super().__init__(config)
        self.model = Transformer.from_dict(config.mosaic).build()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """input_ids int64 [B, T] -> logits [B, T, V]; with labels [B, T] (-100: not scored) also their mean loss.

        Labels are shifted here: logits at t are scored against labels at t + 1. `attention_mask` [B, T] is 1 for text
        and 0 for padding on either side of it; logits of padding mean nothing. ValueError for a mask that is not so.
        """
        logits_BTV = self.model(input_ids, documents_BT=documents_of(attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits_BTV, labels, vocab_size=logits_BTV.shape[-1], num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutput(loss=loss, logits=logits_BTV)
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """The whole text each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Module:
        """The module with the table as `weight`."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head; where it shares the embedding's table, the same `weight`."""
        return self.model.head

    def _init_weights(self, module: nn.Module) -> None:
        raise ValueError("weights are missing, and an exported model has no initial ones; load it with from_pretrained")


def documents_of(attention_mask: Tensor | None) -> Tensor | None:
    """Mask [B, T], 1 for text -> numbers of documents int64 [B, T]; None where all is text.

    Padding is a document of its own, -1, that the text, 0, does not see; positions begin anew with the text.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must be [batch, tokens]: 1 for text, 0 for padding"
        )
    text_BT = attention_mask.bool()
    begins_B = text_BT[:, 0].long() + (text_BT[:, 1:] & ~text_BT[:, :-1]).sum(1)
    if bool((begins_B > 1).any()):
        raise ValueError("attention_mask has padding inside a text; pad before or after it")
    return text_BT.long() - 1
