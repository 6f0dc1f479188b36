"""Weight-only int8: one scale per output row, `w ~ scale * q`, q in [-127, 127] (the layout ChatGLM-6B shipped for 8 bits).

Embeddings, norms and the language-model head stay as they are. On disk: the model's safetensors, where each quantised
`X.weight` becomes `X.weight_int8` (int8 `[out, in]`) and `X.scale` (fp32 `[out]`), and `danlu_quantization` in config.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.registry import family_of

KEY = "danlu_quantization"
FILE = "model.safetensors"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; computes in the dtype of its input."""

    def __init__(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight_int8.shape

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight_int8  # type: ignore[assignment]
        scale: Tensor = self.scale  # type: ignore[assignment]
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        out = nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
        return out if bias is None else out + bias.to(x.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and fp32 scales of a weight `[out, in]`: `scale = max|row| / 127`, rounded to nearest."""
    scale = weight.float().abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def quantize_model(model: Any) -> Any:
    """Replaces the linear layers of the trunk by int8 ones, in place.

    Raises:
        ModelError: there is nothing to quantise, or it is quantised already.
    """
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        raise ModelError("the model is quantised already", hint="quantise the model it was made from")
    head = model.get_output_embeddings()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layers that int8 knows how to replace")
    for name, linear in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        bias = linear.bias.detach() if linear.bias is not None else None
        setattr(parent, name.rpartition(".")[2], Int8Linear(*quantize_rows(linear.weight.detach()), bias))
    return model


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder was written by `save_quantized`."""
    config = Path(folder) / "config.json"
    return config.is_file() and KEY in json.loads(config.read_text("utf-8"))


def save_quantized(model: Any, tokenizer: Any | None, folder: Path) -> Path:
    """Writes a quantised model, under a temporary name first."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue  # tied weights are stored once and tied again on loading
        seen.add(tensor.data_ptr())
        state[name] = tensor.detach().contiguous()
    save_file(state, temporary / FILE, metadata={"format": "pt"})
    config = model.config.to_dict() | {KEY: {"bits": 8, "layout": "per-row symmetric", "layers": "linear"}}
    (temporary / "config.json").write_text(json.dumps(config, indent=2, default=str), "utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def load_quantized(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Loads what `save_quantized` wrote; the 16-bit weights are never made.

    Raises:
        ModelError: weights and configuration do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family_of(json.loads((Path(folder) / "config.json").read_text("utf-8")))  # registers danlu's own
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    state = load_file(Path(folder) / FILE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name in [n.removesuffix(".weight_int8") for n in state if n.endswith(".weight_int8")]:
        layer = Int8Linear(state[f"{name}.weight_int8"], state[f"{name}.scale"].float(), state.get(f"{name}.bias"))
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    rest = {n: t.to(dtype) if t.is_floating_point() and not n.endswith(".scale") else t for n, t in state.items()}
    result = model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left or result.unexpected_keys:
        raise ModelError(f"weights do not fit the configuration: {[*left, *result.unexpected_keys][0]}", file=folder)
    _materialise_buffers(model, config)
    return model


def _materialise_buffers(model: Any, config: Any) -> None:
    """Non-persistent buffers (rotary frequencies) are functions of the configuration: make them again off the meta device."""
    for module in model.modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            try:
                fresh = type(module)(config=config)
            except TypeError as error:
                raise ModelError(
                    f"{type(module).__name__} holds buffers that are not in the file and cannot be made from the configuration",
                    hint="load the unquantised model",
                ) from error
            for name, value in fresh.named_buffers(recurse=False):
                setattr(module, name, value)
