"""One command for a machine with a CUDA card: `python -m benchmarks gpu`. It installs and downloads nothing.

Parts: `correct` (the CUDA paths against the padded ones, the engine against the trainer), `train` (SFT, reward model and PPO of
1B- and 7B-shaped random models, all weights and LoRA: tokens per second, share of the card's rate, peak memory beside what
`danlu plan` said), `decode` (tokens per second beside what the memory's bandwidth allows), `packed` (the same at 8 and 4 bits, and
QLoRA) and `families` (`gpu_families.py`: memory and speed of ChatGLM's and MOSS's shapes). `--tiny` runs all of it on tiny
models, on any machine, as a test of itself.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import gpu_families, tables
from benchmarks.card import Place, allocated_gb, bandwidth, card_rate, free, fresh_peak, matrix_rate, peak_gb, wait
from benchmarks.pace import paced
from danlu.config import KINDS
from danlu.exceptions import DanluError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.load import load_model, save_model
from danlu.models.quantize import quantize_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput
from danlu.parsing import parse
from danlu.pipeline.footprint import inference_memory, shape_of_folder
from danlu.pipeline.plan import estimate, memory_here
from danlu.pipeline.recipe import load_recipe
from danlu.synth.town.write import write_town
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer, train_tokenizer
from danlu.training.compute import Compute
from danlu.training.logprobs import logprobs
from danlu.training.peak import peak_memory_mb, reset_peak_memory
from danlu.tree import TreeBatch, branches, conversation, forest

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
}
STEPS, WARM = 6, 2
ROWS = 512


class _Enough(Exception):
    """All steps that are measured are done; what would follow is saving."""


def measure(*, tiny: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measures, prints the table, and returns `{"machine", "card", "flops", "rows"}`.

    Args:
        tiny: tiny models; on a machine without a card this is all that can be run.
        only: of "correct", "train", "decode", "packed", "families", and of sizes; none: all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        sys.exit("there is no CUDA card here; --tiny runs the same code on tiny models")
    card = torch.cuda.get_device_name() if device == "cuda" else "no card"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as name:
        rate = matrix_rate(device, 512 if tiny else 8192)
        place = Place(device, Path(name), tiny, rate)
        parts: dict[str, Callable[[Place, str], Iterator[dict[str, Any]]]] = {
            "correct": _correct,
            "train": _train,
            "decode": _decode,
            "packed": _packed,
        }
        _write_data(place)
        for size in place.sizes:
            if only and set(only) & set(SHAPES) and size not in only:
                continue
            for part, function in parts.items():
                if not only or part in only or not set(only) & {*parts, "families"}:
                    for row in function(place, size):
                        rows.append({"part": part, "size": size, **row})
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if not only or "families" in only:
            for row in gpu_families.rows(place):
                rows.append({"part": "families", **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(f"{card}, {tables.machine()}, bare bf16 products {rate / 1e12:.2f} TFLOP/s\n\n{_markdown(rows)}")
    return {"machine": tables.machine(), "card": card, "flops": rate, "rows": rows}


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| part | size | what | value | unit | against | value there | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = f"{r['share']:.3g}" if r.get("share") is not None else ""
        there = f"{r['limit']:.4g}" if r.get("limit") is not None else ""
        value = r["value"] if isinstance(r["value"], str) else f"{r['value']:.4g}"
        lines.append(
            f"| {r['part']} | {r['size']} | {r['what']} | {value} | {r['unit']} | {r['against']} | {there} | {share} |"
        )
    return "\n".join(lines)


# -- models and rows ---------------------------------------------------------------------------------------------------


def _write_data(place: Place) -> None:
    """A tokenizer and rows of the invented town; conversations and comparisons of 40 to 900 words."""
    folder = place.folder
    town = write_town(folder / "town", 0, scale=0.1)
    text = [json.loads(line)["text"] for line in town["pretrain"].read_text("utf-8").splitlines()]
    tokenizer = train_tokenizer(text, 2048, context=4096)
    ChatTemplate(tokenizer, "chatml").tokenizer.save_pretrained(folder / "tokenizer")
    words = " ".join(text).split()
    draw = random.Random(0)
    longest = 60 if place.tiny else 900

    def say(role: str, count: int) -> list[dict[str, str]]:
        start = draw.randrange(len(words) - count)
        return [{"role": role, "content": " ".join(words[start : start + count])}]

    def length() -> int:
        return (
            min(longest, max(8, round(draw.lognormvariate(5.0, 0.8)))) if not place.tiny else draw.randint(8, longest)
        )

    rows = 32 if place.tiny else ROWS
    kinds: dict[str, list[dict[str, Any]]] = {
        "sft": [{"messages": say("user", length() // 2) + say("assistant", length())} for _ in range(rows)],
        "reward": [
            {"prompt": say("user", length()), "chosen": say("assistant", length() // 2)}
            | {"rejected": say("assistant", length() // 2 + 1)}
            for _ in range(rows)
        ],
        "ppo": [{"prompt": say("user", min(200, length()))} for _ in range(rows)],
    }
    for kind, found in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found), "utf-8")


def _model_folder(place: Place, size: str, *, scalar: bool = False) -> Path:
    """A random Llama of a shape, made on the device and saved in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder = place.folder / size / ("reward" if scalar else "lm")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(place.folder / "tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vocabulary = len(tokenizer) if place.tiny else 32_000
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, num_labels=1, **SHAPES[size], **ids)
    torch.manual_seed(0)
    with torch.device(place.device):
        model = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config)
    return save_model(model.to(torch.bfloat16), tokenizer, folder)


