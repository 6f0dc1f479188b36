"""G-EXPORT: an exported model is opened by the library that it is for, in another process, and must say what danlu says.

Compared are the tokens of lines in English, digits, Chinese, emoji and control tokens, the prompts that the chat template renders,
the logits at every position of some prompts, and the greedy continuation of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from danlu.exceptions import ModelError, TemplateError
from danlu.pipeline.gates import Gate
from danlu.text.chat_template import ChatTemplate
from danlu.text.word_pieces import core_of, nodes
from danlu.types import Message

CODE: Final = "G-EXPORT"
PYTHON: Final = "DANLU_LLAMA_CPP"
HOW: Final = (
    "not checked: llama-cpp-python is not installed. `make foreign` builds it once under ~/.cache/danlu/llama-cpp, or set "
    f"{PYTHON} to a Python that has it"
)
LIBRARIES: Final = {"llama_side.py": "llama.cpp by llama-cpp-python", "transformers_side.py": "transformers"}
NEW_TOKENS: Final = 24
SECONDS: Final = 1800
# Of the largest logit. llama.cpp rounds activations: to half precision for F16, to 8 bits for blocks of weights. F16 is compared
# with the model itself; the others with the weights that the file holds, since rounding them is what was asked for.
BOUNDS: Final = {"f16": 1e-3, "q8_0": 3e-2, "q4_0": 3e-2, "bf16": 1e-5, "f32": 1e-5}
LINES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces in front, and a tab\tin the middle ",
    "It's we're I'll they'd can't SHOUTED'S",
    "line one\nline two\n\n\nline five\r\n",
    "In 2024, 1,234.56 + 7 = 1241.56; call 0800-123-4567.",
    "3.14159265358979 1e-9 0x1F ½ ² ٣ ४",
    "def add(a, b):\n    return a + b  # adds\n\tx = {'k': [1, 2]}",
    "https://example.org/a_b-c?d=e&f=%20#g",
    "今天天气很好，我们去公园散步吧。",
    "请问：蜂蜜小屋几点开门？上午9点，周日12:30。",
    "「繁體」与简体混排，English words 夹在中间。",
    "价格￥1,299.00（约合 $180）——含税！",
    "日本語のテキスト、한국어 문장, Ελληνικά, Русский язык",
    "العربية والأرقام ١٢٣, हिन्दी, ไทย",
    "emoji 😀 👩‍👩‍👧‍👦 🇨🇳 ✈️ 🫠 end",
    "naïve café résumé Ångström e\u0301",
    "\u3000全角空格\u3000和\u00a0no-break",
    "!!! ??? ... ;;; :-) <<>> [[]] {{}} `code` *a* _b_ ~c~ ^d^ |e|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x",
    " ",
)
TALKS: Final[tuple[list[Message], ...]] = (
    [{"role": "user", "content": "Hello! What is 12 + 345?"}],
    [{"role": "user", "content": "你好，请介绍一下你自己。"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And another one, please?"},
    ],
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a check: the gate, and the numbers behind it."""

    gate: Gate
    numbers: dict[str, Any]


def llama_python() -> str | None:
    """A Python that has llama-cpp-python: $DANLU_LLAMA_CPP, this one, or that of `make foreign`; None: there is none.

    Raises:
        ModelError: the variable names no Python.
    """
    given = os.environ.get(PYTHON)
    if given:
        if not Path(given).is_file():
            raise ModelError(f"{PYTHON} names no Python", file=given, hint="set it to the path of a python program")
        return given
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu" / "llama-cpp"
    return str(cache / "bin" / "python") if (cache / "installed").is_file() else None


def not_checked(reason: str = HOW) -> Verdict:
    """The verdict where nothing could be opened: a warning, never a pass."""
    return Verdict(Gate(CODE, False, 0.0, 0.0, reason, warning=True), {"checked": False})


