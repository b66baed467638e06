"""The page stands alone, shows the files' numbers, and is made from whatever is there."""

import json
import re
from html.parser import HTMLParser

import pytest

from helpers.browser import errors, open_browser, settle, show
from helpers.drawn import draw_coco
from helpers.near_truth import evaluate_once
from loading.splits import Source, load_data
from report.page import write_page
from runtime.run_folder import read_summary
from runtime.trackers import read_metrics

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and tables, and notes what is closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.tags, self.rows = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two epochs of a keypoint model, the first one better."""
    root = tmp_path_factory.mktemp("page")
    draw_coco(root / "people", num_keypoints=17)
    data = load_data(Source("coco_kp", root / "people", cache_dir=root / "cache"), "keypoint", test_only=True)
    for epoch, noise in enumerate((1.0, 3.0)):
        evaluate_once(data, root / "run", "keypoint", epoch=epoch, noise=noise, seed=epoch, is_best=epoch == 0)
    return root / "run"


def content_of(text):
    return json.loads(re.search(r'<script type="application/json" class="v-content">(.*?)</script>', text, re.S)[1])


@pytest.mark.slow
def test_the_worst_and_best_images_are_looked_at_in_a_browser(run_dir, tmp_path):
    summary = read_summary(run_dir / "best")
    examples = summary["examples"]
    pictures = content_of((run_dir / "report.html").read_text())["pictures"]
    assert [picture["name"] for picture in pictures] == [example["file_name"] for example in examples]
    with open_browser(tmp_path / "profile") as browser:
        show(browser, run_dir / "report.html")
        groups = [heading.text for heading in browser.find_elements("class name", "v-group")]
        assert groups == ["Worst images", "Best images"] and not errors(browser)
        cards = browser.find_elements("class name", "v-card")
        assert len(cards) == len(examples)
        counts = [list(map(int, re.findall(r"\d+", card.find_element("class name", "v-count").text))) for card in cards]
        assert counts == [[e["detections"], e["objects"]] for e in examples]
        # Down to the slider's end there are more: all that was found from its lowest score on.
        slider = browser.find_element("class name", "v-threshold")
        slider.send_keys("\ue011")  # Home
        settle(browser)
        objects = [object_ for picture in pictures for object_ in picture["objects"] if object_[1] is not None]
        assert f"{len(objects)} detected" in browser.find_element("class name", "v-total").text
        assert len(objects) > sum(e["detections"] for e in examples) and min(o[1] for o in objects) >= 0.05
        show(browser, run_dir / "report.html", 390, 844, at="picture-2")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.find_element("class name", "v-quiet").text.startswith(f"F1 {examples[1]['f1']:.2f}: ")
        browser.switch_to.active_element.send_keys("j")
        settle(browser)
        assert browser.find_element("class name", "v-place").text == f"3 of {len(examples)}"


def shown(value):
    return "n/a" if value is None else f"{value:.4f}"


def test_the_page_is_well_formed_and_needs_nothing_else(run_dir):
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.wrong and not page.open
    assert not [attrs for tag, attrs in page.tags if tag in ("link", "iframe") or (tag == "script" and "src" in attrs)]
    assert not re.search(r"""(https?:)?//[a-z]|url\(|@import""", re.sub(r'"data:[^"]*"', "", text))
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img" and "src" in attrs]
    sources += [picture["source"] for picture in content_of(text)["pictures"]]
    assert len(sources) >= 8 and all(source.startswith("data:image/") for source in sources)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    targets = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert set(targets) <= {attrs.get("id") for _, attrs in page.tags} and len(targets) >= 5
    assert len(text) < 8e6


def test_the_pages_numbers_are_those_of_the_best_epoch_in_metrics(run_dir):
    best = read_metrics(run_dir)[0]
    assert best["bbox"]["AP"] > read_metrics(run_dir)[1]["bbox"]["AP"]
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    for kind in ("bbox", "keypoints"):
        low, high = best["intervals"][kind]["AP"]
        assert f'<div class="large">{shown(best[kind]["AP"])}</div>' in text
        assert ["AP", shown(best[kind]["AP"]), f"{shown(low)} to {shown(high)}"] in page.rows
        for name in ("AP50", "AP_medium", "AR_large"):
            assert any(row[:2] == [name, shown(best[kind][name])] for row in page.rows)
        figures, f1 = best["per_class"][kind]["person"], best["best_f1"][kind]["person"]
        columns = [c for c in ("AP", "AP50", "AP75", "AR", "AP_small", "AP_medium", "AP_large") if c in figures]
        objects = str(read_summary(run_dir / "best")["objects"][kind]["person"])
        expected = ["person", objects, *(shown(figures[c]) for c in columns)]
        expected += [shown(f1[key]) for key in ("f1", "precision", "recall", "score")]
        assert expected in page.rows
    for name, row in best["keypoint_errors"].items():
        assert [name, str(row["labelled"]), *(shown(v) for v in list(row.values())[1:])] in page.rows
    newest = read_metrics(run_dir)[1]
    rows = {row[0]: row[1:] for row in page.rows if row and "epoch" in row[0]}
    assert rows["best epoch, 0"][1] == shown(best["keypoints"]["AP"])
    assert rows["newest epoch, 1"][1] == shown(newest["keypoints"]["AP"])


@pytest.mark.parametrize("content", [None, "{broken", "[1]", '{"command": "a --b<c>", "args": {"lr": 0.02}}'])
def test_the_page_is_made_from_whatever_is_there(content, tmp_path):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    write_page(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "No evaluation yet." in text and not Page(text).wrong
    assert ("a --b&lt;c&gt;" in text) == (content is not None and "command" in content)


def test_a_damaged_line_of_metrics_is_left_out(run_dir, tmp_path):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, lines[0][:50]]))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0, 1]


def test_validation_losses_stand_beside_those_of_training(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("report.plots.plot_lines", lambda epochs, lines, **_: drawn.append((epochs, lines)) or b"")
    lines = [{"epoch": 0, "train": {"loss": 2.0, "lr": 0.1}, "val_loss": {"loss": 3.0}}]
    lines += [{"epoch": 1, "train": {"loss": 1.0, "lr": 0.1}}, {"epoch": None, "train": {}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(tmp_path)
    assert ([0, 1], {"loss": [2.0, 1.0], "validation": [3.0, None]}) in drawn
    assert ([0, 1], {"lr": [0.1, 0.1]}) in drawn