# -- correct -----------------------------------------------------------------------------------------------------------


def _correct(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """Trees against the padded layout (log-probabilities, gradients), and the engine's log-probabilities against the trainer's."""
    if size == "7B":
        return  # the paths are those of the 1B shape, and two copies in fp32 would not fit on most cards
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 5e-2)):
        model = load_model(_model_folder(place, size)).to(place.device)
        root = RootModel(SeparateModels({"policy": model}, ["policy"]))
        compute = Compute(place.device, dtype, torch.get_num_threads())  # type: ignore[arg-type]
        tree = _tree(model.config.vocab_size).to(place.device)
        fast, fast_gradient = _read(root, tree, compute)
        assert model.base_model.danlu_fast_path, "Llama's attention takes a plan"
        model.base_model.danlu_fast_path = False
        model.set_attn_implementation("sdpa")
        slow, slow_gradient = _read(root, tree, compute)
        gaps = {
            "tree, log-probabilities": float((fast - slow).abs().max()),
            "tree, gradients": float((fast_gradient - slow_gradient).norm() / slow_gradient.norm()),
        }
        del root
        model.zero_grad(set_to_none=True)
        gaps["engine, log-probabilities"] = _engine_gap(place, model, dtype)
        for what, gap in gaps.items():
            share = gap / bound
            row = {"what": f"{what}, {dtype}", "value": gap, "unit": "difference"}
            yield {**row, "against": "bound", "limit": bound, "share": share}
        del model
        free()