def check(
    target: Path,
    kind: str,
    model: Any,
    tokenizer: Any | None,
    *,
    python: str,
    scalar: bool = False,
    against: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    lossy_tokens: bool = False,
) -> Verdict:
    """Opens an export in another process and compares it with the model that it was made from.

    Args:
        target: a GGUF file or a folder.
        kind: its type, a key of BOUNDS.
        model: the exact model in float32; its weights are exchanged for those of `against`, if that is given.
        python: a Python with llama-cpp-python for a file; this one for a folder.
        scalar: the model gives one number instead of logits.
        against: the weights that the export holds.
        lossy_tokens: characters without a piece of their own are known to be read as unknown: lines with some are left out.
    """
    template = ChatTemplate(tokenizer) if tokenizer is not None and not scalar else None
    prompts = _prompts(model, tokenizer, template)
    lines = _lines(tokenizer, lossy_tokens, llama=target.is_file()) if tokenizer is not None else []
    stop_ids = template.stop_ids if template is not None else frozenset[int]()
    job = {
        "model": str(target),
        "texts": lines,
        "prompts": prompts,
        "new": 0 if scalar else min(NEW_TOKENS, _context(model) - max(map(len, prompts)) - 1),
        "stop_ids": sorted(stop_ids),
        "conversations": [list(t) for t in TALKS] if template is not None and _takes(template) else [],
        "threads": torch.get_num_threads(),
        "scalar": scalar,
    }
    side = "llama_side.py" if target.is_file() else "transformers_side.py"
    with tempfile.TemporaryDirectory(prefix="danlu-export-") as folder:
        theirs = _ask(side, job, python, Path(folder))
        logits = [np.load(Path(folder) / f"logits-{n}.npy") for n in range(len(prompts))]
    original = _logits(model, prompts)
    exact = original
    if against is not None:
        model.load_state_dict(against(), strict=False)
        exact = _logits(model, prompts)
    numbers: dict[str, Any] = {
        "checked": True,
        "library": f"{LIBRARIES[side]} {theirs['version']}",
        "logits": _difference(logits, exact),
        "logits_to_original": _difference(logits, original),
        "bound": BOUNDS[kind],
        **_text_numbers(theirs, lines, tokenizer, template, job),
    }
    if not scalar:
        ties = 4 * BOUNDS[kind]
        same = [
            _same_greedy(model, prompt, found, stop_ids, ties)
            for prompt, found in zip(prompts, theirs["greedy"], strict=True)
        ]
        numbers |= {"greedy_same": sum(same), "greedy": len(same)}
    return Verdict(_gate(numbers), numbers)


# -- what is asked ------------------------------------------------------------------------------------------------------------


def _lines(tokenizer: Any, lossy: bool, *, llama: bool) -> list[str]:
    """LINES, and some with the tokenizer's own control tokens, without those that llama.cpp is known to read otherwise."""
    special = [t for t in dict.fromkeys(tokenizer.all_special_tokens) if t]
    lines = [*LINES]
    if special:
        lines += [f"{special[0]}Hello{special[-1]}\nworld", " ".join(special) + " 你好", "".join(special)]
    if llama and any(step["type"] == "NFC" for step in nodes(core_of(tokenizer)["normalizer"])):
        # It composes characters first and llama.cpp does not, as the export's note says: such lines would only repeat that.
        lines = [line for line in lines if unicodedata.normalize("NFC", line) == line]
    if lossy:
        byte = {i for t, i in tokenizer.get_vocab().items() if t.startswith("<0x")} | {tokenizer.unk_token_id}
        lines = [line for line in lines if not byte & set(tokenizer(line, add_special_tokens=False)["input_ids"])]
    return lines


def _prompts(model: Any, tokenizer: Any | None, template: ChatTemplate | None) -> list[list[int]]:
    """Prompts of token ids that leave room to go on; without a tokenizer, ids that are spread over the vocabulary."""
    limit = max(_context(model) - NEW_TOKENS - 1, 1)
    size = int(model.config.vocab_size)
    if template is not None:
        found = [template.encode_prompt(talk) for talk in TALKS if _takes(template, talk)]
        found.append(tokenizer(LINES[0] + LINES[8], add_special_tokens=False)["input_ids"])  # type: ignore[misc]
    else:
        found = [[(7 + 31 * i) % size for i in range(24)], [(3 + 17 * i) % size for i in range(8)]]
    return [ids[:limit] for ids in found if ids]


