"""Models with a one-number head, for rewards and values, of every decoder family; transformers has them for some."""

from __future__ import annotations

import functools
from typing import Any


def scalar_class(config: Any) -> Any:
    """The class of a family's models with a head `score` of `num_labels` numbers on the last token.

    transformers' own where it has one; otherwise one made of its generic parts, which the Auto classes know from then on.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    kind: Any = type(config)
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None  # the generic part asks for it; rows are never padded here
    return KNOWN[kind] if kind in KNOWN else _made(kind)


@functools.cache
def _made(config_class: Any) -> Any:
    from transformers import MODEL_MAPPING, AutoModelForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    trunk = MODEL_MAPPING[config_class]
    base = next(c for c in trunk.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    # The generic part calls the trunk `model`; weights of the family have it under the family's own name.
    attributes = {"__module__": __name__, "base_model_prefix": base.base_model_prefix}
    kind = type(name, (GenericForSequenceClassification, base), attributes)
    AutoModelForSequenceClassification.register(config_class, kind)
    return kind
