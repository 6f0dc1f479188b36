"""GLM's Chinese tokenizer: a SentencePiece model of 50,000 pieces, and tokens of blank infilling at fixed places behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from danlu.text.own_tokenizers import GLM_FILE

# In this order behind the last piece; nobody knows a name for the sixth place.
TOKENS: Final = (
    "<|endoftext|>",
    "[SEP]",
    "[CLS]",
    "[MASK]",
    "[UNK]",
    "[UNUSED]",
    "<|startofpiece|>",
    "<|endofpiece|>",
    "[sMASK]",
    "[gMASK]",
    "[dBLOCK]",
)


def open_glm(folder: Path) -> Any:
    """A fast transformers tokenizer of a folder with `cog-pretrain.model`; texts become `[CLS] text <|endoftext|>`.

    Raises:
        DataError: the file is no SentencePiece model.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    from danlu.text.sentencepiece import core_of, read_model

    model = read_model(folder / GLM_FILE)
    core, base = core_of(model), len(model.pieces)
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in TOKENS])
    places = {text: core.token_to_id(text) for text in TOKENS}
    assert places == {text: base + i for i, text in enumerate(TOKENS)}, "pieces have no names of special tokens"
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A <|endoftext|>",
        special_tokens=[("[CLS]", places["[CLS]"]), ("<|endoftext|>", places["<|endoftext|>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