def _tree(vocabulary: int) -> TreeBatch:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, vocabulary, (count,), generator=draw).tolist()

    pairs = [branches(ids(n), [ids(n // 2 + 3), ids(n // 3 + 5)]) for n in (3, 40, 170)]
    alone = [conversation(row, [1.0] * len(row)) for row in (ids(9), ids(130))]
    return TreeBatch.of(forest([*pairs, *alone]))


def _read(root: RootModel, tree: TreeBatch, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens that carry loss, and the gradient of their mean in the first layer."""
    root.zero_grad(set_to_none=True)
    with compute.autocast():
        found, _ = root(tree, "policy", lambda out: logprobs(out, out.tree.loss_index()))
    (-found.mean()).backward()
    weight = next(p for n, p in root.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
    assert weight.grad is not None, "the first layer took part"
    return found.detach().float(), weight.grad.detach().float().clone()


def _engine_gap(place: Place, model: Any, dtype: str) -> float:
    """The greatest difference between the log-probabilities the engine sampled with and those of one full reading."""
    engine = LocalEngine(model.to(getattr(torch, dtype)))
    vocabulary = model.config.vocab_size
    prompts = [list(range(4, 4 + n)) for n in (5, 17, 60)]
    asked = [Request(p, SamplingParams(max_new_tokens=24, seed=i)) for i, p in enumerate(prompts)]
    done = generate(engine, asked)
    assert all(i < vocabulary for c in done for i in c.ids), "sampled ids are in the vocabulary"
    trees = [branches(p, [c.ids]) for p, c in zip(prompts, done, strict=True)]
    tree = TreeBatch.of(forest(trees)).to(place.device)
    root = RootModel(SeparateModels({"policy": engine.model}, []))

    def head(out: TrunkOutput) -> torch.Tensor:
        return logprobs(out, out.tree.action_index())[0]

    with torch.no_grad():
        read = root(tree, "policy", head).float().cpu()
    return float((read - torch.tensor([p for c in done for p in c.logprobs])).abs().max())


# -- train -------------------------------------------------------------------------------------------------------------


def _train(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """Each stage with all weights and with LoRA; what does not fit says so in its row."""
    for kind in ("sft", "reward", "ppo"):
        for adapter in ("full", "lora", "qlora", "ptuning") if kind == "sft" else ("full", "lora"):
            what = f"{kind}, {adapter}"
            settings = _settings(place, size, kind, adapter)
            planned = _planned(place, kind, settings)
            if planned > memory_here():
                row = {"what": what, "value": "does not fit", "unit": "", "against": "danlu plan, MB"}
                yield {**row, "limit": planned}
                continue
            try:
                rates, peak = _run(place, kind, settings)
            except (DanluError, torch.OutOfMemoryError) as error:
                first = str(error).splitlines()[0]
                yield {"what": what, "value": f"did not run: {first}", "unit": "", "against": "", "limit": None}
                continue
            finally:
                free()
            rate = sorted(rates)[len(rates) // 2]
            card, flops = card_rate(place)
            # Six operations per parameter and token; with an adapter the base has no weight gradients, which leaves four. Of PPO
            # only the tokens per second are comparable: an iteration reads them five times and trains two models.
            work = {"full": 6}.get(adapter, 4) * _parameters(size, place)
            row = {"what": what, "value": rate, "unit": "tokens/s"}
            share = rate * work / flops if kind != "ppo" else None
            yield {**row, "against": card, "limit": flops / work if kind != "ppo" else None, "share": share}
            row = {"what": f"{what}, peak memory", "value": peak, "unit": "MB", "against": "danlu plan"}
            yield {**row, "limit": planned, "share": peak / planned}


def _settings(place: Place, size: str, kind: str, adapter: str) -> dict[str, Any]:
    tokens = 256 if place.tiny else 16_384
    values: dict[str, Any] = {"model": str(_model_folder(place, size)), "data": str(place.folder / f"{kind}.jsonl")}
    values |= {"adapter": adapter, "dtype": "bfloat16", "eval_fraction": 0.0, "max_steps": STEPS}
    values |= {"tokens_per_step": tokens, "micro_tokens": tokens, "max_length": 256 if place.tiny else 2048}
    values |= {"learning_rate": 1e-6, "save_every": 10**6}
    if kind == "ppo":
        batch, new = (4, 8) if place.tiny else (64, 128)
        values |= {"reward_model": str(_model_folder(place, size, scalar=True))}
        values |= {"rollout": {"batch": batch, "max_new_tokens": new}, "ppo": {"epochs": 1, "minibatches": 1}}
    return values


def _run(place: Place, kind: str, settings: dict[str, Any]) -> tuple[list[float], float]:
    """Tokens per second of the steps after the warm-up, and the peak memory in MB (of the card, or of the process)."""
    rates: list[float] = []
    state = {"begun": 0.0, "step": 0}

    def before() -> None:
        wait(place.device)
        state["begun"] = time.perf_counter()

    def on_log(metrics: dict[str, float], tokens: int) -> None:
        wait(place.device)
        state["step"] += 1
        if state["step"] > WARM:
            rates.append(tokens / (time.perf_counter() - state["begun"]))

    def after() -> None:
        if state["step"] == STEPS:
            raise _Enough

    fresh_peak(place.device)
    reset_peak_memory()
    module = importlib.import_module("danlu.trainers." + {"reward": "reward_model"}.get(kind, kind))
    with tempfile.TemporaryDirectory(dir=place.folder) as out:
        try:
            with paced(before=before, on_log=on_log, after=after):
                module.train(parse(KINDS[kind], {**settings, "out": out}))
        except _Enough:
            pass
    peak = torch.cuda.max_memory_reserved() / 2**20 if place.device == "cuda" else peak_memory_mb()
    return rates, peak


def _planned(place: Place, kind: str, settings: dict[str, Any]) -> float:
    """What `danlu plan` says that this stage takes, in MB."""
    recipe = place.folder / "plan.yaml"
    stage = {"kind": kind, **settings}
    recipe.write_text(yaml.safe_dump({"description": "one stage", "stages": [stage]}), "utf-8")
    return float(estimate(load_recipe(recipe))[0]["memory_mb"])


def _parameters(size: str, place: Place) -> float:
    """Parameters that take part in products: the layers' and the head's."""
    shape = SHAPES[size]
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * width * width + 2 * width * width * shape["num_key_value_heads"] // heads
    layers = shape["num_hidden_layers"] * (attention + 3 * width * shape["intermediate_size"])
    vocabulary = len(load_tokenizer(place.folder / "tokenizer")) if place.tiny else 32_000
    return float(layers + vocabulary * width)


# -- decode ------------------------------------------------------------------------------------------------------------


def _decode(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """Greedy decoding at several batch sizes; the limit is reading all weights and the cache once a token."""
    model = load_model(_model_folder(place, size), dtype=torch.bfloat16).to(place.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    yield from _decoded(place, size, model, weights, "bfloat16")
    del model
    free()


def _packed(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """Weights of 8 and 4 bits: what a model takes, and how fast it answers."""
    if size == "1B":
        return
    for bits in (8, 4):
        model = load_model(_model_folder(place, size), dtype=torch.bfloat16).to(place.device)
        quantize_model(model, bits)
        fresh_peak(place.device)
        held = allocated_gb(place.device)
        row = {"what": f"weights, int{bits}", "value": held, "unit": "GB", "against": "danlu plan"}
        shape = shape_of_folder(str(_model_folder(place, size)))
        assert shape is not None, "it has a configuration"
        planned = inference_memory(shape, bits)["weights"] / 1024
        yield {**row, "limit": planned, "share": held / planned}
        yield from _decoded(place, size, model, int(held * 2**30), f"int{bits}")
        row = {"what": f"serving, int{bits}, peak memory", "value": peak_gb(place.device), "unit": "GB"}
        yield {**row, "against": "", "limit": None}
        del model
        free()


def _decoded(place: Place, size: str, model: Any, weights: int, kind: str) -> Iterator[dict[str, Any]]:
    speed = bandwidth(place.device, 1 << (20 if place.tiny else 28))
    shape = SHAPES[size]
    kv_row = shape["hidden_size"] * shape["num_key_value_heads"] // shape["num_attention_heads"]
    new, prompt = (8, 16) if place.tiny else (128, 256)
    for batch in (1, 16, 64) if kind == "bfloat16" else (1, 16):
        engine = LocalEngine(model, max_slots=batch)
        asked = [
            Request([4 + i, *range(5, 4 + prompt)], SamplingParams(max_new_tokens=new, temperature=0.0))
            for i in range(batch)
        ]
        for _ in range(2):  # a step is captured when it comes for the second time
            generate(engine, asked)
        wait(place.device)
        begun = time.perf_counter()
        done = generate(engine, asked)
        wait(place.device)
        rate = sum(len(c.ids) for c in done) / (time.perf_counter() - begun)
        cache = batch * (prompt + new / 2) * 2 * 2 * kv_row * shape["num_hidden_layers"]
        limit = batch * speed / (weights + cache)
        row = {"what": f"decode, batch {batch}, {kind}", "value": rate, "unit": "tokens/s"}
        yield {**row, "against": "bandwidth limit", "limit": limit, "share": rate / limit}
        del engine
