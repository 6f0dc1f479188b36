"""One plain model of a base and its adapters: added by weight, by TIES or by DARE; and the check that the model is what they were.

All methods work on task vectors, what an adapter changes in each weight: `linear` adds `w_i d_i`; TIES (Yadav et al. 2023) keeps
the largest entries of each, elects a sign for every entry and averages those that agree; DARE (Yu et al. 2024) drops entries at
random and scales the rest up, then adds.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.adapter_files import AdapterInfo, load_base, merge_into, put_on, read_info, settle
from danlu.models.adapters import quantize_base
from danlu.models.export import shard_size
from danlu.models.load import load_model, save_model
from danlu.models.patches import active_names, add_factors, read_factors, read_index, refuse_other_base
from danlu.models.places import adapter_place, is_adapter, tokenizer_place
from danlu.models.quantize import is_quantized
from danlu.text.tokenizer import load_tokenizer

Method = Literal["linear", "ties", "dare"]
TOLERANCE = 1e-4
ROWS, LENGTH = 4, 32  # of the texts that both are compared on


def merge_adapters(
    folders: Sequence[str | Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    density: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    taught: Callable[[str], Path] | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Merges adapters into their base and writes a plain model folder; nothing is written where the check fails (G-MERGE).

    Args:
        weights: one for each adapter; default: equal shares.
        density: share of the entries that TIES and DARE keep.
        seed: of what DARE drops.
        dtype: of what is written; default: the dtype that the base is stored in.
        taught: where the patches of a base's facts are, if anywhere; they come into the weights, too, once the check has passed.
        max_shard_size: of a weight file, as `2GB`.

    Returns:
        `{"out", "base", "adapters", "weights", "method", "patches", "logit_difference", "logit_scale", "rounding_difference",
        "dtype"}`.

    Raises:
        ModelError: not adapters of one base; a prefix; a wrong number of weights; a folder that exists; too little room; or the
            merged model's logits are not the adapter's.
        SettingsError: `max_shard_size` is no size.
        KnowledgeError: the base's patches are damaged or belong to another model.
    """
    shard = shard_size(max_shard_size)
    infos = [_adapter(folder) for folder in folders]
    shares = list(weights) if weights else [1.0 / len(infos)] * len(infos)
    if len(shares) != len(infos):
        raise ModelError(f"{len(shares)} weights for {len(infos)} adapters", hint="--weights 0.7,0.3: one for each")
    if not 0 < density <= 1:
        raise ModelError(f"density {density} is not a share", hint="above 0, at most 1")
    _refuse_strangers(infos)
    if out.exists():
        raise ModelError("this folder exists already", file=out, hint="give another with --into, or delete it")
    first = infos[0]
    if len(infos) == 1 and shares == [1.0] and method == "linear":
        model = put_on(_base(first), first)
        expected = probe(model)
        model = merge_into(model)
    else:
        model = merge_into(_packed(_base(first), first))
        base = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
        changes = [_change(info, base) for info in infos]
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                parts = [c.get(name) for c in changes]
                if any(p is not None for p in parts):
                    given = [p if p is not None else torch.zeros_like(base[name]) for p in parts]
                    code = zlib.crc32(name.encode())
                    parameter.copy_(base[name] + combined(given, shares, method, density, seed + code))
        expected = probe(model)
    for info in infos[::-1]:
        settle(model, info)
    report = {
        "out": str(out),
        "base": first.base,
        "adapters": [str(i.folder) for i in infos],
        "weights": shares,
        "method": method,
    }
    folder = taught(first.base) if taught is not None and not is_adapter(first.base) else None
    return report | _write_checked(model, first, out, expected, dtype or _stored_dtype(first.base), folder, shard)


def _adapter(folder: str | Path) -> AdapterInfo:
    folder = adapter_place(str(folder))
    if not is_adapter(folder):
        raise ModelError("this is not an adapter folder (no adapter_config.json)", file=folder, hint="give out/adapter")
    info = read_info(folder)
    if not info.mergeable:
        raise ModelError(
            f"an adapter of kind {info.kind} cannot be merged into weights",
            file=folder,
            hint="keep it as an adapter folder",
        )
    if not info.base:
        raise ModelError("this adapter does not name its base", file=folder, hint="add base_model_name_or_path")
    return info


def _refuse_strangers(infos: Sequence[AdapterInfo]) -> None:
    first = infos[0]
    for other in infos[1:]:
        hashes = {first.base_hash, other.base_hash} - {""}
        same = len(hashes) == 1 if first.base_hash and other.base_hash else first.base == other.base
        if not same or any(getattr(first, n) != getattr(other, n) for n in ("base_bits", "base_format", "scalar")):
            raise ModelError(
                f"these adapters are not of one base: {first.folder} is of {first.base} ({first.base_bits} bits), {other.folder} "
                f"of {other.base} ({other.base_bits} bits)",
                hint="merge adapters that were trained on the same model",
            )


