"""What plain transformers makes of an exported folder: run as a script in a process of its own, without danlu.

Arguments and answer are those of `llama_side.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that the job asks for."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    kind = transformers.AutoModelForSequenceClassification if job["scalar"] else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(
        job["model"], dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    greedy = []
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        np.save(folder / f"logits-{number}.npy", logits.reshape(-1, logits.shape[-1]).numpy())
        if job["new"]:
            options = {"max_new_tokens": job["new"], "do_sample": False, "temperature": None, "top_p": None}
            whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            greedy.append(whole[0, len(prompt) :].tolist())
    found: dict[str, Any] = {
        "version": transformers.__version__,
        "greedy": greedy,
        "ids": [],
        "texts": [],
        "rendered": [],
    }
    if job["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
        found["ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
        found["texts"] = [tokenizer.decode(ids) for ids in found["ids"]]
        found["rendered"] = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in job["conversations"]
        ]
    return found


if __name__ == "__main__":
    target = Path(sys.argv[2])
    result = answer(json.loads(Path(sys.argv[1]).read_text("utf-8")), target.parent)
    target.write_text(json.dumps(result, ensure_ascii=False), "utf-8")
