"""Tokens on disk: the same trees with and without the cache, in one process and in several, never stale, never half a file."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from danlu.config import KINDS
from danlu.data import token_cache
from danlu.data.collate import Trees, encode_comparisons, encode_conversations, encode_documents
from danlu.data.read import read
from danlu.data.token_cache import Encoder, load, tokenise, tokenizer_digest
from danlu.data.token_store import MARKS, Columns, Gathering, StoredItems, TooManyMarks, to_columns
from danlu.data.token_workers import in_parts
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer
from danlu.tree import Node, conversation
from danlu.types import Comparison, Conversation, Document, Message, Origin, Record

# -- what is encoded ----------------------------------------------------------------------------------------------------


@functools.cache
def template() -> ChatTemplate:
    return ChatTemplate(tiny.tokenizer())


@functools.cache
def conversations() -> list[Record]:
    rng = random.Random(0)
    found: list[Record] = []
    for n in range(160):
        turns: list[Message] = []
        for turn in range(rng.randint(1, 3)):
            thing = rng.choice(tiny.THINGS)
            turns.append(
                {"role": "user", "content": f"{n}.{turn}: which colour has the {thing}? " * rng.choice((1, 2, 3, 9))}
            )
            turns.append({"role": "assistant", "content": f"The {thing} is red.", "train": rng.random() < 0.9})
        found.append(Conversation(turns, Origin("a.jsonl", n + 1)))
    return found


@functools.cache
def encoder(max_length: int = 80) -> Encoder:
    """Some conversations are longer than that: they are shortened or left out, and counted."""
    return Encoder(encode_conversations, template(), {"max_length": max_length})


def comparisons() -> list[Record]:
    return read(str(tiny.data()["comparisons"]), "comparison").records


def documents() -> list[Record]:
    return [Document(f"Note {n}. " + "The door is red. " * (n % 40)) for n in range(120)]


def encoders() -> dict[str, tuple[Encoder, list[Record]]]:
    return {
        "conversations": (encoder(), conversations()),
        "comparisons": (Encoder(encode_comparisons, template(), {"max_length": 64}), comparisons()),
        "documents": (Encoder(encode_documents, tiny.tokenizer(), {"max_length": 24}), documents()),
    }


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few records are kept, in several parts."""
    monkeypatch.setattr(token_cache, "PART_BYTES", 4096)
    monkeypatch.setattr(token_cache, "SMALL_BYTES", 0)


def stored(records: Sequence[Record], wanted: Encoder, folder: Path, **options: Any) -> Trees:
    return tokenise(records, wanted, folder=folder, **{"processes": 1} | options)


def assert_same(found: Trees, expected: Trees) -> None:
    assert list(found.items) == list(expected.items)
    assert found.margins == expected.margins and found.counts() == expected.counts()
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.weights.tolist() == expected.weights.tolist()


def refuse(records: Sequence[Record], text: Any, **options: Any) -> Trees:
    raise AssertionError("encoded again")


def entries(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("*/index.json"))


# -- the same trees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conversations", "comparisons", "documents"])
def test_with_and_without_the_cache(kind: str, tmp_path: Path) -> None:
    wanted, records = encoders()[kind]
    plain = wanted(records)
    assert len(plain.items) > 20
    made = stored(records, wanted, tmp_path)
    assert isinstance(made.items, StoredItems)
    assert_same(made, plain)
    assert_same(stored(records, wanted, tmp_path), plain)
    assert len(entries(tmp_path)) == 1
    indices = [3, 0, len(plain.items) - 1]
    for name, tensor in vars(made.batch(indices)).items():
        assert tensor.equal(getattr(plain.batch(indices), name))


def test_some_conversations_are_cut_and_left_out() -> None:
    """Else the counts above would be zeros."""
    plain = encoder()(conversations())
    assert plain.answers_cut > 0 and plain.dropped and 0 < plain.answers_with_stop < plain.answers


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    parts: list[tuple[int, int]] = []

    def on_part(done: int, total: int, tokens: int) -> None:
        parts.append((done, total))

    found = stored(conversations(), encoder(), tmp_path / "two", processes=2, on_part=on_part)
    assert_same(found, encoder()(conversations()))
    assert parts == [(n + 1, len(parts)) for n in range(len(parts))] and len(parts) > 8
    stored(conversations(), encoder(), tmp_path / "one")
    one, two = entries(tmp_path / "one")[0], entries(tmp_path / "two")[0]
    assert one.name == two.name and {f.name: f.read_bytes() for f in one.iterdir()} == {
        f.name: f.read_bytes() for f in two.iterdir()
    }