def _base(info: AdapterInfo) -> Any:
    return load_base(info, scalar=info.scalar)


def _packed(model: Any, info: AdapterInfo) -> Any:
    return quantize_base(model, info.base_bits, info.base_format) if info.base_bits != 16 else model


def _change(info: AdapterInfo, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter changes, by parameter; only where it changes anything."""
    merged = merge_into(put_on(_base(info), info))
    found = {n: p.detach() - base[n] for n, p in merged.named_parameters(remove_duplicate=False)}
    return {name: change for name, change in found.items() if bool(change.any())}


def combined(
    changes: Sequence[Tensor], weights: Sequence[float], method: Method, density: float = 0.5, seed: int = 0
) -> Tensor:
    """One change of several to the same weight.

    Args:
        changes: all of one shape; weights: one for each.
        density: in (0, 1], for ties and dare.
    """
    given = torch.stack([c.float() for c in changes])
    share = torch.tensor(weights).view(-1, *[1] * (given.dim() - 1))
    if method == "dare":
        draw = torch.Generator().manual_seed(seed)
        kept = torch.rand(given.shape, generator=draw) < density
        return (share * given * kept / density).sum(0)
    if method == "linear":
        return (share * given).sum(0)
    count = max(1, round(density * given[0].numel()))
    flat = given.abs().flatten(1)
    limit = flat.kthvalue(flat.shape[1] - count + 1, dim=1).values.view_as(share)
    trimmed = torch.where(given.abs() >= limit, given, torch.zeros(()))
    sign = torch.sign((share * trimmed).sum(0))
    agrees = (torch.sign(trimmed) == sign) & (trimmed != 0)
    total = (share * agrees).sum(0)
    return torch.where(total != 0, (share * trimmed * agrees).sum(0) / torch.where(total != 0, total, 1.0), 0.0)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """fp32 logits of a model (of its score, if it has one) on a few texts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    context = getattr(model.config, "max_position_embeddings", None) or LENGTH
    ids = torch.randint(int(model.config.vocab_size), (ROWS, min(LENGTH, context)), generator=draw)
    mask = torch.ones_like(ids)
    found: Tensor = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found.float()


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest distance between logits, and the size of the largest expected one."""
    return float((found - expected).abs().max()), float(expected.abs().max())


def _write_checked(
    model: Any,
    info: AdapterInfo,
    out: Path,
    expected: Tensor,
    dtype: torch.dtype,
    taught: Path | None,
    max_shard_size: int,
) -> dict[str, Any]:
    """Writes a folder, reads it back and compares before it gets its name."""
    off, size = difference(probe(model), expected)
    if not off <= TOLERANCE * max(1.0, size):
        raise ModelError(
            f"G-MERGE: logits of the merged model are off by {off:.2e} (limit {TOLERANCE:g} of {max(1.0, size):.3g})",
            hint="nothing was written; please report the family and the kind of adapter",
        )
    patches = _add_taught(model, info, taught)
    if patches:
        expected = probe(model)
    needed = sum(p.numel() for p in model.parameters()) * torch.empty((), dtype=dtype).element_size()
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ModelError(
            f"the merged model takes {needed / 2**20:,.0f} MB and the disk has {free / 2**20:,.0f} MB free", file=out
        )
    place = tokenizer_place(str(info.folder))
    checked = out.with_name(f"{out.name}.checking")
    try:
        tokenizer = load_tokenizer(place, local=Path(place).is_dir())
        save_model(model.to(dtype), tokenizer, checked, max_shard_size=max_shard_size)
        again = load_model(checked, scalar=info.scalar)
        rounded, _ = difference(probe(again), expected)
        if dtype == torch.float32 and not rounded <= TOLERANCE * max(1.0, size):
            raise ModelError(f"G-MERGE: what was written differs from the adapter by {rounded:.2e}", file=out)
        checked.rename(out)
    finally:
        shutil.rmtree(checked, ignore_errors=True)
    name = str(dtype).removeprefix("torch.")
    return {
        "patches": patches,
        "logit_difference": off,
        "logit_scale": size,
        "rounding_difference": rounded,
        "dtype": name,
    }


def _add_taught(model: Any, info: AdapterInfo, folder: Path | None) -> list[str]:
    """Adds the facts that the base was taught to the merged weights; returns the patches' names.

    An adapter's change and a fact's are sums on the same weights, so their order does not matter.
    """
    index = read_index(folder) if folder is not None else None
    names = active_names(index)
    if folder is None or index is None or not names:
        return []
    refuse_other_base(index, _base(info), info.base, folder)
    for name in names:
        add_factors(model, read_factors(folder / name))
    return names


def _stored_dtype(base: str) -> torch.dtype:
    from danlu.models.embeddings import stored_dtype

    while is_adapter(base):
        base = read_info(base).base
    if Path(base).is_dir() and is_quantized(base):
        return torch.bfloat16  # what stands beside packed weights
    return stored_dtype(base)
