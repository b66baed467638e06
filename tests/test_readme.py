"""The commands of the README are those that run."""

import re
import shlex

import pytest

import train
from helpers.drawn import ROOT, draw_coco
from loading.loaders import build_train_loader, build_val_loader
from loading.splits import load_data
from models.architectures import ARCHITECTURES, build_model
from utils import Distributed

README = (ROOT / "README.md").read_text()
RECIPES = [
    shlex.split(line)[3:] for line in README.splitlines() if line.strip().startswith("torchrun --nproc_per_node=8")
]


def test_there_are_nine_recipes_for_nine_models():
    models = [recipe[recipe.index("--model") + 1] for recipe in RECIPES]
    assert len(models) == len(set(models)) == 9
    assert {m for m in ARCHITECTURES if not m.endswith("_v2")} == set(models)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[recipe.index("--model") + 1])
def test_each_recipe_builds_its_model_and_data(recipe, tmp_path):
    parser = train.get_args_parser()
    args = parser.parse_args(recipe)
    train.check_args(parser, args)
    root = draw_coco(tmp_path / "coco", num_keypoints=17 if args.dataset == "coco_kp" else 0)
    args.data_path, args.workers = str(root), 0
    data = load_data(train.data_source(args), ARCHITECTURES[args.model].task)
    spec = train.wanted_spec(args, data)
    assert spec.num_classes == (2 if args.dataset == "coco_kp" else 91)
    assert spec.num_keypoints == (17 if args.dataset == "coco_kp" else 0)
    model = build_model(spec)
    assert sum(p.numel() for p in model.parameters()) > 1e6
    here = Distributed(0, 0, 1, train.choose_device("cpu"))
    loader, sampler = build_train_loader(
        data, spec, here, batch_size=args.batch_size, workers=0, seed=0, augmentation=args.data_augmentation
    )
    images, targets = next(iter(loader))
    assert len(images) == sampler.batch_size
    assert ("masks" in targets[0]) == (ARCHITECTURES[args.model].task == "mask")
    assert len(build_val_loader(data, here, batch_size=1, workers=0)) == 6


def test_every_flag_is_in_the_readme_and_every_flag_of_the_readme_exists():
    options = {
        option for action in train.get_args_parser()._actions for option in action.option_strings if option[:2] == "--"
    }
    options = {o for o in options if not o.startswith("--no-")} - {"--help", "--wd", "--start_epoch"}
    missing = sorted(option for option in options if f"`{option}" not in README)
    assert not missing
    mentioned = set(re.findall(r"`(--[a-z][a-z0-9-]*)", README)) - {
        "--check",
        "--nproc_per_node",
        "--max-restarts",
        "--rdzv-endpoint",
    }
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "tests" / "faults.py"]:
        options |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text()))
    mentioned = {option for option in mentioned if not option.startswith("--no-")}
    assert mentioned <= options | {"--dist", "--check"}, mentioned - options
