"""A longstride model as transformers sees it: ``AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)``.

The model is the one that was trained (``longstride_transformer.py`` in an exported directory), on one device. There is no cache of keys or
states: ``generate`` reads the whole text again for every token.

Legend: B row, T token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from trainer.interchange.configuration_longstride import LongstrideConfig


class LongstrideForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of every token, and the mean loss where labels are given."""

    config_class = LongstrideConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]

    def __init__(self, config: LongstrideConfig) -> None:
        super().__init__(config)
        self.model = Transformer(ModelConfig.model_validate(config.longstride), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Of a model that is made without weights; never of one that is loaded."""
        if isinstance(module, Transformer) and not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
            init_weights(module, 0)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """logits [B, T, V]. ``attention_mask`` [B, T] may hide the beginning and the end of a row (padding); ``labels`` are shifted here,
        as in every model of transformers, and -100 does not count. Raises ValueError for inputs that this model does not take."""
        foreign = [name for name in ("inputs_embeds", "past_key_values", "position_ids") if kwargs.get(name) is not None]
        if foreign:
            raise ValueError(f"{foreign[0]} is not supported by longstride models")
        hidden = self.model.hidden(_batch(input_ids, attention_mask))
        weight = self.model.embed.weight if self.model.head is None else self.model.head.weight
        logits = F.linear(hidden, weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The whole text, at every token."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _batch(input_ids: Tensor, attention_mask: Tensor | None) -> Batch:
    """The row's visible tokens are one document, whose positions begin at 0; padding before it is another."""
    rows, tokens = input_ids.shape
    positions = torch.arange(tokens, device=input_ids.device).expand(rows, tokens)
    starts = [0] * rows
    if attention_mask is not None:
        visible = attention_mask.to(input_ids.device).bool()
        if visible.shape != input_ids.shape or ((~visible[:, :-1] & visible[:, 1:]).sum(1) > (~visible[:, 0]).int()).any():
            raise ValueError("attention_mask must be [rows, tokens] with one stretch of visible tokens per row")
        starts = torch.where(visible.any(1), visible.int().argmax(1), 0).tolist()
        positions = (positions - torch.tensor(starts, device=input_ids.device)[:, None]).clamp_(min=0)
    documents = tuple((0, start) if start else (0,) for start in starts)
    return Batch(input_ids, input_ids, positions, Bounds(tokens, ((0, tokens),), documents))
