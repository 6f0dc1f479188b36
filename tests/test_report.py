"""The report is parsed as a browser would and checked for what people must be able to rely on."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fake_run import write_run

from danlu.config import KINDS
from danlu.exceptions import RunError
from danlu.pipeline.report import PURPOSES, write_report
from danlu.pipeline.report_charts import Interval, Series, lines, whiskers
from danlu.pipeline.report_ranks import rank_rows
from danlu.pipeline.report_words import duration, number, size

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '</script><script>alert("x")</script> & <img src=http://evil.example/x> 😀 中文 مرحبا \u202e'


class Page(HTMLParser):
    """Tags, attributes and text; insists on balanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.pieces))


def check(html: str) -> Page:
    """Well formed, alone in the world, and every reference inside it leads somewhere."""
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "b "} & set(page.tags)
    for tag, key, value in page.attributes:
        assert key not in ("src", "srcset", "background", "action", "xlink:href"), (tag, key)
        assert not key.startswith("on"), (tag, key)
        assert "://" not in value, (tag, key, value)
        if key == "href":
            assert value.startswith("#") and value[1:] in page.ids, value
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.startswith("#") and target[1:] in page.ids, value
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert len(page.ids) == len(set(page.ids)), "ids are not unique"
    assert not re.search(r"#fe000\d", html), "a chart kept a colour that is not the page's"
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    path = write_report(write_run(tmp_path_factory.mktemp("runs") / "quickstart"))
    assert path.name == "report.html"
    html = path.read_text("utf-8")
    return html, check(html)


def test_headline_and_results(finished: tuple[str, Page]) -> None:
    text = finished[1].text
    for words in (
        "quickstart",
        "小镇问答。",
        "14 min 11 s in all",
        "7 of 7 stages done",
        "“ppo” answers 74.1% of the held-out questions correctly; “base” 3.4%.",
        "the rubric score rises from 71.2% to 82.3%, beyond chance",
        "No gate failed; a warning: G-SHIFT.",
        "78.3% – 86.3%",
        "after quantize",
    ):
        assert words in text, words


def test_gates_stages_data_and_machine(finished: tuple[str, Page]) -> None:
    text = finished[1].text
    for words in (
        "G-STOP 100.0% of 8,000 answers end with a trained stop token",
        "found 2.0e-07 · limit 1.0e-04",
        "model: sft reward model: reward",
        "models: pretrain, sft, ppo",
        "peak memory: 812 MiB",
        "95% interval 83.4% – 90.9%",
        "Held-out perplexity6.25",
        "1.8 MiB",
        "24,000",
        "CC0-1.0",
        "not stated",
        "12 too long, 3 empty answer",
        "sha256 efefefefefef",
        "2.11.0",
        "8 CPU cores",
    ):
        assert words in text, words
    assert "config.json" not in text, "models are lineage, not data"


def test_samples_are_side_by_side_and_escaped(finished: tuple[str, Page]) -> None:
    html, page = finished
    assert "The bakery on Mill Lane opens at 7:30." in page.text
    assert "星期天图书馆下午五点关门。" in page.text and "مرحبا، لا أعرف." in page.text
    assert "</script><script>alert(1)</script> 😀" in page.text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "(empty)" in page.text


def test_charts_have_names_and_follow_the_page(finished: tuple[str, Page]) -> None:
    html, page = finished
    labels = [v for t, k, v in page.attributes if t == "svg" and k == "aria-label"]
    expected = ["Rubric score", "Correct", *["Loss", "Gradient norm"] * 2, "Pairs ranked rightly", "Loss"]
    expected += [
        "Score",
        "Wins against the start model",
        "KL to the reference, nats an answer",
        "Largest ratio",
        "Clipped tokens",
    ]
    expected += ["Engine against trainer, nats a token", "Entropy, nats per token", "Repeated 3-grams of an answer"]
    expected += ["Different n-grams of a batch", "Answer length, tokens", "Answers that end by themselves"]
    expected += ["Critic's loss", "Explained variance of the returns", "Gradient norm"]
    assert labels == expected
    assert "stroke: var(--first)" in html and "fill: var(--soft)" in html
    assert len(html) < 400_000


def test_the_health_of_a_stage_that_rolls_out(finished: tuple[str, Page]) -> None:
    html, page = finished
    for words in (
        "18 rules watched this stage and found one thing.",
        "P-CLIP-HIGH iteration 31 · corrected",
        "36% of the tokens were clipped over the last 10 iterations",
        "Likelyupdates are so large",
        "Trylower learning_rate",
        "Donelearning_rate is multiplied by 0.5",
        "Answers over time",
        "图书馆关门的时间是 60",
        "Wins against the start model70.3%95% interval 62.3% – 78.3%",
    ):
        assert words in page.text, words
    for title in ("Reward", "KL", "Ratio and clip", "Entropy and repetition", "Length and stops", "Critic", "Learning"):
        assert f"<h4>{title}</h4>" in html, title
    assert "PPO went as it should" not in page.text


