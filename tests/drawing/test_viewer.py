"""The page of pictures in a real browser: what is on the screen is what the files say, and follows the controls."""

import html
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import predict
from drawing.pictures import Drawn
from drawing.viewer import ViewerSettings, page_jpeg, viewer_fragment, viewer_picture, write_viewer_page
from helpers.browser import errors, open_browser, settle, show
from helpers.shaken import limit_proposals, shaken_checkpoint
from helpers.thin import use_thin_models
from loading.shapes_dataset import ShapeDrawer, shapes_annotations
from pixels.masks import MaskBlock

EVIL = '<img src=x onerror="window.evil=1">'
EVIL_FILE = "photos/a</script><script>window.evil=2</script>&amp;'\" #1%20?.png"
OBJECTS = "return [...document.querySelectorAll('.v-large .v-object')].filter(g => g.getClientRects().length).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What predict.py leaves for six drawn pictures, of a thin model."""
    root = tmp_path_factory.mktemp("results")
    (root / "photos").mkdir()
    for n in range(6):
        Image.fromarray(ShapeDrawer("val").read(shapes_annotations("val", 6), n)).save(root / "photos" / f"{n}.png")
    with pytest.MonkeyPatch.context() as patch:
        use_thin_models(patch)
        limit_proposals(patch)
        checkpoint = shaken_checkpoint(root / "a.pth", "keypointrcnn_resnet50_fpn", score_threshold=0.3)
        flags = [root / "photos", "--checkpoint", checkpoint, "--output-dir", root / "out", "--workers", 0]
        assert predict.run([*map(str, flags), "--device", "cpu"]) == 0
    return root / "out"


def records_of(results):
    return json.loads((results / "predictions.json").read_text())


def settings(names, **changes):
    values = {"links": [(0, 1)], "lowest": 0.1, "start": 0.1, "note": "Nothing below 0.1."}
    return ViewerSettings(names, **{**values, **changes})


def made_page(folder, pictures, names, **changes):
    write_viewer_page(folder / "index.html", "Made", "of nothing", settings(names, **changes), pictures)
    return folder / "index.html"


def drawn(boxes, ids, **others):
    return Drawn(np.array(boxes, dtype=float).reshape(-1, 4), [""] * len(ids), np.array(ids, dtype=int), **others)


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """A page with one picture, in which one object has a mask with a hole and three keypoints, one not labelled."""
    folder = tmp_path_factory.mktemp("ring")
    y, x = np.mgrid[:120, :160]
    mask = (((x - 80) ** 2 + (y - 60) ** 2 < 50**2) & ((x - 90) ** 2 + (y - 60) ** 2 > 20**2)).astype(np.uint8)
    points = np.array([[[110.0, 80.0, 2], [150.0, 100.0, 1], [0, 0, 0]]])
    found = drawn([[70, 30, 171, 131]], [1], masks=[MaskBlock(40, 20, mask)], keypoints=points)
    (folder / "a.jpg").write_bytes(page_jpeg(np.zeros((200, 300, 3), np.uint8)))
    picture = viewer_picture("a.jpg", "a.png", (200, 300), found, np.array([0.9]), truth=found)
    return made_page(folder, [picture], {1: "ring", 2: "other"}), np.pad(mask, ((20, 60), (40, 100))).astype(bool)


def find(browser, name):
    return browser.find_element("class name", f"v-{name}")


def press(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)
    settle(browser)


def place(browser):
    return find(browser, "place").text


def slide(browser, to):
    """Move the slider as a hand does."""
    from selenium.webdriver.common.keys import Keys

    slider = find(browser, "threshold")
    steps = round((to - float(slider.get_attribute("value"))) * 100)
    slider.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))
    settle(browser)
    assert float(slider.get_attribute("value")) == pytest.approx(to)


