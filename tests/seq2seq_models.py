"""Tiny encoder-decoders and a tokenizer for them, written by the tests themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from danlu.models.load import save_model

T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
BART |= {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "t5_v1_1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Bart", BART),
}
VOCAB = 264


def tokenizer(*, bos: bool = False) -> Any:
    """Bytes; a text ends with `</s>`, and with `bos` begins with `<s>`."""
    core = Tokenizer(
        models.BPE(vocab={c: i + 4 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ids = {"<pad>": 0, "</s>": 1, "<s>": 2, "<unk>": 3}
    vocab = ids | core.get_vocab()
    core.model = models.BPE(vocab=vocab, merges=[])
    core.add_special_tokens(list(ids))
    single = "<s> $A </s>" if bos else "$A </s>"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make(kind: str, *, seed: int = 0, scale: float = 0.2) -> Any:
    import transformers

    prefix, shape = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**shape, vocab_size=VOCAB)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


def folder(path: Path, kind: str, **options: Any) -> Path:
    return save_model(make(kind, **options), tokenizer(bos=kind == "bart"), path)
