"""Fills a model that has no weights with those of a folder, tensor by tensor, packed as they come.

Whole models of 16 bits are never held: each tensor is read, rounded or taken over, and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu import heap
from danlu.exceptions import ModelError
from danlu.models.fingerprint import HASH, digest_of, sample_of
from danlu.models.packed import PackedLinear
from danlu.models.packed_layouts import Layout
from danlu.models.packed_tables import Tables
from danlu.models.quantized_layers import linear_layers, replace, weight_of
from danlu.models.stored_tensors import Stored, stored_tensors

TRIMMED_EVERY = 2**25  # numbers that were read
# What old checkpoints hold beside weights, and models make themselves.
MADE = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


class Filling:
    """Gives a model without weights those of a folder, one tensor at a time."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype, tables: bool) -> None:
        self.model, self.folder, self.dtype = model, folder, dtype
        self.tables = Tables(model) if tables else None
        self.expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        self._read = 0
        self.prefix = f"{model.base_model_prefix}."

    def packed(self, layout: Layout) -> None:
        """Packed layers and the rest.

        Raises:
            ModelError: the weights do not fit.
        """
        tensors = list(stored_tensors(self.folder))
        modules = {
            self._module(t.name.rpartition(".")[0]) for t in tensors if t.name.rpartition(".")[2] in layout.marks
        }
        leaves = (*layout.parts, "bias")
        wanted: dict[str, set[str]] = {m: set() for m in modules}
        for stored in tensors:
            owner, _, leaf = stored.name.rpartition(".")
            if leaf in leaves and self._module(owner) in modules:
                wanted[self._module(owner)].add(leaf)
        parts: dict[str, dict[str, Tensor]] = {m: {} for m in modules}
        for stored in tensors:
            self._tidy(stored)
            owner, _, leaf = stored.name.rpartition(".")
            module = self._module(owner)
            if module not in modules or leaf not in leaves:
                if not self._put(stored):
                    raise self._misfit(stored.name)
                continue
            tensor = stored.read()
            parts[module][leaf] = tensor.to(self.dtype) if leaf == "bias" else tensor
            if parts[module].keys() == wanted[module]:
                self._place(module, layout, parts.pop(module))
        left = self._finish()
        if left:
            raise self._misfit(left[0])

    def _place(self, module: str, layout: Layout, parts: dict[str, Tensor]) -> None:
        try:
            layer = layout.build(parts)
            old = self.model.get_submodule(module)
            fits = (layer.out_features, layer.in_features) == tuple(weight_of(old).shape)
        except (KeyError, AttributeError) as error:
            raise self._misfit(f"{module} ({layout.name}): {error}") from error
        if not fits:
            raise self._misfit(module)
        replace(self.model, module, layer)

    def rounded(self, packed: Callable[[Tensor, Tensor | None], PackedLinear]) -> bool:
        """Linear layers as `packed` makes them of a weight, and the rest; False where the folder's names are not the model's."""
        layers = linear_layers(self.model)
        tensors = list(stored_tensors(self.folder))
        known = {self._key(t.name) for t in tensors} - {None}
        if any(self._key(t.name) is None and not t.name.endswith(MADE) for t in tensors):
            return False
        if any(f"{n}.weight" not in known for n in layers):
            return False
        biases: dict[str, Tensor] = {}
        trunk = {n for n, _ in self.model.base_model.named_parameters()}
        samples: dict[str, bytes] = {}
        for stored in tensors:
            self._tidy(stored)
            key = self._key(stored.name) or ""
            owner, _, leaf = key.rpartition(".")
            if (name := key.removeprefix(self.prefix)) in trunk and (
                name != key or self.model.base_model is self.model
            ):
                samples[name] = sample_of(stored.shape, stored.rows)
            if owner not in layers or leaf not in ("weight", "bias"):
                self._put(stored)
                continue
            if stored.shape != self.expected[key]:
                raise self._misfit(key)
            if leaf == "bias":
                biases[owner] = stored.read().to(self.dtype)
                continue
            replace(self.model, owner, packed(weight_of(layers[owner], stored.read()), None))
        for owner, bias in biases.items():
            self.model.get_submodule(owner).bias = bias
        missing = [n for n, m in layers.items() if getattr(m, "bias", None) is not None and n not in biases]
        if missing or self._finish():
            return False
        if samples.keys() == trunk:  # then adapters can tell whether this is their base
            setattr(self.model, HASH, digest_of(samples))
        return True

    def _tidy(self, stored: Stored) -> None:
        """To be called before each tensor: what those before it took to read and round is freed, and tears the heap into pieces."""
        self._read += math.prod(stored.shape)
        if self._read >= TRIMMED_EVERY:
            heap.trim()
            self._read = 0

    def _key(self, name: str) -> str | None:
        """A stored tensor's name in the model: files of a bare trunk lack its prefix, or have one too many."""
        for key in (name, self.prefix + name, name.removeprefix(self.prefix)):
            if key in self.expected:
                return key
        return None

    def _module(self, name: str) -> str:
        modules = {n.rpartition(".")[0] for n in self.expected}
        return next((m for m in (name, self.prefix + name, name.removeprefix(self.prefix)) if m in modules), name)

    def _put(self, stored: Stored) -> bool:
        """Fills a parameter or buffer; whether the model has one of that name."""
        key = self._key(stored.name)
        if key is None:
            return stored.name.endswith(MADE)
        if stored.shape != self.expected[key]:
            raise self._misfit(f"{key} {list(stored.shape)}, expected {list(self.expected[key])}")
        if self.tables is not None and self.tables.take(key):
            self.tables.put(key, stored.shape, stored.rows, self.dtype)
            return True
        owner, _, leaf = key.rpartition(".")
        module = self.model.get_submodule(owner)
        tensor = stored.read()
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            module._buffers[leaf] = tensor
        return True

    def _finish(self) -> list[str]:
        """Ties what is tied and makes what is not stored; names of parameters that are still missing."""
        if self.tables is None or not self.tables.embedding:
            self.model.tie_weights()
        left = [n for n, p in self.model.named_parameters() if p.is_meta]
        if self.tables is not None:
            left += self.tables.missing()
        if not left:
            _materialise_buffers(self.model, self.model.config)
        return left

    def _misfit(self, what: str) -> ModelError:
        return ModelError(f"weights do not fit the configuration: {what}", file=self.folder)


def _materialise_buffers(model: Any, config: Any) -> None:
    """Buffers that are not stored (rotary frequencies, ...) are functions of the configuration: make them off the meta device."""
    whole: Any = None
    for place, module in model.named_modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            try:
                fresh = type(module)(config=config)
            except TypeError:  # it wants more than the configuration, which the model that it stands in knows
                whole = whole if whole is not None else _with_buffers_alone(model)
                fresh = whole.get_submodule(place)
            for name, value in fresh.named_buffers(recurse=False):
                setattr(module, name, value)


def _with_buffers_alone(model: Any) -> Any:
    """The model of another one's configuration with buffers of its own, and parameters that take no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return type(model)(model.config)
