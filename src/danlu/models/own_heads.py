"""What the heads of danlu's own families share: where a text is read, losses, classes for tokens, the new part of a span."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from danlu.exceptions import ModelError

IGNORED = -100  # labels that carry no loss


def classify_loss(logits: Tensor, labels: Tensor | None, config: Any) -> SequenceClassifierOutput:
    """Logits with their loss: cross entropy over classes (labels of -100 carry none), squared error for one number."""
    loss = None
    if labels is not None and config.num_labels == 1:
        loss = functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    elif labels is not None:
        loss = functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)
    return SequenceClassifierOutput(loss=loss, logits=logits)


def aligned_loss(logits_BTV: Tensor, labels_BT: Tensor | None) -> Tensor | None:
    """Mean cross entropy in fp32 of labels that stand where they are predicted; None without labels."""
    if labels_BT is None:
        return None
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)


def shifted_loss(logits_BTV: Tensor, labels_BT: Tensor | None) -> Tensor | None:
    """`aligned_loss` of a causal model: token t is predicted at t - 1."""
    return None if labels_BT is None else aligned_loss(logits_BTV[:, :-1], labels_BT[:, 1:])


def last_places(real_BT: Tensor) -> Tensor:
    """Index of the last real token of each row `[B]`; 0 in a row without one."""
    return (real_BT.long() * torch.arange(real_BT.shape[1], device=real_BT.device)).argmax(1)


def at_places(hidden_BTD: Tensor, places_B: Tensor) -> Tensor:
    """One hidden state of each row, `[B, D]`."""
    return hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), places_B]


def new_part(
    input_ids: Tensor, positions: Tensor, mask: Tensor, past_key_values: Any, use_cache: bool
) -> dict[str, Any]:
    """Arguments of `forward` for the tokens that the cache does not hold yet.

    Args:
        positions: `[..., K]` and mask: `[B, 1, K, K]` of the whole text with the room that was made for the span.

    Raises:
        ModelError: the text has outgrown them.
    """
    total = input_ids.shape[1]
    before = past_key_values.get_seq_length() if past_key_values is not None else 0
    if total > min(positions.shape[-1], mask.shape[-1]):
        raise ModelError(
            f"{total} tokens, but positions and mask were given for {positions.shape[-1]}",
            hint="build the inputs with more room, or generate fewer tokens",
        )
    return {
        "input_ids": input_ids[:, before:],
        "position_ids": positions[..., before:total],
        "attention_mask": mask[:, :, before:total, :total],
        "past_key_values": past_key_values,
        "use_cache": use_cache,
    }


class TokenClasses:
    """A class for every token; stands before a family's pretrained model.

    trunk: the family's transformer. dropout_of: the configuration's field for what stands before the head. options: for the trunk.
    """

    trunk: ClassVar[Any]
    dropout_of: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.trunk(config))
        self.dropout = nn.Dropout(getattr(config, self.dropout_of))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self: Any, input_ids: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits `[B, T, labels]`, labels of -100 carry no loss; all else as the family's transformer takes it."""
        hidden = self.base_model(input_ids, *args, **self.options, **kwargs).last_hidden_state
        return classify_loss(self.score(self.dropout(hidden)), labels, self.config)
