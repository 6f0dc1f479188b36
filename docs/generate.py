"""Writes the parts of the documentation that the code already knows, so that they cannot go stale.

docs/settings.md is made from danlu.config, docs/health.md from the health rules, docs/formats.md and a page for each format from
the registry of formats, and the table in docs/adapters.md from a stored run.

    python docs/generate.py            write
    python docs/generate.py --check    exit status 1 if a committed page differs
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from danlu.config import KINDS
from danlu.data.formats.base import Format
from danlu.data.formats.registry import FORMATS, REFUSED
from danlu.data.kinds import SERVED_BY
from danlu.data.rows_out import row_of
from danlu.health_config import HEALTH_ACTIONS, HEALTH_ADAPTS
from danlu.reward_config import TERMS, RewardTerm
from danlu.train_config import AdapterKind, Source, StageSettings, TrainSettings
from danlu.training.health import CORRECTIONS, PAUSE
from danlu.training.rules import RULES
from danlu.types import Origin, RecordKind

DOCS = Path(__file__).parent
SETTINGS = DOCS / "settings.md"
HEALTH = DOCS / "health.md"
FORMATS_PAGE = DOCS / "formats.md"
FORMAT_PAGES = DOCS / "formats"
FAMILIES_PAGE = DOCS / "families.md"
FAMILIES_RUN = DOCS / "families.json"  # written by `make families`
ADAPTERS = DOCS / "adapters.md"
ADAPTERS_RUN = DOCS / "adapters.json"  # written by `make matrix`

HEAD = """\
# Settings

<!-- Made by docs/generate.py from danlu.config. Do not edit: run `make docs`. -->

One name, three places. A setting is a key of a stage in a recipe, a `--set STAGE.KEY=VALUE` of `danlu run`, and a flag
of the stage's own command: `learning_rate` is `--learning-rate`, and `lora.r` is `--lora.r`. In Python it is a field of
the settings class.

Settings are checked before anything runs. An unknown key is refused with the nearest right name, and a value out of
range with what was found. Settings cannot change after that.

"Empty" means that the recipe fills the value in, as [Recipes](recipes.md) tells, or that it must be given.
"""
EVERY = """
## Every stage
"""
TRAINING = """
## Every training stage

These belong to `pretrain`, `sft`, `reward`, `dpo`, `ppo` and `grpo`. A stage of its own below shows only what it adds or changes.
"""


REWARDS = """
## Terms of `rewards` and `eval_rewards`