def test_what_is_encoded_once_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(conversations(), encoder(), tmp_path)
    monkeypatch.setattr(token_cache, "_build", refuse)
    assert_same(stored(conversations(), encoder(), tmp_path), encoder()(conversations()))
    elsewhere = [replace(r, origin=Origin("b.jsonl", 1)) for r in conversations()]  # type: ignore[type-var]
    assert len(stored(elsewhere, encoder(), tmp_path).items) > 0


def test_small_sets_are_encoded_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    few = conversations()[:20]
    assert_same(tokenise(few, encoder(), folder=tmp_path), encoder()(few))
    assert not list(tmp_path.iterdir())
    assert_same(tokenise(few, encoder(), folder=None), encoder()(few))


def test_nothing_to_encode(tmp_path: Path) -> None:
    wanted = encoder(8)  # all are too long
    found = stored(conversations(), wanted, tmp_path)
    assert len(found.items) == 0 and found.counts() == wanted(conversations()).counts()


def test_the_error_is_that_of_one_process(tmp_path: Path) -> None:
    records = [*conversations()[:100], Comparison([], [], []), *conversations()[100:]]
    errors = []
    for processes in (1, 2):
        with pytest.raises(AttributeError) as caught:
            stored(records, encoder(), tmp_path, processes=processes)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "messages" in errors[0]
    assert not list(tmp_path.iterdir()), "nothing half done is left"


