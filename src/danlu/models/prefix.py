"""P-Tuning v2 and prompt tuning: what learns, the roles that hold it, and its files.

P-Tuning v2 (Liu et al. 2021) learns keys and values of virtual tokens in every layer, prompt tuning (Lester et al. 2021) their
input embeddings. How they are read is in `virtual_root.py`. Folders are PEFT's (PREFIX_TUNING, PROMPT_TUNING).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from danlu.atomic import write_bytes, write_json
from danlu.exceptions import ModelError
from danlu.models.families import context_of
from danlu.models.heads import head_of
from danlu.models.prefix_table import PrefixTable
from danlu.models.roles import SCALAR_ROLES
from danlu.models.root import RoleName, prepare
from danlu.models.virtual_root import NAME, Prefix, PrefixKind, PrefixShape, shape_of

PEFT_KINDS: dict[PrefixKind, str] = {"ptuning": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
# Of the first keys and values, as in PEFT and ChatGLM. Smaller ones disturb a model less, but all tokens then see the virtual
# ones alike: with 0.1 eight rows took three times as many steps.
DEEP_STD = 1.0


class PrefixEncoder(PrefixTable):
    """Makes the states of the virtual tokens. After training only its result matters.

    Args:
        kind, shape, shift: see `Prefix`.
        tokens, width, hidden: see `PrefixTable`.
        numbers: of a row of the result: `shape.numbers` ("ptuning") or the width of the model's embeddings ("prompt").
    """

    def __init__(
        self,
        kind: PrefixKind,
        shape: PrefixShape,
        tokens: int,
        numbers: int,
        *,
        width: int | None = None,
        hidden: int | None = None,
        shift: bool = True,
    ) -> None:
        super().__init__(tokens, numbers, width=width, hidden=hidden)
        self.kind, self.shape, self.shift = kind, shape, shift
        self.start: Tensor | None
        self.register_buffer("start", None)

    def forward(self) -> Tensor:
        """The states `[P, numbers]`."""
        states = self.rows()
        return states if self.start is None else states + self.start

    def prefix(self) -> Prefix:
        """What it makes now; gradients flow to its parameters."""
        return Prefix(self.kind, self(), self.shape, self.shift)

    @torch.no_grad()
    def begin_at(self, prefix: Prefix) -> None:
        """Makes it say what a prefix says; with a projection as a constant to which the layers add 0 at first."""
        if self.trans is None:
            self.embedding.weight.copy_(prefix.states)
        else:
            self.start = prefix.states.detach().to(self.embedding.weight).clone()
            last: Any = self.trans[2]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @classmethod
    def from_chatglm(
        cls, state: Mapping[str, Tensor], *, layers: int, kv_heads: int, head_dim: int, hidden: int | None = None
    ) -> PrefixEncoder:
        """An encoder with the weights of ChatGLM's `prefix_encoder`; its positions do not shift.

        Args:
            state: `embedding.weight` and perhaps `trans.0`, `trans.2` with `weight` and `bias`, whatever stands before these names.
            layers, kv_heads, head_dim: of the model.
            hidden: the width between the two layers, checked where it is given.

        Raises:
            ModelError: tensors are missing, or are those of another model.
        """
        own = {n.rpartition("prefix_encoder.")[2]: t.float() for n, t in state.items()}
        expected = {"embedding.weight"} | (
            {f"trans.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")} if len(own) > 1 else set()
        )
        if own.keys() != expected:
            raise ModelError(
                f"a prefix encoder has the tensors {', '.join(sorted(expected))}, here are {', '.join(sorted(own)) or 'none'}",
                hint="give the file that ChatGLM's P-Tuning saved",
            )
        shape = PrefixShape(layers, kv_heads, head_dim)
        tokens, width = own["embedding.weight"].shape
        numbers, middle = (own["trans.2.weight"].shape) if len(own) > 1 else (width, None)
        if numbers != shape.numbers or (hidden is not None and middle not in (None, hidden)):
            raise ModelError(
                f"the prefix has {numbers} numbers a token (hidden {middle}); this model needs 2 * {layers} layers * {kv_heads} "
                f"heads * {head_dim} = {shape.numbers} (hidden {hidden})",
                hint="it was trained for another model",
            )
        made = cls(
            "ptuning", shape, tokens, numbers, width=width if middle is not None else None, hidden=middle, shift=False
        )
        made.load_state_dict(own)
        return made


def attach(model: Any, prefix: Prefix | PrefixEncoder) -> Any:
    """Lets a model carry a prefix: trees, the engine and everything above it read it from now on. Returns the model.

    It replaces an earlier one. An engine that has the model must be told (`forget_prompts`).
    """
    given = prefix.prefix() if isinstance(prefix, PrefixEncoder) else prefix
    setattr(model.base_model, NAME, given.detach())
    return model


def detach(model: Any) -> Prefix | None:
    """Takes a model's prefix away, and returns it."""
    found = attached(model)
    if found is not None:
        delattr(model.base_model, NAME)
    return found


