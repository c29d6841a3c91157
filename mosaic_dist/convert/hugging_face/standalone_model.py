"""A model of ours as one of transformers' classes, for exported folders that load where this package is not installed.

Nothing here imports this file: `standalone.py` joins it with the model's own code and writes it into the folder. So
it is the one place of the package that imports transformers.
"""

# mypy: disable-error-code="import-not-found,misc,override,assignment,attr-defined,arg-type"
# transformers may be absent, and its own two base classes disagree

from dataclasses import replace
from typing import Any

from torch import Tensor, cat, compiler, device, nn, no_grad
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mosaic_dist.model.transformer import Transformer, make_attention_metadata


class MosaicConfig(PretrainedConfig):
    """config.json: `mosaic` is the model in full, as mosaic_dist writes it; the rest repeats parts of it for tools.

    `tie_word_embeddings` has the default of transformers 4, which does not save it then; transformers 5 has none.
    """

    model_type = "mosaic"

    def __init__(self, mosaic: dict[str, Any] | None = None, tie_word_embeddings: bool = True, **settings: Any):
        self.mosaic = mosaic
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


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
    _no_split_modules = ("PreNormBlock", "SphereBlock")
    """Layers that `device_map` keeps on one device."""
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    """Whether layers are computed again in the backward pass; `gradient_checkpointing_enable` sets it."""

    def __init__(self, config: MosaicConfig):
        super().__init__(config)
        self.model = Transformer.from_dict(config.mosaic).build()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """input_ids int64 [B, T] -> logits [B, T, V]; with labels [B, T] (-100: not scored) also their mean loss.

        `inputs_embeds` [B, T, D] stands for what `get_input_embeddings()` gives for the tokens. Labels are shifted
        here: logits at t are scored against labels at t + 1. `attention_mask` [B, T] is 1 for text and 0 for padding on
        either side of it; logits of padding mean nothing. The L + 1 hidden states [B, T, D] are the input of each
        layer, and what the head sees. ValueError for a mask with padding inside a text, for both kinds of input or
        neither, for more tokens than the model's context, and for `output_attentions`: no kernel gives them.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: this model's attention keeps no weights to show; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, not {given}")
        x_BTD = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        states = self._hidden_states(x_BTD, documents_of(attention_mask))
        logits_BTV = self.model.head(states[-1])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits_BTV, labels, vocab_size=logits_BTV.shape[-1], num_items_in_batch=num_items_in_batch
            )
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutput(loss=loss, logits=logits_BTV, hidden_states=tuple(states) if wanted else None)
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _hidden_states(self, x_BTD: Tensor, documents_BT: Tensor | None) -> list[Tensor]:
        """Embeddings -> the input of each layer, and what the head sees; as `TransformerModel.forward`."""
        metadata = make_attention_metadata(x_BTD[..., 0], documents_BT)
        longest, context = x_BTD.shape[1], self.model.spec.max_seq_len
        if longest > context:
            raise ValueError(f"{longest} tokens are more than the model's context ({context})")
        states = [self.model.position(x_BTD, metadata.positions_BT)]
        for block in self.model.layers:
            if self.gradient_checkpointing and self.training:
                x_BTD, _ = self._gradient_checkpointing_func(block.__call__, states[-1], metadata)
            else:
                x_BTD, _ = block(states[-1], metadata)
            states.append(x_BTD)
        states[-1] = self.model.norm(states[-1])
        return states

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The whole text each time: embeddings, where the prompt was given so, and the tokens after them."""
        if inputs_embeds is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        if input_ids.shape[1]:
            inputs_embeds = cat([inputs_embeds, self.model.embedding(input_ids)], 1)
        return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Module:
        """The module with the table as `weight`."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head; where it shares the embedding's table, the same `weight`."""
        return self.model.head

    @no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Give the tables `new_num_tokens` rows, rounded up to a multiple; new rows are the mean of the old ones.

        The configuration, `mosaic` in it too, describes the new model. ValueError for `mean_resizing=False`: the model
        has no other initial values. Returns the embedding.
        """
        old = self.model.spec.vocab_size
        vocab = old if new_num_tokens is None else new_num_tokens
        vocab += -vocab % (pad_to_multiple_of or 1)
        if vocab > old and not mean_resizing:
            raise ValueError("mean_resizing=False: new tokens get the mean of the old ones here; leave it True")
        spec = replace(self.model.spec, vocab_size=vocab)
        with device("meta"):
            resized = {name: tuple(p.shape) for name, p in spec.build().named_parameters(remove_duplicate=False)}
        rows: dict[nn.Parameter, nn.Parameter] = {}  # a shared table stays shared
        for name, table in list(self.model.named_parameters(remove_duplicate=False)):
            if resized[name] != table.shape:
                if table not in rows:
                    new = table.mean(0, keepdim=True).expand(max(vocab - old, 0), *table.shape[1:])
                    rows[table] = nn.Parameter(cat([table[:vocab], new]), requires_grad=table.requires_grad)
                owner, _, kind = name.rpartition(".")
                setattr(self.model.get_submodule(owner), kind, rows[table])
        self.model.spec = spec
        self.config.mosaic, self.config.vocab_size = spec.to_dict(), vocab
        return self.model.embedding

    def _init_weights(self, module: nn.Module) -> None:
        """ValueError, but for what waits on a disk until it is needed."""
        if all(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return
        raise ValueError("weights are missing, and an exported model has no initial ones; load it with from_pretrained")


def documents_of(attention_mask: Tensor | None) -> Tensor | None:
    """Mask [B, T], 1 for text -> numbers of documents int64 [B, T]; None where all is text.

    Padding is a document of its own, -1, that the text, 0, does not see; positions begin anew with the text.
    """
    if attention_mask is None:
        return None
    if compiler.is_exporting():
        raise ValueError("attention_mask cannot be exported: where padding ends is read from it; export without one")
    if bool(attention_mask.all()):
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
