"""``demo.sh`` as ``make demo`` runs it, on fewer images."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, draw_coco


@pytest.mark.slow
def test_the_demo_says_how_long_it_takes_shows_losses_and_names_its_page(tmp_path):
    """In two processes from another folder; an earlier demo's results stay."""
    earlier = tmp_path / "runs" / "demo" / "report.html"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    few = ["--dataset", "coco", "--data-path", draw_coco(tmp_path / "coco"), "--epochs", "2"]
    command = ["sh", ROOT / "demo.sh", Path(sys.executable).parent, *few]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert re.search(r"about .* minutes on two idle cores", "\n".join(lines[:3]))
    text = result.stdout + result.stderr
    assert re.findall(r"Epoch: \[(\d)\] \[1/", text) == ["0", "1"]
    assert "Warning" not in text
    page = re.fullmatch(r"Done in \d+ seconds. Open this page in a browser: (\S+)", lines[-1]).group(1)
    assert page == "runs/demo-2/report.html"
    metrics = [json.loads(line) for line in (tmp_path / "runs/demo-2/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics if "bbox" in line] == [1], "figures before the last epoch say little"
    assert "<html" in (tmp_path / page).read_text()
    assert earlier.read_text() == "earlier"