A list of objects; the `kind` of each says which settings it has. [Rewards](rewards.md) shows how they are used.
"""


def main(arguments: list[str]) -> int:
    """Writes the pages, or compares them with `--check`; returns the exit status."""
    pages = {SETTINGS: settings_page(), HEALTH: health_page(), FORMATS_PAGE: formats_page(), ADAPTERS: adapters_page()}
    pages[FAMILIES_PAGE] = families_page()
    pages |= {FORMAT_PAGES / f"{entry.name}.md": format_page(entry) for entry in FORMATS}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    stale += [path for path in sorted(FORMAT_PAGES.glob("*.md")) if path not in pages]
    if "--check" not in arguments:
        for path in stale:
            if path in pages:
                path.parent.mkdir(exist_ok=True)
                path.write_text(pages[path], "utf-8")
            else:
                path.unlink()
    if "--check" in arguments:
        for path in stale:
            name = path.relative_to(DOCS)
            print(f"docs/{name} is not what the code says\n  -> run `make docs` and commit it", file=sys.stderr)
        return int(bool(stale))
    names = ", ".join(str(path.relative_to(DOCS)) for path in stale)
    print(f"written: {names or 'nothing, all pages are up to date'}")
    return 0


# -- families ---------------------------------------------------------------------------------------------------------


def families_page() -> str:
    """docs/families.md with its table: what each family did in the last run of `make families`."""
    text = FAMILIES_PAGE.read_text("utf-8")
    before, begin, rest = text.partition("<!-- families: begin")
    head, _, rest = rest.partition("-->\n")
    _, end, after = rest.partition("<!-- families: end -->")
    found = json.loads(FAMILIES_RUN.read_text("utf-8")) if FAMILIES_RUN.is_file() else {}
    columns = list(next(iter(found.values()), {}))
    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in found.items()]
    table = "\n".join(lines) + "\n" if found else ""
    return f"{before}{begin}{head}-->\n{table}{end}{after}"


# -- adapters ---------------------------------------------------------------------------------------------------------

MATRIX = "<!-- matrix: made by docs/generate.py from docs/adapters.json. Do not edit below. -->\n"


def adapters_page() -> str:
    """docs/adapters.md: what people wrote, and the table of the last `make matrix`."""
    written = ADAPTERS.read_text("utf-8").split(MATRIX)[0]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    if ADAPTERS_RUN.is_file():
        table = json.loads(ADAPTERS_RUN.read_text("utf-8"))
    kinds = [k for k in get_args(AdapterKind) if any(k in row for row in table.values())]
    if not table:
        return f"{written}{MATRIX}\nNo run is stored yet.\n"
    lines = ["\n| family | " + " | ".join(kinds) + " |\n", "|---" * (len(kinds) + 1) + "|\n"]
    for family, row in sorted(table.items()):
        lines.append(f"| {family} | " + " | ".join(_outcome(row.get(kind)) for kind in kinds) + " |\n")
    return written + MATRIX + "".join(lines)


def _outcome(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if "refused" in cell:
        return "refused"
    return f"{cell['loss']:.3f}" if cell["good"] else f"**{cell['loss']:.3f}, {cell['stops']} stops**"


# -- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """docs/settings.md."""
    parts = [HEAD, EVERY, _table(StageSettings, None), TRAINING, _table(TrainSettings, StageSettings)]
    for kind, cls in KINDS.items():
        trains = issubclass(cls, TrainSettings)
        parts.append(f"\n## {kind}\n\n{(cls.__doc__ or '').strip()}\n")
        table = _table(cls, TrainSettings if trains else StageSettings)
        parts.append(table or "\nNo settings of its own.\n")
    parts += [REWARDS, _table(RewardTerm, None)]
    for name, term in TERMS.items():
        parts.append(f"\n### {name}\n\n{(term.__doc__ or '').strip()}\n{_table(term, RewardTerm, without=('kind',))}")
    return "".join(parts)


def _table(cls: type[BaseModel], parent: type[BaseModel] | None, without: tuple[str, ...] = ()) -> str:
    inherited = parent.model_fields if parent else {}
    own = {n: f for n, f in cls.model_fields.items() if n not in without}
    shown = {n: f for n, f in own.items() if n not in inherited or _differs(f, inherited[n])}
    if not shown:
        return ""
    lines = ["\n| setting | value | default | what it does |\n|---|---|---|---|\n"]
    lines += [_line(*row) for row in _rows(shown)]
    return "".join(lines)


def _differs(field: FieldInfo, other: FieldInfo) -> bool:
    return _default(field) != _default(other) or field.annotation != other.annotation


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _rows(fields: dict[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in fields.items():
        full = prefix + name
        group = _group(field.annotation)
        if group is None:
            default = "must be given" if field.is_required() else _shown(_default(field))
            yield full, _value(field), default, field.description or ""
            continue
        what = field.description or (group.__doc__ or "").strip().rstrip(".")
        yield full, "group", "off" if _default(field) is None else "", what
        yield from _rows(dict(group.model_fields), f"{full}.")


def _bare(annotation: Any) -> Any:
    """The type without `None` and validators, and `str` for "one or a list of them"."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _group(annotation: Any) -> type[BaseModel] | None:
    kind = _bare(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _value(field: FieldInfo) -> str:
    """The type in words, with its range."""
    if _names(Source, field.annotation):
        return "[path, or sources](data.md#sources)"
    if _names(RewardTerm, field.annotation):
        return "[terms](#terms-of-rewards-and-eval_rewards)"
    kind = _bare(field.annotation)
    several = get_origin(kind) is list or (
        get_origin(field.annotation) in (Union, types.UnionType)
        and any(get_origin(a) is list for a in get_args(field.annotation))
    )
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        words = ", ".join(f"`{choice}`" for choice in get_args(kind))
    elif get_origin(kind) is dict:
        words = "mapping"
    else:
        words = {int: "whole number", float: "number", bool: "`true`, `false`"}.get(kind, "text")
        words = "object" if get_origin(kind) is dict else words
    return f"{words}, or a list" if several else words + _range(field)


def _names(cls: type[BaseModel], annotation: Any) -> bool:
    """Whether a type is, or is made of, a kind of settings."""
    is_it = isinstance(annotation, type) and issubclass(annotation, cls)
    return is_it or any(_names(cls, part) for part in get_args(annotation))


def _range(field: FieldInfo) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    found = [f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in signs if hasattr(m, name)]
    return f" {' and '.join(found)}" if found else ""


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if default in ("", [], {}):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _line(name: str, value: str, default: str, what: str) -> str:
    return f"| `{name}` | {value} | {default} | {_cell(what)} |\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# -- health -----------------------------------------------------------------------------------------------------------

HEALTH_HEAD = """\
# Health of PPO and GRPO

<!-- Made by docs/generate.py from the health rules. Do not edit: run `make docs`. -->

Training on a reward goes wrong in ways that the reward does not show. So `ppo` and `grpo` are watched while they run. Rules look
at the logged curves after every iteration and every held-out evaluation; what they find is said once, kept in the stage's
`health.jsonl` and in `facts.health` of its manifest, and shown in the report with what to change.

## What is measured

Every iteration, from the roll-outs: `score`, `kl` (k1, may be a little below 0) and `kl_k3` (never negative), `entropy`, `length`,
`stop_rate`, and from their tokens:

| metric | what it is |
|---|---|
| `repetition` | share of an answer's 3-grams that occurred before in it, mean over the answers |
| `distinct_1`, `distinct_2` | different tokens, and 2-grams, of all answers over the number of all of them (Li et al. 2016) |
| `empty_rate` | share of answers without any text |

And from what the engine and the trainer say of the same fresh tokens:

| metric | what it is |
|---|---|
| `engine_gap` | mean absolute difference of their log-probabilities, nats per token |
| `engine_gap_max` | the greatest of these differences |
| `engine_gap_high` | 1 where the mean is beyond its bound: 1e-5 in float32, 0.1 in bfloat16 and float16; otherwise absent |

The engine answers in float32, also where the trainer reads in bfloat16, which keeps 8 bits: so they differ by rounding alone. One
token of thousands may be off by 0.1 that way in any iteration, and says nothing. The mean hardly moves: in the quickstart it is
0.0030, within a tenth, in every iteration, and an engine whose weights are a single update old has 0.016 to 0.039. So P-ENGINE-GAP
looks at the mean, against the bound and against the first iteration, when both have the same weights for sure; of the greatest
only what no rounding explains counts.

Every `eval_every` iterations, and before the first one, the held-out prompts are answered, each time with the same draws:

| metric | what it is |
|---|---|
| `eval_score`, `eval_length`, `eval_stop_rate` | as in training, on prompts that are not trained on |
| `eval_gold` | a reward that is measured but never trained on, where there is one |
| `eval_disagreement` | mean standard deviation among the members of an ensemble of reward models (`disagreement`: on roll-outs) |
| `eval_win_rate` | share of prompts on which the answer is scored higher than that of the model before training |
| `eval_win_rate_low`, `_high` | ends of its 95% interval |

Wins are judged by gold if there is one, else by the reward; ties count half.

The answers to a few of these prompts, drawn by the seed, are appended to the stage's `samples.jsonl`
(`{"step", "prompt", "answer", "score"}`); the report shows them side by side.

The answers of an iteration in which a rule found something are kept whole, in the stage's `findings/CODE-step-N.jsonl`
(`{"prompt", "response", "tokens", "finished", "score"}`): what P-STOP-LOST says of stops can be looked at there.

## What is done about a finding

`health.actions` says it for each rule, for instance `actions: {P-CLIP-HIGH: adapt, P-TIMID: off}`:

- `off`: the rule is not asked.
- `warn`: the finding is said once and kept.
- `adapt`: the correction below is applied from the next iteration on, and again every PAUSE iterations while the finding
  stays, up to a bound.
- `stop`: the stage ends. It is done, not failed; its manifest says why, and its model has the weights of the best held-out
  evaluation so far (by `eval_gold`, else `eval_score`; or what `checkpoint_best` watches).

`health.on: false` asks no rule. Decisions depend on logged numbers and on a state in the checkpoints, so a stage that was killed
and goes on decides as it would have, and all processes decide the same.

## Rules
"""


def health_page() -> str:
    """docs/health.md."""
    parts = [HEALTH_HEAD.replace("PAUSE", str(PAUSE))]
    parts.append("\n| code | fires when | default |\n|---|---|---|\n")
    parts += [f"| {code} | {_cell(rule.when)} | {HEALTH_ACTIONS[code]} |\n" for code, rule in RULES.items()]
    parts.append("\n## Corrections\n\n| code | what `adapt` does | bound |\n|---|---|---|\n")
    for code in HEALTH_ADAPTS:
        name, factor, bound = CORRECTIONS[code]
        parts.append(f"| {code} | multiplies `{name}` by {factor:g} | {bound:g} times the setting |\n")
    parts.append("\n## Causes and remedies\n")
    for code, rule in RULES.items():
        parts.append(f"\n**{code}.** Likely: {rule.cause}. Try: {rule.change}.\n")
    return "".join(parts)


# -- formats ----------------------------------------------------------------------------------------------------------

FORMATS_HEAD = """\
# Formats

<!-- Made by docs/generate.py from the registry of formats. Do not edit: run `make docs`. -->

danlu recognises each row by its content, whatever the file is called. Rows are tried against these formats from top to
bottom; the first that fits is taken, and of several the first that can serve what the stage needs. `--as NAME` forces
one. For tables of your own, `--map prompt=COLUMN,response=COLUMN` names the columns.

Rows that are known noise of a published set (an empty answer, two equal answers, a tie) are left out and counted by
reason. A missing field or a wrong type is an error with file, line and field. A row that no format knows is an error;
nothing is guessed.

## References that a program can check

Prompts may carry a `reference`, which stays with them. Formats of tasks write these keys, and so may your own prompts:

| `verifier` | with | meaning |
|---|---|---|
| `number` | `answer`: `"72"` | the number that a right answer ends in |
| `choice` | `answer`: `"B"`, `choices`: the options | the letter of the right option |
| `exact` | `answer`: `"red"` | the whole right answer, up to white space |
| `regex` | `pattern` | what a right answer matches somewhere |
| `json` | `schema`: a [subset of JSON Schema](rewards.md#verifiers) | what a right answer, which is JSON, fits |
| `tests` | `tests`: programs | programs that run without an error if the answer's code is right |

Each format has a page with an example and what danlu makes of it.
"""
HOLDS: dict[RecordKind, tuple[str, str]] = {
    "conversation": ("Conversations", "Messages to imitate."),
    "comparison": ("Comparisons", "A prompt with a better and a worse answer."),
    "ranking": ("Rankings", "A prompt with scored or ranked answers, of which comparisons are made."),
    "unpaired": ("Labelled answers", "A prompt, one answer, and whether somebody liked it."),
    "prompt": ("Prompts", "Questions without an answer to imitate, some with a reference."),
    "document": ("Documents", "Text for pre-training."),
}
REFUSED_HEAD = """
## Known and refused

These shapes are recognised so that the error can say what they are and what to do.

"""
TABLE_HEAD = "| format | a row in short |\n|---|---|\n"
# A longer example would hide the rest of its page.
LONGEST_EXAMPLE = 2000


def formats_page() -> str:
    """docs/formats.md."""
    readable = [entry for entry in FORMATS if entry not in REFUSED]
    parts = [FORMATS_HEAD]
    for kind, (title, what) in HOLDS.items():
        parts.append(f"\n## {title}\n\n{what}{_serves(kind)}\n\n{TABLE_HEAD}")
        parts += [_row(entry) for entry in readable if entry.holds == kind]
    parts += [REFUSED_HEAD, TABLE_HEAD, *map(_row, REFUSED)]
    return "".join(parts)


def format_page(entry: Format) -> str:
    """A format's own page."""
    title, what = HOLDS[entry.holds]
    head = f"# {entry.name}\n\n<!-- Made by docs/generate.py from the registry of formats. Do not edit: run `make docs`. -->\n\n"
    parts = [head, f"{entry.about}\n\nA row in short: {_code(entry.shape)}\n"]
    example = _json(entry.example)
    if len(example) <= LONGEST_EXAMPLE:
        parts.append(f"\n## Example\n\n{example}")
    if entry in REFUSED:
        return "".join([*parts, "\ndanlu recognises this shape to say what it is, and does not read it.\n"])
    records = entry.parse(entry.example, Origin(f"{entry.name}.jsonl", 1))
    parts.append(f"\n## What danlu makes of it\n\n[{title}](../formats.md): {what[:1].lower()}{what[1:]}")
    parts.append(f"{_serves(entry.holds)}\n\n" + "\n".join(_json(row_of(record)) for record in records))
    parts.append(f"\n`--as {entry.name}` reads a file as this format, whatever it looks like.\n")
    return "".join(parts)


def _serves(kind: RecordKind) -> str:
    others = [other for other, holders in SERVED_BY.items() if kind in holders and other != kind]
    return f" They also serve where {_listed(others)} are asked for." if others else ""


def _row(entry: Format) -> str:
    return f"| [{entry.name}](formats/{entry.name}.md) | {_code(entry.shape)} |\n"


def _json(value: Any) -> str:
    short = json.dumps(value, ensure_ascii=False)
    return f"```json\n{short if len(short) <= 100 else json.dumps(value, ensure_ascii=False, indent=2)}\n```\n"


def _code(shape: str) -> str:
    # Only text that is code from its beginning to its end is set as code.
    return f"`{_cell(shape)}`" if shape.startswith("{") else _cell(shape)


def _listed(kinds: list[RecordKind]) -> str:
    *first, last = (HOLDS[kind][0].lower() for kind in kinds)
    return f"{', '.join(first)} or {last}" if first else last


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