@pytest.mark.slow
def test_what_is_shown_follows_the_slider(browser, results):
    records = records_of(results)
    show(browser, results / "index.html", at="picture-1")
    assert place(browser) == "1 of 6" and "Nothing below 0.3 was kept" in find(browser, "note").text
    for threshold in (0.3, 0.4, 0.37, 1.0, 0.3):
        slide(browser, threshold)
        kept = [record for record in records if record["score"] >= threshold]
        pictures = len({record["image_id"] for record in kept})
        assert browser.execute_script(OBJECTS) == sum(record["image_id"] == 1 for record in kept)
        assert find(browser, "total").text == f"{len(kept)} object{'s' * (len(kept) != 1)} in {pictures} of 6 pictures"
        assert find(browser, "value").text == f"{threshold:g}"
    scores = [record["score"] for record in records if record["image_id"] == 1]
    assert min(scores) < 0.37 < max(scores) < 1 and not errors(browser)


@pytest.mark.slow
def test_classes_are_switched_off_and_counts_follow(browser, results):
    records = records_of(results)
    names = {c["id"]: c["name"] for c in json.loads((results / "images.json").read_text())["categories"]}
    classes = [names[record["category_id"]] for record in records]
    show(browser, results / "index.html")
    rows = browser.find_elements("css selector", ".v-list li")
    shown = {row.find_element("class name", "v-class").text: row for row in rows}
    assert len(shown) == len(set(classes)) > 1
    for name, row in shown.items():
        assert row.find_element("class name", "v-number").text == str(classes.count(name))
    first = next(iter(shown))
    shown[first].find_element("tag name", "input").click()
    settle(browser)
    assert find(browser, "total").text.startswith(f"{len(classes) - classes.count(first)} object")
    cards = browser.find_elements("css selector", ".v-card .v-count")
    for card, image_id in zip(cards, range(1, 7)):
        left = [r for r in records if r["image_id"] == image_id and names[r["category_id"]] != first]
        assert card.text == f"{len(left)} object{'s' * (len(left) != 1)}"
    find(browser, "none").click()
    settle(browser)
    assert find(browser, "total").text == "0 objects in 0 of 6 pictures"
    find(browser, "switch-full").click()
    settle(browser)
    assert not any(card.is_displayed() for card in cards)
    find(browser, "all").click()
    settle(browser)
    assert sum(card.is_displayed() for card in cards) == len({record["image_id"] for record in records})


@pytest.mark.slow
def test_keys_step_through_the_pictures(browser, results):
    from selenium.webdriver.common.keys import Keys

    show(browser, results / "index.html")
    press(browser, "j")
    press(browser, "j")
    press(browser, Keys.ENTER)
    assert place(browser) == "2 of 6" and not find(browser, "grid").is_displayed()
    for key, expected in (("j", 3), (Keys.ARROW_RIGHT, 4), ("k", 3), (Keys.ARROW_LEFT, 2), ("k", 1), ("k", 1)):
        press(browser, key)
        assert place(browser) == f"{expected} of 6"
        assert browser.execute_script(OBJECTS) == sum(r["image_id"] == expected for r in records_of(results))
    find(browser, "threshold").send_keys(Keys.ARROW_RIGHT)  # moves the slider, not the picture
    settle(browser)
    assert place(browser) == "1 of 6" and find(browser, "value").text == "0.31"
    press(browser, Keys.ESCAPE)
    assert find(browser, "grid").is_displayed() and not find(browser, "large").is_displayed()
    assert browser.switch_to.active_element.get_attribute("data-index") == "0"
    press(browser, Keys.ENTER)
    browser.back()  # as on a phone
    settle(browser)
    assert find(browser, "grid").is_displayed()


def swipe(browser, by, down=0):
    """Move a finger over the large picture."""
    box = find(browser, "frame").rect
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x + by, "y": y + down}]),
        ("touchEnd", []),
    ):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(browser)


@pytest.mark.slow
def test_fingers_step_through_the_pictures(browser, results):
    show(browser, results / "index.html", 390, 844, at="picture-2")
    for by, down, expected in ((-100, 10, 3), (-100, 0, 4), (120, 0, 3), (-20, 0, 3), (-60, 200, 3)):
        swipe(browser, by, down)
        assert place(browser) == f"{expected} of 6"