def test_answers_over_time_are_side_by_side(finished: tuple[str, Page]) -> None:
    """Seven evaluations are more than fit beside one another: the first, the last and three between."""
    html = finished[0]
    part = html.split('class="dialogue over-time"')[1]
    assert re.findall(r'class="who">([^<]*)<', part) == [
        "before training · score 0",
        "iteration 20 · score 0.4",
        "iteration 30 · score 0.6",
        "iteration 40 · score 0.8",
        "iteration 60 · score 1.2",
    ]
    assert part.count("The bakery opens at") == 5 and part.count("When does the bakery open?") == 1


def test_a_stage_without_findings_went_as_it_should(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / "05-ppo" / "health.jsonl").unlink()
    (run / "05-ppo" / "samples.jsonl").unlink()
    text = check(write_report(run).read_text("utf-8")).text
    assert "PPO went as it should" in text and "Answers over time" not in text


def test_hostile_answers_and_broken_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    out = run / "05-ppo"
    rows = [
        {"step": 0, "prompt": [{"role": HOSTILE, "content": HOSTILE}], "answer": HOSTILE, "score": 1},
        {"step": 9, "prompt": [{"role": HOSTILE, "content": HOSTILE}], "answer": None},
        {"step": "x", "prompt": [{}], "answer": "bell \x07"},
        {"step": 3, "prompt": "no list"},
        {
            "step": 4,
            "prompt": [{"role": "user", "content": "nul \x00"}, "no turn"],
            "answer": "bell \x07",
            "score": "?",
        },
    ]
    (out / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{cut", "utf-8")
    (out / "health.jsonl").write_text(json.dumps({"code": HOSTILE, "seen": HOSTILE, "step": None}) + "\n{}\n", "utf-8")
    html = write_report(run).read_text("utf-8")
    page = check(html)
    assert HOSTILE in page.text and "nul ␀" in page.text and "bell ␇" in page.text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", html)


def test_changed_settings_stand_out(finished: tuple[str, Page]) -> None:
    assert re.search(r'class="changed"><dt>learning_rate</dt><dd dir="auto">0.002', finished[0])
    assert re.search(r"<div><dt>seed</dt>", finished[0])


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "twice")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_every_kind_of_stage_says_what_it_is_for(tmp_path: Path) -> None:
    assert set(PURPOSES) >= set(KINDS)
    run = write_run(tmp_path / "r")
    settings = next(run.glob("*-eval")) / "settings.yaml"
    settings.write_text(yaml.safe_dump({**yaml.safe_load(settings.read_text("utf-8")), "task": "perplexity"}), "utf-8")
    text = check(write_report(run).read_text("utf-8")).text
    assert "measures how well written texts are predicted" in text and "answers held-out questions" not in text


@pytest.mark.parametrize(
    ("done", "status", "sentence"),
    [
        (0, "done", "Not finished: 0 of 7 stages are done."),
        (1, "running", "Stage “pretrain” is running. 1 of 7 stages are done."),
        (3, "failed", "Stage “reward” failed: loss is nan at step 12. 3 of 7 stages are done."),
        (4, "interrupted", "Interrupted in stage “ppo”. 4 of 7 stages are done. The same command goes on from there."),
    ],
)
def test_unfinished_runs(tmp_path: Path, done: int, status: str, sentence: str) -> None:
    text = check(write_report(write_run(tmp_path / "r", done=done, status=status)).read_text("utf-8")).text
    assert sentence in text
    assert "No results yet: stage “eval” has not finished." in text
    assert "pending" in text


def test_a_failed_gate_is_the_headline(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", done=4)
    path = run / "04-reward" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["gates"][0] |= {"passed": False, "value": 0.52}
    path.write_text(json.dumps(manifest), "utf-8")
    text = check(write_report(run).read_text("utf-8")).text
    assert "Stopped after stage “reward”: gate G-RM does not hold. 4 of 7 stages are done." in text
    assert "This gate does not hold: G-RM." in text


def test_hints_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    rows = [{"step": s, "loss": 4 - s / 400, "eval_loss": 4 - s / 400} for s in range(100, 1100, 100)]
    (run / "03-sft" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    text = check(write_report(run).read_text("utf-8")).text
    assert "still falling at the end" in text and "SFT went as it should" not in text


def test_hostile_text_everywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a&b <i>", description=HOSTILE, models=("<b>base</b>", "$x_1$ 模型 😀", "x" * 200))
    for path in run.glob("*/manifest.json"):
        manifest = json.loads(path.read_text("utf-8"))
        manifest |= {"error": HOSTILE, "facts": {HOSTILE: [HOSTILE, {"a": None}]}, "status": "failed"}
        for item in manifest["inputs"]:
            item |= {"path": HOSTILE, "licence": HOSTILE, "dropped": {HOSTILE: 1}}
        for gate in manifest.get("gates", []):
            gate |= {"sentence": HOSTILE, "code": HOSTILE, "value": None}
        path.write_text(json.dumps(manifest), "utf-8")
    sample = {"prompt": HOSTILE, "answers": {"</td>": "half \ud83d, bell \x07, nul \x00", HOSTILE: None}}
    (run / "06-eval" / "samples.jsonl").write_text(json.dumps(sample) + "\n{broken", "utf-8")
    html = write_report(run).read_text("utf-8")
    page = check(html)
    assert HOSTILE in page.text
    assert "half ?, bell ␇, nul ␀" in page.text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", html)
    assert "a&b <i>" in page.text


def test_private_paths_are_shortened(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    html = write_report(run).read_text("utf-8")
    assert str(tmp_path) not in html


def test_sparse_manifests(tmp_path: Path) -> None:
    run = tmp_path / "sparse"
    (run / "01-sft").mkdir(parents=True)
    (run / "02-odd").mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"stages": [{"kind": "sft"}]}), "utf-8")
    (run / "01-sft" / "manifest.json").write_text(
        '{"kind": "sft", "status": "done", "table": [{"model": "m"}]}', "utf-8"
    )
    text = check(write_report(run).read_text("utf-8")).text
    assert "No metrics were logged, so there are no curves." in text
    assert "Interrupted in stage “odd”." in text


def test_overlapping_intervals_are_called_chance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    path = run / "06-eval" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["table"][2]["rubric"] = {"mean": 0.73, "low": 0.69, "high": 0.77}
    path.write_text(json.dumps(manifest), "utf-8")
    assert "goes from 71.2% to 73%: the intervals overlap" in check(write_report(run).read_text("utf-8")).text


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        write_report(tmp_path)


def test_long_curves_stay_small() -> None:
    points = [(float(i), 1.0 / i) for i in range(1, 50_001)]
    assert len(lines("k", "t", [Series("s", points, noisy=True)])) < 60_000


def test_whiskers_escape_their_labels() -> None:
    svg = whiskers(
        "k", 'a "title" <b>', [Interval("<i>&", 0.5, 0.4, 0.6), Interval("多字的模型名字很长很长", 0.1, 0.0, 0.2)]
    )
    assert "&lt;i&gt;&amp;" in svg and "<i>" not in svg and "…" in svg
    assert 'aria-label="a &#34;title&#34; &lt;b&gt;"' in svg


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.5, True, "50%"),
        (0.8234, True, "82.3%"),
        (12345.6, False, "12,346"),
        (1.0, False, "1"),
        (0.00002, False, "2.0e-05"),
        (float("nan"), False, "nan"),
        (-0.1234, False, "-0.123"),
    ],
)
def test_numbers(value: float, percent: bool, text: str) -> None:
    assert number(value, percent) == text


