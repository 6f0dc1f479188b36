"""The chat templates that danlu ships, for models that carry none: one entry each, and one Jinja file in `templates/`.

A file renders the published format. Three things depend on the tokenizer and are set in front of the file when a template is
taken for one (`source_for`), so that the source saved with a model needs nothing else: whether texts begin with the beginning-of-
sequence token, whether marks that only some tokenizers have are written, and what stops an answer where the format's own
stop is not a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

from danlu.exceptions import TemplateError


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """One shipped format.

    Attributes:
        name: what users write; `templates/<name>.jinja` is its file.
        about: whose format it is and what is special, for the documents.
        source: where it is published.
        stop: the token that ends an answer; "" means the tokenizer's end-of-sequence token. Where the tokenizer does not know
            this token, its end-of-sequence token takes the place.
        tokens: other control tokens that the format writes. Unknown to the tokenizer, they are plain text.
        marks: variables of the file and their text, written only if the tokenizer knows all the tokens they are made of.
        bos: "tokenizer": texts begin with the beginning-of-sequence token if the tokenizer by itself puts it there;
            "own": the file writes it; "never".
        signature: a tokenizer that has all of these tokens and no template of its own belongs to this format.
        tools: what the format has of its own for tools; the rest is told as text (`text/tool_text.py`).
    """

    name: str
    about: str
    source: str
    stop: str = ""
    tokens: tuple[str, ...] = ()
    marks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    bos: Literal["tokenizer", "own", "never"] = "tokenizer"
    signature: tuple[str, ...] = ()
    tools: str = "as text"

    @property
    def jinja(self) -> str:
        """The source of the file."""
        return resources.files("danlu.text").joinpath(f"templates/{self.name}.jinja").read_text("utf-8")

    @property
    def control_tokens(self) -> list[str]:
        """All tokens that the format may write: its marks, those of turns, and what ends an answer, if it has one of its own."""
        marks = [token for _, tokens in self.marks for token in tokens]
        return list(dict.fromkeys(t for t in (*marks, *self.tokens, self.stop) if t))

    def source_for(self, tokenizer: Any) -> str:
        """The Jinja source for this tokenizer: the file, with what depends on the tokenizer set in front."""
        known = tokenizer.get_vocab()
        head = ""
        if self.bos == "tokenizer" and _begins_with_bos(tokenizer):
            head += "{{- bos_token -}}\n"
        if self.stop and self.stop not in known:
            head += "{%- set stop = eos_token -%}\n"
        for variable, tokens in self.marks:
            if all(token in known for token in tokens):
                head += f"{{%- set {variable} = '{''.join(tokens)}' -%}}\n"
        return head + self.jinja

    def unknown_tokens(self, tokenizer: Any) -> list[str]:
        """Control tokens of the format that this tokenizer would write as plain text."""
        known = tokenizer.get_vocab()
        return [token for token in self.tokens if token not in known]


_ALL: Final = (
    NamedTemplate(
        "chatml",
        "OpenAI's chat markup, as many models use it. danlu's own tokenizers have its tokens.",
        "https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md",
        stop="<|im_end|>",
        tokens=("<|im_start|>",),
        signature=("<|im_start|>", "<|im_end|>"),
        tools="results have a turn of their own; the rest as text",
    ),
    NamedTemplate(
        "plain",
        "`Human:` and `Assistant:` in plain text: what is taken when a tokenizer knows no format's tokens.",
        "danlu's own",
        tools="results have a turn of their own; the rest as text",
    ),
    NamedTemplate(
        "hh",
        "Anthropic's HH-RLHF dialogues: every turn begins with two line breaks.",
        "https://github.com/anthropics/hh-rlhf",
    ),
    NamedTemplate(
        "alpaca",
        "Stanford Alpaca without an input field. A system text takes the place of the first sentence.",
        "https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py",
    ),
    NamedTemplate(
        "vicuna",
        "Vicuna 1.1 and later. A system text takes the place of the first sentences.",
        "https://github.com/lm-sys/FastChat/blob/main/fastchat/conversation.py",
    ),
    NamedTemplate(
        "llama2",
        "Llama 2 Chat: the system text stands in the first question; contents are stripped.",
        "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf",
        bos="own",
    ),
    NamedTemplate(
        "llama3",
        "Llama 3 Instruct; contents are stripped.",
        "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct",
        stop="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>"),
        bos="own",
        signature=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    NamedTemplate(
        "chatglm",
        "ChatGLM-6B: a first question stands alone; with a history, rounds are counted from 0.",
        "https://huggingface.co/THUDM/chatglm-6b",
        marks=(("speak", ("[gMASK]", "<sop>")),),
        bos="never",
        signature=("[gMASK]", "<sop>", "<eop>"),
    ),
    NamedTemplate(
        "chatglm2",
        "ChatGLM2-6B: rounds are counted from 1.",
        "https://huggingface.co/THUDM/chatglm2-6b",
        marks=(("start", ("[gMASK]", "sop")),),
        bos="never",
        signature=("[gMASK]", "sop", "eop"),
    ),
    NamedTemplate(
        "chatglm3",
        "ChatGLM3-6B: a token for each role; the next role's token stops an answer.",
        "https://huggingface.co/THUDM/chatglm3-6b",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        marks=(("start", ("[gMASK]", "sop")),),
        bos="never",
        signature=("[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|observation|>"),
        tools="tools, calls and results",
    ),
    NamedTemplate(
        "moss",
        "MOSS-003. The system text is the meta instruction; if it says `Inner thoughts: enabled`, or tools are given, turns "
        "have thoughts and commands.",
        "https://github.com/OpenMOSS/MOSS",
        stop="<eom>",
        tokens=("<eoh>", "<eot>", "<eoc>", "<eor>"),
        bos="never",
        signature=("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"),
        tools="thoughts, tools, calls (commands) and results",
    ),
    NamedTemplate(
        "belle",
        "BELLE's BLOOM and LLaMA models.",
        "https://github.com/LianjiaTech/BELLE/blob/main/train/src/sample_generator.py",
        bos="never",
    ),
    NamedTemplate(
        "dolly",
        "Dolly v1 and v2. A system text takes the place of the first sentence.",
        "https://github.com/databrickslabs/dolly/blob/master/training/consts.py",
        stop="### End",
    ),
    NamedTemplate(
        "huatuo",
        "HuaTuo (BenTsao), medical questions. A system text takes the place of the first sentence.",
        "https://github.com/SCIR-HI/Huatuo-Llama-Med-Chinese/blob/main/templates/med_template.json",
    ),
    NamedTemplate(
        "chatdoctor",
        "ChatDoctor: a patient asks, the doctor greets first. A system text takes the place of the first sentence.",
        "https://github.com/Kent0n-Li/ChatDoctor/blob/main/chat.py",
    ),
    NamedTemplate(
        "baichuan",
        "Baichuan-13B-Chat.",
        "https://huggingface.co/baichuan-inc/Baichuan-13B-Chat",
        tokens=("<reserved_102>", "<reserved_103>"),
        bos="never",
    ),
    NamedTemplate(
        "baichuan2",
        "Baichuan2-Chat.",
        "https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat",
        tokens=("<reserved_106>", "<reserved_107>"),
        bos="never",
    ),
    NamedTemplate(
        "qwen",
        "Qwen2.5-Instruct: chatml with a system text of its own if none is given.",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
        stop="<|im_end|>",
        tokens=("<|im_start|>",),
        bos="never",
        tools="tools, calls and results",
    ),
    NamedTemplate(
        "deepseek",
        "DeepSeek LLM and DeepSeek-V2 Chat.",
        "https://huggingface.co/deepseek-ai/deepseek-llm-7b-chat",
        bos="own",
    ),
    NamedTemplate(
        "deepseek3",
        "DeepSeek-V2.5 and V3.",
        "https://huggingface.co/deepseek-ai/DeepSeek-V3",
        tokens=("<｜User｜>", "<｜Assistant｜>"),
        bos="own",
    ),
    NamedTemplate(
        "text2text",
        "What encoder-decoders (T5, mT5, BART, CPM-2) read: the turns as plain lines; one question is just its text.",
        "https://arxiv.org/abs/1910.10683",
        bos="never",
        tools="results have a turn of their own; the rest as text",
    ),
)
TEMPLATES: Final = {template.name: template for template in _ALL}


def named_template(name: str) -> NamedTemplate:
    """The entry of a shipped template.

    Raises:
        TemplateError: no such name.
    """
    if name not in TEMPLATES:
        raise TemplateError(f"no template is named '{name}'", hint=f"names: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def shipped_template(name: str) -> str:
    """The Jinja source of a template that danlu ships, as its file has it.

    Raises:
        TemplateError: no such name.
    """
    return named_template(name).jinja


def fitting_template(tokenizer: Any) -> str:
    """The name of the format whose tokens this tokenizer has (the one with the most), or `plain`."""
    known = tokenizer.get_vocab()
    fitting = [t for t in _ALL if t.signature and all(token in known for token in t.signature)]
    return max(fitting, key=lambda t: len(t.signature)).name if fitting else "plain"


def _begins_with_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