@pytest.mark.slow
def test_masks_and_keypoints_lie_where_they_were_found(browser, ring):
    page, mask = ring
    show(browser, page, at="picture-1")
    inside, box, dots, picture, size = browser.execute_script("""
        const object = document.querySelector('.v-large .v-object:not(.v-truth)'), svg = object.ownerSVGElement;
        const area = object.querySelector('.v-area'), rows = [];
        for (let y = 0; y < 200; y++) {
          let row = '';
          for (let x = 0; x < 300; x++) row += Number(area.isPointInFill(new DOMPoint(x + 0.5, y + 0.5)));
          rows.push(row);
        }
        const onScreen = (x, y) => { const p = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM()); return [p.x, p.y]; };
        const path = object.querySelector('.v-dots').getAttribute('d');
        const img = document.querySelector('.v-picture').getBoundingClientRect();
        const box = object.querySelector('.v-box').getBoundingClientRect();
        return [rows, [box.left, box.top, box.right, box.bottom],
          [...path.matchAll(/M(\\S+) (\\S+?)h/g)].map((m) => onScreen(Number(m[1]), Number(m[2]))),
          [img.left, img.top, img.width, img.height],
          [document.querySelector('.v-picture').naturalWidth, document.querySelector('.v-picture').naturalHeight]];
    """)
    assert size == [300, 200]
    filled = np.array([[c == "1" for c in row] for row in inside])
    assert (filled ^ mask).sum() < 0.03 * mask.sum() and abs(int(filled.sum()) - int(mask.sum())) < 0.02 * mask.sum()
    assert not filled[80, 130]  # the hole
    left, top, width, height = picture
    assert width / height == pytest.approx(1.5, rel=0.01) and width > 500
    expected = [[left + x * width / 300, top + y * height / 200] for x, y in ((110, 80), (150, 100))]
    np.testing.assert_allclose(dots, expected, atol=0.5)
    scale = np.array([width / 300, height / 200] * 2)
    np.testing.assert_allclose(box, np.array([70, 30, 171, 131]) * scale + [left, top, left, top], atol=0.5)


@pytest.mark.slow
def test_annotated_objects_look_different_and_have_a_switch(browser, ring):
    show(browser, ring[0], at="picture-1")
    looks = browser.execute_script("""
        return [...document.querySelectorAll('.v-large .v-object')].map((g) => {
          const style = getComputedStyle(g.querySelector('.v-box.v-over'));
          return [g.classList.contains('v-truth'), style.stroke, style.strokeDasharray];
        });
    """)
    (_, truth, dashes), (_, found, solid) = sorted(looks, key=lambda look: not look[0])
    assert truth != found and dashes != solid == "none"
    assert find(browser, "total").text == "1 detected, 1 annotated in 1 of 1 pictures"
    slide(browser, 0.95)
    assert find(browser, "total").text == "0 detected, 1 annotated in 1 of 1 pictures"
    find(browser, "switch-truth").click()
    settle(browser)
    assert browser.execute_script(OBJECTS) == 0
    slide(browser, 0.1)
    find(browser, "switch-boxes").click()
    settle(browser)
    box = browser.find_element("css selector", ".v-large .v-object:not(.v-truth) .v-box")
    assert browser.execute_script(OBJECTS) == 1 and not box.is_displayed()


@pytest.mark.slow
def test_names_from_outside_are_text(browser, tmp_path):
    (tmp_path / "100% #1.jpg").write_bytes(page_jpeg(np.full((20, 30, 3), 200, np.uint8)))
    picture = viewer_picture("100% #1.jpg", EVIL_FILE, (20, 30), drawn([[1, 1, 9, 9]], [1]), np.array([0.5]), note=EVIL)
    page = made_page(tmp_path, [picture], {1: EVIL, 2: "</script>"}, note=EVIL)
    show(browser, page, at="picture-1")
    assert browser.execute_script("return window.evil") is None and not errors(browser)
    assert browser.execute_script("return document.querySelector('.v-picture').naturalWidth") == 30
    assert find(browser, "class").text == EVIL and f"{EVIL} 0.50" in find(browser, "names").text
    assert browser.find_element("css selector", ".v-caption b").text == EVIL_FILE
    assert browser.find_element("css selector", ".v-caption .v-quiet").text == EVIL
    assert len(browser.find_elements("css selector", ".viewer script")) == 1


