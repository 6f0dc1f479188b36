"""What the tests share: one thread, tiny random models, one meaning of "equal", and where real data lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import first_rows
from torch import Tensor

# Two torch processes with two threads each on two cores slow one another down a hundredfold (pytest-xdist starts two).
torch.set_num_threads(1)

VOCAB, CONTEXT = 61, 64
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "attention_dropout": 0.0},
    ),
    "qwen3": (
        "Qwen3",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "attention_dropout": 0.0},
    ),
    "mistral": (
        "Mistral",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "sliding_window": 8},
    ),
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT, "window_size": 5}
        | {"attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0},
    ),
    "codegen": (
        "CodeGen",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}


def make_tiny(family: str, *, seed: int = 0, scalar: bool = False, **options: Any) -> Any:
    """A model of a family with two small layers, eager attention, in evaluation mode.

    Its weights are large enough that a wrong mask or a wrong position shows: with transformers' 0.02 they would not.
    """
    import transformers

    name, shape = FAMILIES[family]
    kind = f"{name}LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    kind = f"{name}ForSequenceClassification" if scalar else kind
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = shape | {"vocab_size": VOCAB} | ids | ({"num_labels": 1} if scalar else {}) | options
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal shapes, finite, and no entry further apart than `tolerance` of the largest expected one."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * size, f"off by {error:.3g}, the largest entry is {size:.3g}"


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(family, seed=0, scalar=False, **config)`: see `make_tiny`."""
    return make_tiny


@pytest.fixture(scope="session")
def near() -> Callable[..., None]:
    """`near(found, expected, tolerance=1e-5)`: see `assert_near`."""
    return assert_near


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and tokenizers: $DANLU_SHARED/data, by default `shared/data` beside the repository."""
    folder = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"REAL DATA NOT TESTED: {folder} is missing; set DANLU_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def published_data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of the published files that recipes read; a `data_root`."""
    return first_rows(shared_data, tmp_path_factory.mktemp("published"))