def _takes(template: ChatTemplate, talk: Sequence[Message] | None = None) -> bool:
    """Whether a template renders these conversations (None: all) as they stand."""
    for messages in [talk] if talk is not None else TALKS:
        try:
            text = template.render(messages, add_generation_prompt=True)
        except TemplateError:
            return False
        if not all(m["content"] in text for m in messages):
            return False
    return True


def _context(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 12)


def _ask(side: str, job: Mapping[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """Runs a script of `foreign/` in another process, which must not see danlu.

    Raises:
        ModelError: it ends without an answer: the library cannot open the export.
    """
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1"}
    script = Path(__file__).parent / "foreign" / side
    done = subprocess.run(
        [python, str(script), str(folder / "job.json"), str(folder / "answer.json")],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{CODE}: the export cannot be opened: {last}", file=str(job["model"]), hint=f"by {python}")
    found: dict[str, Any] = json.loads((folder / "answer.json").read_text("utf-8"))
    return found


# -- what is compared ---------------------------------------------------------------------------------------------------------


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([list(p)])).logits[0].float() for p in prompts]
    return [f.reshape(-1, f.shape[-1]).numpy() for f in found]


def _difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference of two lists of logits, as a share of the largest one; infinite where shapes differ."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return float("inf")
    worst = max(float(np.abs(f - e).max()) for f, e in zip(found, expected, strict=True))
    return worst / max(float(np.abs(e).max()) for e in expected)


def _same_greedy(
    model: Any, prompt: Sequence[int], found: Sequence[int], stop_ids: frozenset[int], ties: float
) -> bool:
    """Whether each token is the one that the model finds most likely, or as likely as that within `ties` of the largest logit.

    One pass over the prompt with the continuation tells what the model would have said at every step.
    """
    if not found:
        return False
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[*prompt, *found]])).logits[0].float()
    steps_TV = logits_TV[len(prompt) - 1 : -1]
    best = steps_TV.amax(-1)
    chosen = steps_TV.gather(-1, torch.tensor(list(found))[:, None])[:, 0]
    stopped = found[-1] in stop_ids or not any(i in stop_ids for i in found)
    return stopped and bool((best - chosen <= ties * steps_TV.abs().max()).all())


def _text_numbers(
    theirs: Mapping[str, Any],
    lines: Sequence[str],
    tokenizer: Any | None,
    template: ChatTemplate | None,
    job: Mapping[str, Any],
) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ours = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    wrong = [line for line, a, b in zip(lines, ours, theirs["ids"], strict=True) if a != b]
    found: dict[str, Any] = {"lines": len(lines), "lines_same": len(lines) - len(wrong), "lines_different": wrong[:5]}
    if template is not None and job["conversations"]:
        rendered = [template.render(talk, add_generation_prompt=True) for talk in job["conversations"]]
        same = [a == b for a, b in zip(rendered, theirs["rendered"], strict=False)]
        found |= {"prompts": len(rendered), "prompts_same": sum(same)}
    return found


def _gate(numbers: Mapping[str, Any]) -> Gate:
    faults = []
    if numbers.get("lines", 0) != numbers.get("lines_same", 0):
        examples = ", ".join(repr(line) for line in numbers["lines_different"][:2])
        faults.append(
            f"{numbers['lines'] - numbers['lines_same']} of {numbers['lines']} lines get other tokens ({examples})"
        )
    if numbers.get("prompts", 0) != numbers.get("prompts_same", 0):
        faults.append(
            f"{numbers['prompts'] - numbers['prompts_same']} of {numbers['prompts']} chats are rendered otherwise"
        )
    if numbers.get("greedy", 0) != numbers.get("greedy_same", 0):
        faults.append(
            f"{numbers['greedy'] - numbers['greedy_same']} of {numbers['greedy']} prompts are continued otherwise"
        )
    value, bound = float(numbers["logits"]), float(numbers["bound"])
    sentence = f"{numbers['library']} gives the same logits within {value:.1e} of the largest"
    if not value <= bound:
        faults.insert(0, "the logits differ by more than the bound")
    if "lines" in numbers and not faults:
        sentence += f", the same tokens for {numbers['lines']} lines and the same greedy text"
    return Gate(CODE, not faults, value, bound, "; ".join([sentence, *faults]))