def test_a_page_holds_names_as_json_that_ends_no_script():
    picture = viewer_picture("a.jpg", EVIL_FILE, (20, 30), drawn([[1, 1, 9, 9]], [1]), np.array([0.5]))
    text = viewer_fragment(settings({1: EVIL, 2: "<!--<script>"}), [picture])
    assert text.count("<script") == text.count("</script>") == 2 and "onerror" in text and "<img src" not in text
    content = json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', text, re.S)[1])
    assert content["pictures"][0]["name"] == EVIL_FILE and content["classes"]["1"][0] == EVIL


@pytest.mark.parametrize("title", [EVIL, "a</title>b", "100 {viewer} %s"])
def test_titles_are_text(title, tmp_path):
    write_viewer_page(tmp_path / "a.html", title, title, settings({1: "a"}), [])
    text = (tmp_path / "a.html").read_text()
    assert text.count(html.escape(title)) == 3 and title in html.unescape(text)
    assert title == html.escape(title) or title not in text


@pytest.mark.parametrize(
    ("score", "threshold"), [(0.3, 0.3), (0.29999999, 0.3), (0.57, 0.57), (0.99999, 1.0), (1.0, 1.0)]
)
def test_a_score_is_at_a_threshold_of_the_page_exactly_where_it_was(score, threshold):
    plain = json.loads(viewer_picture("a.jpg", "a", (9, 9), drawn([[1, 1, 9, 9]], [1]), np.array([score])))
    assert (plain["objects"][0][1] >= threshold) == (score >= threshold)


@pytest.mark.slow
def test_a_thousand_pictures_are_shown_at_once_and_loaded_one_by_one(browser, tmp_path):
    (tmp_path / "0.jpg").write_bytes(page_jpeg(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)))
    found = drawn([[10.0 * k, 5, 10.0 * k + 30, 60] for k in range(20)], [1] * 20)
    pictures = []
    for n in range(1, 1001):
        os.link(tmp_path / "0.jpg", tmp_path / f"{n}.jpg")
        pictures.append(viewer_picture(f"{n}.jpg", f"{n}.png", (300, 400), found, np.linspace(0.9, 0.2, 20)))
    page = made_page(tmp_path, pictures, {1: "a"})
    show(browser, page)
    assert find(browser, "total").text == "20000 objects in 1000 of 1000 pictures"
    loaded = "return [...document.images].filter((image) => image.naturalWidth).length"
    assert 5 < browser.execute_script(loaded) < 80
    with_marks = "return [...document.querySelectorAll('.v-card svg')].filter((svg) => svg.children.length).length"
    assert 5 < browser.execute_script(with_marks) < 60
    slide(browser, 0.5)
    seconds = browser.execute_async_script("""
        const done = arguments[0], slider = document.querySelector('.v-threshold'), started = performance.now();
        slider.value = 0.8;
        slider.dispatchEvent(new Event('input'));
        requestAnimationFrame(() => setTimeout(() => done((performance.now() - started) / 1000)));
    """)
    kept = int((np.linspace(0.9, 0.2, 20) >= 0.8).sum()) * 1000
    assert find(browser, "total").text == f"{kept} objects in 1000 of 1000 pictures" and seconds < 5
    for _ in range(30):
        browser.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
        settle(browser)
        if len(browser.find_elements("class name", "v-card")) == 1000:
            break
    assert len(browser.find_elements("class name", "v-card")) == 1000
    assert browser.execute_script(with_marks) < 60


@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser, results, colours):
    for at in ("", "picture-2"):
        show(browser, results / "index.html", 390, 844, at=at, colours=colours)
        width, wanted, ground = browser.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        )
        assert width == wanted == 390
        assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (colours == "dark")
    small = browser.execute_script("""
        return [...document.querySelectorAll('button, summary, input')].filter((e) => e.getClientRects().length)
          .map((e) => [e.className, (e.closest('label') ?? e).getBoundingClientRect().height]).filter((e) => e[1] < 24);
    """)
    assert not small
    assert not find(browser, "options").get_attribute("open")
    find(browser, "options").find_element("tag name", "summary").click()
    settle(browser)
    assert find(browser, "list").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_all_controls_have_names_for_those_who_do_not_see_them(browser, ring):
    for at in ("", "picture-1"):
        show(browser, ring[0], at=at)
        for control in browser.find_elements("css selector", "button, input, summary"):
            if control.is_displayed():
                assert re.search("[a-z]{2}", control.accessible_name), control.get_attribute("outerHTML")
