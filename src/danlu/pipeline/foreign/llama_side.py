"""What llama.cpp makes of a GGUF file: run as a script by a Python that has llama-cpp-python, and nothing of danlu.

Arguments: a job (JSON) and where the answer goes. The job has the file, texts to cut, prompts of token ids to read and to go on
from, and conversations to render. The answer is JSON; logits lie beside it as arrays, `logits-N.npy` `[T, V]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that the job asks for."""
    import llama_cpp
    import numpy as np

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain_buffers() -> Any:
        # Weights repacked for AMX end some virtual machines' processes (illegal instruction), and round otherwise.
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain_buffers
    longest = max([len(p) for p in job["prompts"]], default=1) + job["new"] + 1
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=max(longest, 64),
        n_batch=max(longest, 64),
        n_threads=job["threads"],
        n_gpu_layers=0,
        logits_all=True,
        type_k=0,  # keys and values in 32 bits: the weights are compared, not the cache
        type_v=0,
        verbose=False,
    )
    cut = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    greedy = []
    for number, prompt in enumerate(job["prompts"]):
        model.reset()
        model.eval(prompt)
        np.save(folder / f"logits-{number}.npy", np.array(model.scores[: len(prompt)], dtype=np.float32))
        ids: list[int] = []
        while len(ids) < job["new"] and not (ids and ids[-1] in job["stop_ids"]):
            ids.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(ids[-1:])
        greedy.append(ids)
    template = model.metadata.get("tokenizer.chat_template", "")
    return {
        "version": llama_cpp.__version__,
        "ids": cut,
        "texts": [model.detokenize(ids, special=True).decode("utf-8", "replace") for ids in cut],
        "greedy": greedy,
        "rendered": [_render(model, template, messages) for messages in job["conversations"]] if template else [],
    }


def _render(model: Any, template: str, messages: list[dict[str, str]]) -> str:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def text(token: int) -> str:
        return str(model._model.token_get_text(token)) if token >= 0 else ""

    formatter = Jinja2ChatFormatter(template, text(model.token_eos()), text(model.token_bos()))
    return str(formatter(messages=messages).prompt)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    result = answer(json.loads(Path(sys.argv[1]).read_text("utf-8")), target.parent)
    target.write_text(json.dumps(result, ensure_ascii=False), "utf-8")
