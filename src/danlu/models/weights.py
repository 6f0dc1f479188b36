"""Weight files of published models: which there are, whether they are whole, and reading them without running anything.

Safetensors hold numbers only. `.bin` and `.pt` files are pickles, which can ask for any function of Python; torch's
`weights_only` reader knows the few that tensors need and refuses the rest.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from danlu.exceptions import ModelError

SINGLE: Final = ("model.safetensors", "pytorch_model.bin")
INDEX: Final = ".index.json"
POINTER: Final = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, safetensors before pickles; empty if there are none of a known name.

    Raises:
        ModelError: an index names a file that is not there.
    """
    for single in SINGLE:
        index = folder / (single + INDEX)
        if index.is_file():
            return _shards(folder, index)
        if (folder / single).is_file():
            return [folder / single]
    return []


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"found no index of weights: {error!r}", file=index, hint="download the file once more"
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}",
            file=index,
            hint="the download is incomplete; fetch the missing files",
        )
    return [folder / name for name in names]


def check_weights(folder: Path) -> None:
    """Looks at every weight file of a folder before a model is made.

    Raises:
        ModelError: there is none, one is missing, cut short, a pointer to a file elsewhere, or wants to run code.
    """
    files = weight_files(folder)
    if not files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"no weights in this folder (found: {found})",
            file=folder,
            hint=f"expected {' or '.join(SINGLE)}, or shards",
        )
    for file in files:
        check_file(file)


def check_file(file: Path) -> None:
    """See `check_weights`; one file."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ModelError(
                "this is a Git LFS pointer, not the weights themselves", file=file, hint="git lfs pull, or download it"
            )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise _damaged(file, error) from error
    else:
        read_pickle(file)


def read_pickle(file: Path) -> Any:
    """What a `.bin` or `.pt` file holds, memory-mapped where its format allows that; nothing in it is run.

    Raises:
        ModelError: it is damaged, or asks for something that reading weights does not need.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles' protocols
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        wanted = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error)) or _globals(file)
        if wanted:
            raise ModelError(
                f"this file is refused: it wants to run {', '.join(wanted[:3])}, which reading weights never needs",
                file=file,
                hint="it may be malicious; take the model as safetensors from its authors",
            ) from error
        raise _damaged(file, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error


def _globals(file: Path) -> list[str]:
    """What a pickle asks for beyond tensors: found by reading its operations, not by running them."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if zipfile.is_zipfile(file):
        return sorted(get_unsafe_globals_in_checkpoint(file))
    found: set[str] = set()
    strings: list[str] = []
    try:
        with file.open("rb") as opened:
            for operation, argument, _ in _operations(opened):
                if operation.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL" and len(strings) > 1:
                    found.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:
        pass  # what was found up to the place where it stops being a pickle is enough for the sentence
    return sorted(name for name in found if not name.startswith(("torch.", "collections.OrderedDict")))


def _operations(opened: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Of all pickles in a file, one after another, as older files of torch have several."""
    import pickletools

    while True:
        yield from pickletools.genops(opened)


def _damaged(file: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"the file is cut short or damaged ({file.stat().st_size:,} bytes): {reason}",
        file=file,
        hint="download it once more",
    )


def read_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all files, one tensor in memory at a time where the format allows it.

    Raises:
        ModelError: see `check_weights`.
    """
    for file in files:
        if file.suffix != ".safetensors":
            yield from tensors_of(read_pickle(file), file).items()
            continue
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, error) from error


def tensors_of(found: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint: a plain mapping, or one under `module`, `model` or `state_dict`.

    Raises:
        ModelError: there is no mapping of names to tensors.
    """
    for _ in range(3):
        inner = next((found[k] for k in ("module", "state_dict", "model") if _is_mapping(found, k)), None)
        if inner is None:
            break
        found = inner
    named = {n: t for n, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    if not named:
        raise ModelError("found no mapping of names to tensors", file=file, hint="give a file of weights")
    return named


def _is_mapping(found: Any, key: str) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get(key), Mapping)


def build(
    kind: type,
    config: Any,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
    *,
    absent: Callable[[str], bool] = lambda name: False,
    leftovers: bool = True,
) -> Any:
    """A transformers model of a class with these weights.

    Args:
        absent, leftovers: see `checked`.

    Raises:
        ModelError: weights are missing, left over, or of another shape than the configuration says.
    """
    return checked(
        lambda: kind.from_pretrained(  # type: ignore[attr-defined]
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation="eager",
        ),
        folder,
        absent=absent,
        leftovers=leftovers,
    )


def checked(
    load: Callable[[], tuple[Any, Mapping[str, Any]]],
    folder: str | Path,
    *,
    absent: Callable[[str], bool] = lambda name: False,
    leftovers: bool = False,
) -> Any:
    """What `from_pretrained` loads, if all of it is there and fits.

    Args:
        load: `from_pretrained` with `output_loading_info` and `ignore_mismatched_sizes`, so that shapes can be told.
        absent: whether a parameter may be missing.
        leftovers: refuse weights that the model has no place for.

    Raises:
        ModelError: what transformers could not do, in one sentence.
    """
    try:
        loaded, info = load()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot be loaded: {first}", file=folder, hint="check config.json and the weight files"
        ) from error
    wrong = [m for m in info.get("mismatched_keys") or () if not absent(m[0])]
    if wrong:
        name, found, expected = sorted(wrong)[0]
        raise ModelError(
            f"{name} has the shape {list(found)} in the weights, and config.json asks for {list(expected)}"
            + (f" ({len(wrong)} parameters do not fit)" if len(wrong) > 1 else ""),
            file=folder,
            hint="configuration and weights are of different models or sizes",
        )
    missing = sorted(name for name in info["missing_keys"] if not absent(name))
    if missing:
        raise ModelError(
            f"{len(missing)} parameters are missing from the weights, the first is {missing[0]}",
            file=folder,
            hint="the download may be incomplete, or the configuration of another model",
        )
    left = sorted(info.get("unexpected_keys") or ())
    if leftovers and left:
        raise ModelError(
            f"{len(left)} weights have no place in this model, the first is {left[0]}",
            file=folder,
            hint="the configuration may be of another model",
        )
    loaded.danlu_missing = sorted({*info["missing_keys"], *(m[0] for m in info.get("mismatched_keys") or ())})
    return loaded