@pytest.mark.parametrize("kind", tiny.mostly_slow(["sft"], ["pretrain", "reward"]))
def test_the_trainers_numbers_do_not_change(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded, encoded and kept, and read back: the same weights, bit for bit, and the same metrics."""
    found = []
    for name, smallest in (("plain", 1 << 40), ("kept", 0), ("read back", 0)):
        monkeypatch.setattr(token_cache, "SMALL_BYTES", smallest)
        monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
        if name == "read back":
            monkeypatch.setattr(token_cache, "_build", refuse)
        settings = tiny.stage(kind, tmp_path / name, max_steps=4)
        result = STAGES[kind].run(parse(KINDS[kind], settings))
        found.append((tiny.weights(tmp_path / name / "model"), result.metrics, result.facts))
    assert found[0] == found[1] == found[2]
    assert len(entries(tmp_path / "cache")) == 2, "training and held-out records"


# -- arrays ------------------------------------------------------------------------------------------------------------

some_weights = st.sampled_from([0.0, 1.0, -0.5, 0.1, 1 / 3])
ids_of = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5)


@st.composite
def nodes_of(draw: st.DrawFn, parent: int) -> Node:
    ids = draw(ids_of)
    weights = draw(st.lists(some_weights, min_size=len(ids), max_size=len(ids)))
    actions = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Node(ids, weights, parent, actions)


@st.composite
def items_of(draw: st.DrawFn) -> list[Node]:
    return [draw(nodes_of(draw(st.integers(-1, n - 1)))) for n in range(draw(st.integers(1, 4)))]


@given(st.lists(st.lists(items_of(), max_size=4), max_size=4))
def test_arrays_give_back_what_they_were_made_from(parts: list[list[list[Node]]]) -> None:
    """Several parts laid end to end, each with a table of marks of its own."""
    import numpy as np

    pieces: dict[str, list[Any]] = {name: [] for name in token_cache.COLUMNS}
    gathering = Gathering(lambda name, array: pieces[name].append(array))
    for part in parts:
        gathering.add(to_columns(part))
    arrays = {n: np.concatenate([np.zeros(0, d), *pieces[n]]).astype(d) for n, d in token_cache.COLUMNS.items()}
    found = StoredItems(Columns(arrays, gathering.marks))
    expected = [item for part in parts for item in part]
    assert list(found) == expected and len(found) == len(expected)
    assert found[1:3] == expected[1:3]
    assert found.tokens.tolist() == [sum(len(n.ids) for n in item) for item in expected]
    assert found.weights.tolist() == [sum(sum(n.loss_weights) for n in item) for item in expected]
    if expected:
        assert found[-1] == expected[-1]
    with pytest.raises(IndexError):
        found[len(expected)]


def own_weight(records: Sequence[Document], text: Any) -> Trees:
    """Each record with a weight of its own."""
    return Trees([conversation([1, 2], [0.0, float(r.text)]) for r in records])


def test_too_many_different_weights_stay_in_memory(tmp_path: Path) -> None:
    wanted, records = Encoder(own_weight, tiny.tokenizer()), [Document(str(n)) for n in range(MARKS + 1)]
    with pytest.raises(TooManyMarks):
        to_columns(wanted(records).items)
    assert_same(stored(records, wanted, tmp_path), wanted(records))
    assert not list(tmp_path.iterdir())


# -- never stale -----------------------------------------------------------------------------------------------------------


def changed_message(records: list[Record]) -> list[Record]:
    first = records[0]
    assert isinstance(first, Conversation)
    return [replace(first, messages=[{**first.messages[0], "content": "x"}, *first.messages[1:]]), *records[1:]]  # type: ignore[list-item]


def changed_train(records: list[Record]) -> list[Record]:
    first = records[0]
    assert isinstance(first, Conversation)
    last = {**first.messages[-1], "train": not first.messages[-1].get("train", True)}
    return [replace(first, messages=[*first.messages[:-1], last]), *records[1:]]  # type: ignore[list-item]


CHANGES: dict[str, Callable[[list[Record]], list[Record]]] = {
    "a text": changed_message,
    "whether an answer is trained": changed_train,
    "tools": lambda r: [replace(r[0], tools=({"type": "function"},)), *r[1:]],  # type: ignore[call-arg, list-item]
    "the order": lambda r: [*r[1:], r[0]],
    "one more": lambda r: [*r, r[0]],
    "one less": lambda r: r[:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_records_have_another_key(change: str) -> None:
    before, after = conversations(), CHANGES[change](conversations())
    assert token_cache._digest_records(before)[0] != token_cache._digest_records(after)[0]


def test_a_margin_is_part_of_a_record() -> None:
    before = comparisons()
    after = [replace(before[0], margin=0.5), *before[1:]]  # type: ignore[call-arg]
    assert token_cache._digest_records(before)[0] != token_cache._digest_records(after)[0]


def key(wanted: Encoder) -> str:
    return token_cache._key("records", wanted)


def test_other_settings_tokenizers_and_templates_have_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny.tokenizer()
    extended, moved = tiny.tokenizer(), tiny.tokenizer()
    extended.add_tokens(["<new>"])
    moved.eos_token = "<|endoftext|>"
    found = {
        "as it is": key(encoder()),
        "max_length": key(encoder(97)),
        "function": key(replace(encoder(), function=encode_documents)),
        "no template": key(replace(encoder(), text=text)),
        "other template": key(replace(encoder(), text=ChatTemplate(text, "plain"))),
        "one more token": key(replace(encoder(), text=ChatTemplate(extended))),
        "other end": key(replace(encoder(), text=ChatTemplate(moved))),
    }
    monkeypatch.setattr(token_cache, "_code", lambda: "other code")
    found["code"] = key(encoder())
    assert len(set(found.values())) == len(found)


def test_a_template_that_writes_the_date_has_another_key_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(token_cache.date):
        @classmethod
        def today(cls) -> Any:
            return super().today().replace(year=2099)

    dated = tiny.tokenizer()
    dated.chat_template = "{{ strftime_now('%Y') }}" + template().source
    today = key(replace(encoder(), text=ChatTemplate(dated))), key(encoder())
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    tomorrow = key(replace(encoder(), text=ChatTemplate(dated))), key(encoder())
    assert today[0] != tomorrow[0] and today[1] == tomorrow[1]


def test_the_code_that_makes_trees_is_part_of_the_key() -> None:
    root = Path(token_cache.__file__).parents[1]
    read_files: list[str] = []
    original = Path.read_bytes

    def spy(self: Path) -> bytes:
        read_files.append(self.relative_to(root).as_posix())
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", spy)
        token_cache._code.__wrapped__()
    assert {"tree.py", "data/collate.py", "data/token_store.py", "text/chat_template.py"} <= set(read_files)
    assert "text/templates/chatml.jinja" in read_files


def test_the_same_tokenizer_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    """A stage saves its tokenizer with its model: the next stage finds what this one encoded."""
    fresh = tiny.tokenizer()
    before = tokenizer_digest(fresh)
    fresh("a text", truncation=True, max_length=2)
    assert tokenizer_digest(fresh) == before, "a switch that every call sets anew"
    for name in ("a", "b"):
        ChatTemplate(fresh).tokenizer.save_pretrained(tmp_path / name)
    digests = {tokenizer_digest(load_tokenizer(tmp_path / name)) for name in ("a", "b")}
    assert len(digests) == 1
    keys = {key(replace(encoder(), text=ChatTemplate(load_tokenizer(tmp_path / name)))) for name in ("a", "b")}
    assert len(keys) == 1


class SlowTokenizer:
    """One without a backend: its files are what it is."""

    def __init__(self, words: Sequence[str], place: str) -> None:
        self.words, self.place = words, place

    def save_pretrained(self, folder: str) -> list[str]:
        files = {"vocab.json": list(self.words), "tokenizer_config.json": {"name_or_path": self.place, "size": 1}}
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content), "utf-8")
        return [str(Path(folder) / name) for name in files]


def test_a_tokenizer_without_backend_is_known_by_its_files() -> None:
    one, moved, other = (SlowTokenizer("ab", "x"), SlowTokenizer("ab", "y"), SlowTokenizer("abc", "x"))
    assert tokenizer_digest(one) == tokenizer_digest(moved) != tokenizer_digest(other)


def test_keys_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets of strings have another order in each."""
    tiny.tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys; from danlu.data.collate import encode_conversations; from danlu.data import token_cache as c; "
        "from danlu.text.chat_template import ChatTemplate; from danlu.text.tokenizer import load_tokenizer; "
        "text = ChatTemplate(load_tokenizer(sys.argv[1])); "
        "print(c._key('records', c.Encoder(encode_conversations, text, {'max_length': 80})))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, check=True)
    here = key(replace(encoder(), text=ChatTemplate(load_tokenizer(tmp_path))))
    assert done.stdout.decode().strip() == here


# -- damage, killed builders, several at once ------------------------------------------------------------------------------


def truncate(entry: Path) -> None:
    path = entry / "ids.bin"
    path.write_bytes(path.read_bytes()[:-8])


def flip(entry: Path) -> None:
    path = entry / "marks.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def other_schema(entry: Path) -> None:
    index = json.loads((entry / "index.json").read_text("utf-8"))
    (entry / "index.json").write_text(json.dumps(index | {"schema": 99}), "utf-8")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file too short": truncate,
    "a bit flipped": flip,
    "a file gone": lambda entry: (entry / "node_ends.bin").unlink(),
    "the index gone": lambda entry: (entry / "index.json").unlink(),
    "the index cut": lambda entry: (entry / "index.json").write_text("{", "utf-8"),
    "an empty index": lambda entry: (entry / "index.json").write_text("{}", "utf-8"),
    "a newer schema": other_schema,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    stored(conversations(), encoder(), tmp_path)
    [entry] = entries(tmp_path)
    DAMAGE[damage](entry)
    assert load(entry) is None
    assert_same(stored(conversations(), encoder(), tmp_path), encoder()(conversations()))
    assert load(entry) is not None
    assert [p.name for p in tmp_path.iterdir()] == [entry.name]


def test_a_killed_builder_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            stored(conversations(), encoder(), tmp_path)
    assert not list(tmp_path.iterdir())
    # Killed outright, it leaves its temporary folder: never taken for an entry, and removed a day later.
    left = tmp_path / f".{'0' * 32}.abc{token_cache.PARTIAL}"
    fresh = tmp_path / f".{'0' * 32}.def{token_cache.PARTIAL}"
    for folder in (left, fresh):
        folder.mkdir()
        (folder / "ids.bin").write_bytes(b"half")
    old = time.time() - 2 * token_cache.ABANDONED_SECONDS
    for path in (left / "ids.bin", left):
        os.utime(path, (old, old))
    stored(conversations(), encoder(), tmp_path)
    assert not left.exists() and fresh.exists()


def test_several_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = token_cache._write

    def slowly(entry: Path, *rest: Any) -> None:
        made.append(entry.name)
        time.sleep(0.2)
        original(entry, *rest)

    monkeypatch.setattr(token_cache, "_write", slowly)
    found: list[Trees] = []
    threads = [
        threading.Thread(target=lambda: found.append(stored(conversations(), encoder(), tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 3
    for trees in found:
        assert_same(trees, encoder()(conversations()))


def test_without_locks_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none: then two make the same entry, and nobody is disturbed."""

    def no_lock(*_: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(token_cache.fcntl, "flock", no_lock)
    original = token_cache._replace
    first: list[int] = []

    def beaten(entry: Path, target: Path) -> None:
        shutil.copytree(entry, target)  # somebody else was quicker
        first.append(target.stat().st_ino)
        original(entry, target)

    monkeypatch.setattr(token_cache, "_replace", beaten)
    assert_same(stored(conversations(), encoder(), tmp_path), encoder()(conversations()))
    [entry] = tmp_path.iterdir()
    assert [entry.stat().st_ino] == first


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        found = stored(conversations(), encoder(), tmp_path / "file" / "cache")
    assert_same(found, encoder()(conversations()))


def test_the_oldest_go_when_the_cache_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (100, 110, 120):
        stored(conversations()[:count], encoder(), tmp_path)
    first, second, third = sorted(entries(tmp_path), key=lambda e: (e / "index.json").stat().st_mtime_ns)
    now = time.time()
    for age, entry in ((30, second), (20, third)):
        os.utime(entry / "index.json", (now - age, now - age))
    stored(conversations()[:100], encoder(), tmp_path)  # used just now
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    monkeypatch.setenv("DANLU_CACHE_GB", str(size / 1e9))
    newest = stored(conversations()[:130], encoder(), tmp_path)
    left = entries(tmp_path)
    assert first in left and second not in left
    # Even the only one does not go while it is being made; and one that is open stays readable.
    monkeypatch.setenv("DANLU_CACHE_GB", "0")
    stored(conversations()[:140], encoder(), tmp_path)
    assert len(entries(tmp_path)) == 1
    assert_same(newest, encoder()(conversations()[:130]))


# -- children ----------------------------------------------------------------------------------------------------------------


def test_children_answer_in_order_from_processes_of_their_own() -> None:
    assert list(in_parts(abs, range(-40, 0), 3)) == list(range(40, 0, -1))
    places = list(in_parts(os.readlink, ["/proc/self"] * 6, 2)) if Path("/proc/self").is_symlink() else []
    assert str(os.getpid()) not in places and len(set(places)) <= 2


def test_what_cannot_be_sent_is_done_here() -> None:
    assert list(in_parts(lambda n: (n, os.getpid()), range(3), 2)) == [(n, os.getpid()) for n in range(3)]


def test_an_error_in_a_child_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_parts(int, ["1", "2", "three", "4"], 2))


def test_a_child_that_dies_is_no_loss() -> None:
    """`os._exit` ends a child at its second part; the parent would do the part itself, and here may not."""
    assert list(in_parts(len, [b"ab", Dies(), b"abc", b""], 1 + 1)) == [2, 7, 3, 0]


class Dies:
    """Unpickling it ends any process but the one that made it."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __reduce__(self) -> Any:
        return (os._exit, (1,))

    def __len__(self) -> int:
        return 7


def test_the_rest_is_not_awaited_when_nobody_wants_it() -> None:
    begun = time.monotonic()
    found = in_parts(time.sleep, [0.0, 60.0, 60.0], 2)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 50


def test_a_template_reaches_a_child() -> None:
    """What it holds (locks, compiled templates) must not keep the work in one process."""
    import pickle

    from danlu.data.token_workers import _pickled

    sent = _pickled(encoder())
    assert sent is not None
    assert_same(pickle.loads(sent)(conversations()[:20]), encoder()(conversations()[:20]))