def attached(model: Any) -> Prefix | None:
    """The prefix that a model carries."""
    found: Prefix | None = getattr(model.base_model, NAME, None)
    return found


def room_of(model: Any) -> int:
    """Tokens that a text may have: the model's context, less the positions that its prefix takes."""
    prefix = attached(model)
    return context_of(model.config) - (prefix.offset if prefix is not None else 0)


class PrefixRoles(nn.Module):
    """All roles on one frozen base, each with a prefix of its own; critic and reward also have a scalar head.

    If the base carries a prefix already (a stage before trained it), every role begins at it and "ref" keeps it.
    """

    def __init__(
        self,
        base: Any,
        roles: Sequence[RoleName],
        *,
        tokens: int,
        projection: bool = False,
        hidden: int | None = None,
        kind: PrefixKind = "ptuning",
        trained: Sequence[RoleName] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            base: a causal language model; its weights are frozen.
            roles: whom to give prefixes; "ref" needs none.
            tokens: P >= 1.
            projection: whether two layers make the prefix (see `PrefixEncoder`).
            hidden: their width; default that of the model's embeddings.
            kind: "ptuning" or "prompt".
            trained: roles whose prefix and head learn; default: all but ref and reward.
            seed: for the first weights.

        Raises:
            ModelError: no role needs a prefix, or the base carries one of another kind or length.
        """
        super().__init__()
        self.model = prepare(base)
        self.model.requires_grad_(False)
        names = [role for role in roles if role != "ref"]
        if not names:
            raise ModelError("at least one role beside ref is needed to add prefixes for")
        start = attached(base)
        if start is not None and (start.kind, start.tokens) != (kind, tokens):
            raise ModelError(
                f"the model carries a prefix of {start.tokens} tokens ({start.kind}), and {tokens} ({kind}) are asked for",
                hint=f"adapter: {start.kind} with prefix.tokens {start.tokens}, or begin with the model without its prefix",
            )
        embedding = base.get_input_embeddings().weight
        width = embedding.shape[1]
        shape = start.shape if start is not None else shape_of(base.base_model)
        shift = start.shift if start is not None else getattr(base.base_model, "danlu_prefix_shift", True)
        self.encoders = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in names:
                encoder = PrefixEncoder(
                    kind,
                    shape,
                    tokens,
                    shape.numbers if kind == "ptuning" else width,
                    width=width if projection else None,
                    hidden=hidden,
                    shift=shift,
                )
                _begin(encoder, start, embedding)
                self.encoders[name] = encoder
        features = base.get_output_embeddings().in_features
        self.scalar_heads = nn.ModuleDict({r: nn.Linear(features, 1, bias=False) for r in names if r in SCALAR_ROLES})
        for scalar in self.scalar_heads.parameters():
            nn.init.zeros_(scalar)
        learning = trained if trained is not None else [r for r in names if r != "reward"]
        for part in (self.encoders, self.scalar_heads):
            for role, module in part.items():
                module.to(embedding.device).requires_grad_(role in learning)

    @property
    def base(self) -> Any:
        """The transformers model in front of which the prefixes stand."""
        return self.model

    def encoder(self, role: RoleName) -> PrefixEncoder:
        """A role's encoder.

        Raises:
            ModelError: the role has none.
        """
        if role not in self.encoders:
            raise ModelError(f"role '{role}' has no prefix here", hint=f"roles present: {', '.join(self.encoders)}")
        found: Any = self.encoders[role]
        assert isinstance(found, PrefixEncoder)
        return found

    def prefix(self, role: RoleName) -> Prefix | None:
        """What a role's trees have before them; None for ref, which reads what the base carries."""
        return None if role == "ref" else self.encoder(role).prefix()

    def trunk(self, role: RoleName) -> nn.Module:
        found: nn.Module = self.model.base_model
        return found

    def head(self, role: RoleName) -> Any:
        return self.scalar_heads[role] if role in self.scalar_heads else head_of(self.model)

    def merged(self, role: RoleName) -> dict[str, Tensor]:
        """Refused: weights cannot say what a prefix says.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a prefix cannot be merged into a model's weights: it is read before every text",
            hint="keep it as an adapter folder (danlu chat, serve and eval take one), or train with adapter: lora",
        )

    def engine_weights(self, role: RoleName) -> Iterator[tuple[str, Tensor]]:
        """What an engine that holds the base needs to answer as the role does; for `Engine.update_weights`."""
        prefix = self.encoder(role).prefix()
        yield f"{NAME}.{prefix.kind}.{'shift' if prefix.shift else 'stay'}", prefix.states.detach()


def _begin(encoder: PrefixEncoder, start: Prefix | None, embedding: Tensor) -> None:
    """First weights: the prefix to go on with, or random keys and values, or the embeddings of random tokens."""
    if start is not None:
        encoder.begin_at(start)
    elif encoder.trans is None and encoder.kind == "ptuning":
        nn.init.normal_(encoder.embedding.weight, std=DEEP_STD)
    elif encoder.kind == "prompt":
        chosen = torch.randint(len(embedding), (encoder.embedding.num_embeddings,))
        states = embedding.detach()[chosen.to(embedding.device)].float().cpu()
        encoder.begin_at(Prefix("prompt", states, encoder.shape))


def receive(model: Any, name: str, states: Tensor) -> bool:
    """Attaches what `PrefixRoles.engine_weights` named; False if the name is that of something else."""
    if not name.startswith(f"{NAME}."):
        return False
    kind, rule = name.split(".")[1:]
    old = attached(model)
    shape = old.shape if old is not None else shape_of(model.base_model)
    attach(model, Prefix("ptuning" if kind == "ptuning" else "prompt", states, shape, rule == "shift"))
    return True


# -- files ----------------------------------------------------------------------------------------------------------------


def save_prefix(roles: PrefixRoles, role: RoleName, folder: str | Path, base_name: str) -> Path:
    """Writes a role's prefix as a folder that PEFT loads; a projection's result is written, not its layers.

    What PEFT has no word for stands in the weights' metadata: whether positions shift. A scalar head lies beside the prefix.

    Args:
        base_name: where the model is to which it belongs.
    """
    head = roles.scalar_heads[role].weight if role in roles.scalar_heads else None
    return write_prefix(roles.encoder(role).prefix(), folder, base_name, head=head)  # type: ignore[arg-type]


def write_prefix(prefix: Prefix, folder: str | Path, base_name: str, *, head: Tensor | None = None) -> Path:
    """See `save_prefix`."""
    path = Path(folder)
    shape = prefix.shape
    deep = prefix.kind == "ptuning"
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prefix.tokens,
        "peft_type": PEFT_KINDS[prefix.kind],
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "token_dim": shape.heads * shape.width if deep else prefix.states.shape[1],
    }
    if deep:
        config |= {"encoder_hidden_size": shape.heads * shape.width, "prefix_projection": False}
    else:
        config |= {"prompt_tuning_init": "RANDOM"}
    tensors = {"prompt_embeddings": prefix.states.detach().float().cpu().contiguous()}
    if head is not None:
        tensors["score.weight"] = head.detach().float().cpu().contiguous()
    metadata = {"format": "pt", "positions": "shift" if prefix.offset else "stay"}
    write_bytes(path / WEIGHTS, save(tensors, metadata))
    write_json(path / CONFIG, config)  # last: what tells that here is an adapter
    return path


def is_prefix(folder: str | Path) -> bool:
    """Whether a folder holds a prefix or prompt adapter, danlu's or PEFT's."""
    file = Path(folder) / CONFIG
    return file.is_file() and json.loads(file.read_text("utf-8")).get("peft_type") in PEFT_KINDS.values()


def load_prefix(folder: str | Path, model: Any) -> Prefix:
    """Reads a folder that danlu or PEFT wrote and attaches it to a model; a scalar head goes where the model has one.

    Raises:
        ModelError: files are missing or broken, or belong to another model.
    """
    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
        tensors, metadata = _tensors(path)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"cannot be read as an adapter: {error}", file=path, hint="give a PEFT folder") from error
    kinds: dict[Any, PrefixKind] = {peft: own for own, peft in PEFT_KINDS.items()}
    kind = kinds.get(config.get("peft_type"))
    if kind is None or "prompt_embeddings" not in tensors:
        raise ModelError(
            f"this folder holds a '{config.get('peft_type')}' adapter, not a prefix",
            file=path,
            hint="see docs/adapters.md",
        )
    prepare(model)
    states, shape = tensors["prompt_embeddings"].float(), shape_of(model.base_model)
    wanted = shape.numbers if kind == "ptuning" else model.get_input_embeddings().weight.shape[1]
    if states.dim() != 2 or states.shape[1] != wanted:
        raise ModelError(
            f"the prefix has {states.shape[-1]} numbers a token, and {type(model).__name__} with {shape.layers} layers of "
            f"{shape.heads} * {shape.width} needs {wanted}",
            file=path,
            hint=f"it was trained for {config.get('base_model_name_or_path') or 'another model'}",
        )
    prefix = Prefix(kind, states, shape, metadata.get("positions", "shift") == "shift")
    attach(model, prefix)
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear) and "score.weight" in tensors:
        with torch.no_grad():
            score.weight.copy_(tensors["score.weight"])
    return prefix


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not (folder / WEIGHTS).is_file() and (folder / OLD_WEIGHTS).is_file():
        found = torch.load(folder / OLD_WEIGHTS, map_location="cpu", weights_only=True)
        return {n: t for n, t in found.items() if isinstance(t, Tensor)}, {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