def test_durations_and_sizes() -> None:
    assert [duration(s) for s in (0, 3.44, 59.6, 3599.7, 3900)] == [
        "0 s",
        "3.4 s",
        "1 min 0 s",
        "1 h 0 min",
        "1 h 5 min",
    ]
    assert [size(b) for b in (12, 1536, 2**20 * 812, 2**40)] == ["12 B", "1.5 KiB", "812 MiB", "1024 GiB"]


def test_ranks_of_adalora_are_shown_layer_by_layer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "quickstart")
    path = next(run.glob("*-sft")) / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    layers = {f"model.layers.{n}.self_attn.q_proj": rank for n, rank in ((0, 5), (10, 1), (2, 3))}
    manifest["facts"] |= {"ranks": {"policy": layers | {"model.layers.0.mlp.up_proj": 4}}}
    manifest["facts"] |= {"rank_before": 48, "rank_total": 13}
    manifest["facts"] |= {"adapter_parameters_before": 9_600, "adapter_parameters": 2_600}
    path.write_text(json.dumps(manifest), "utf-8")
    text = check(write_report(run).read_text("utf-8")).text
    for words in (
        "Ranks1348 before training",
        "2,6009,600 before pruning",
        "self_attn.q_proj5 3 1 (sum 9)",
        "mlp.up_proj4 (sum 4)",
    ):
        assert words in text, words
    assert "ranks.policy" not in text
    manifest["facts"]["ranks"]["critic"] = {"model.layers.0.mlp.up_proj": 2}
    assert dict(rank_rows(manifest["facts"]))["critic: mlp.up_proj"] == "2 (sum 2)"
