"""P-Tuning v2's prefix as ChatGLM has it (Liu et al. 2021, arXiv 2110.07602): keys and values of `pre_seq_len` virtual tokens.

They are not rotated, all tokens see them, and positions are not shifted. Fine-tunes stored the encoder alone, as
`prefix_encoder.safetensors` beside the base model's weights, or in a `pytorch_model.bin` of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.prefix_table import PrefixTable
from danlu.models.weights import read_weights

FILES = ("prefix_encoder.safetensors", "prefix_encoder.bin")
NAME = "prefix_encoder."
DROPOUT = 0.1  # of the prefix in training, as the original


class ChatGLMPrefix(PrefixTable):
    """Keys and values of the virtual tokens, with the original's dropout in training.

    Args:
        tokens: pre_seq_len.
        numbers: of a virtual token: layers * 2 * key heads * head width.
        width, hidden: see `PrefixTable`; no width where prefix_projection is false.
    """

    def __init__(self, tokens: int, numbers: int, *, width: int | None, hidden: int | None) -> None:
        super().__init__(tokens, numbers, width=width, hidden=hidden)
        self.dropout = nn.Dropout(DROPOUT)

    def states(self, layers: int, heads: int, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[batch, heads, pre, K]` of each layer: slots 2i and 2i + 1 of a virtual token."""
        rows = self.rows()
        rows = rows.view(len(rows), 2 * layers, heads, -1)[None].expand(batch, -1, -1, -1, -1)
        slots = self.dropout(rows).permute(2, 0, 3, 1, 4)
        return [(slots[2 * i], slots[2 * i + 1]) for i in range(layers)]


def prefix_file(folder: Path) -> Path | None:
    """The saved prefix encoder beside a model's weights."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_prefix(file: Path) -> dict[str, Tensor]:
    """The tensors of a saved prefix encoder by their names inside of it (`embedding.weight`, `trans.0.weight`, ...).

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    found = {key.rpartition(NAME)[2]: tensor for key, tensor in read_weights([file])}
    if "embedding.weight" not in found:
        raise ModelError(
            "found no prefix encoder: embedding.weight is missing",
            file=file,
            hint="expected names such as transformer.prefix_encoder.embedding.weight",
        )
    return found


def fit_config(config: Any, state: Mapping[str, Tensor], file: Path) -> None:
    """Sets `pre_seq_len` and `prefix_projection` to what a saved prefix encoder is made for.

    Raises:
        ModelError: config.json says another length.
    """
    length = state["embedding.weight"].shape[0]
    if config.pre_seq_len not in (None, 0, length):
        raise ModelError(
            f"the prefix encoder has {length} virtual tokens and config.json says pre_seq_len {config.pre_seq_len}",
            file=file,
            field="pre_seq_len",
        )
    config.pre_seq_len = length
    config.prefix_projection = "trans.0.weight" in state


class LoadsPrefix:
    """For models with `transformer.prefix_encoder`: `from_pretrained` applies a saved one that lies beside the weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        load: Callable[..., Any] = super().from_pretrained  # type: ignore[misc]
        folder = Path(str(pretrained_model_name_or_path))
        file = prefix_file(folder) if folder.is_dir() else None
        state = read_prefix(file) if file is not None else None
        if file is not None and state is not None:
            config = kwargs.pop("config", None)
            if config is None or isinstance(config, str | Path):
                config = cls.config_class.from_pretrained(config or folder)  # type: ignore[attr-defined]
            for name in [n for n in ("pre_seq_len", "prefix_projection", "quantization_bit") if n in kwargs]:
                setattr(config, name, kwargs.pop(name))
            fit_config(config, state, file)
            kwargs["config"] = config
        loaded = load(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        if file is not None and state is not None:
            _put(model, state, file)
            if info is not None:
                missing = info["missing_keys"]
                info["missing_keys"] = type(missing)(key for key in missing if NAME not in key)
        freeze_all_but_prefix(model)  # loading makes new parameters
        return loaded


def freeze_all_but_prefix(model: Any) -> None:
    """With a prefix nothing else learns, as in the original; without one all does."""
    if model.base_model.prefix_length:
        model.requires_grad_(False)
        model.base_model.prefix_encoder.requires_grad_(True)


def _put(model: Any, state: Mapping[str, Tensor], file: Path) -> None:
    try:
        model.base_model.prefix_encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"the prefix encoder was made for another model: {reason}", file=file) from error
