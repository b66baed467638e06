"""What the README and docs/ say is so: recipes, commands, flags, links, examples."""

import ast
import importlib
import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser as get_torchrun_parser

import train
from custom_dataset import read_dataset_info
from helpers.drawn import ROOT, draw_coco
from loading.loaders import build_train_loader, build_val_loader
from loading.splits import Source, load_data
from models.architectures import ARCHITECTURES, build_model
from utils import Distributed

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES["README.md"]

# The recipes as users of torchvision's scripts know them, word for word.
RECIPES = [
    "torchrun --nproc_per_node=8 train.py --dataset coco --model fasterrcnn_resnet50_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model fasterrcnn_mobilenet_v3_large_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --weights-backbone MobileNet_V3_Large_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model fasterrcnn_mobilenet_v3_large_320_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --weights-backbone MobileNet_V3_Large_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model fcos_resnet50_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --lr 0.01 --amp --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model retinanet_resnet50_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --lr 0.01 --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model ssd300_vgg16 --epochs 120 --lr-steps 80 110 --aspect-ratio-group-factor 3 --lr 0.002 --batch-size 4 --weight-decay 0.0005 --data-augmentation ssd --weights-backbone VGG16_Weights.IMAGENET1K_FEATURES",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model ssdlite320_mobilenet_v3_large --epochs 660 --aspect-ratio-group-factor 3 --lr-scheduler cosineannealinglr --lr 0.15 --batch-size 24 --weight-decay 0.00004 --data-augmentation ssdlite --weights-backbone MobileNet_V3_Large_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco --model maskrcnn_resnet50_fpn --epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3 --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "torchrun --nproc_per_node=8 train.py --dataset coco_kp --model keypointrcnn_resnet50_fpn --epochs 46 --lr-steps 36 43 --aspect-ratio-group-factor 3 --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
]


def flags_of(command):
    """Return {flag: its values as written} of a command line; what stands before the first flag is under ''."""
    flags, current = {"": []}, ""
    for word in shlex.split(command):
        if word.startswith("--"):
            current, _, value = word.partition("=")
            assert current not in flags, f"{current} twice in {command}"
            flags[current] = [value] if value else []
        else:
            flags[current].append(word)
    return flags


def model_of(command):
    return flags_of(command)["--model"][0]


READMES = {
    model_of(line): line.strip() for line in README.splitlines() if line.startswith("    torchrun --nproc_per_node=8")
}


def test_there_are_nine_recipes_for_nine_models():
    lines = [line for line in README.splitlines() if line.startswith("    torchrun --nproc_per_node=8")]
    assert len(lines) == len(READMES) == len(RECIPES) == 9
    assert {m for m in ARCHITECTURES if not m.endswith("_v2")} == set(READMES)


@pytest.mark.parametrize("recipe", RECIPES, ids=model_of)
def test_the_readme_has_each_recipe_flag_by_flag(recipe):
    assert flags_of(READMES[model_of(recipe)]) == flags_of(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=model_of)
def test_each_recipe_builds_its_model_and_data(recipe, tmp_path):
    parser = train.get_args_parser()
    args = parser.parse_args(shlex.split(recipe)[3:])
    train.check_args(parser, args)
    root = draw_coco(tmp_path / "coco", num_keypoints=17 if args.dataset == "coco_kp" else 0)
    args.data_path, args.workers = str(root), 0
    data = load_data(train.data_source(args), ARCHITECTURES[args.model].task)
    spec = train.wanted_spec(args, data)
    assert spec.num_classes == (2 if args.dataset == "coco_kp" else 91)
    assert spec.num_keypoints == (17 if args.dataset == "coco_kp" else 0)
    model = build_model(spec)
    assert sum(p.numel() for p in model.parameters()) > 1e6
    here = Distributed(0, 0, 1, torch.device("cpu"))
    loader, sampler = build_train_loader(
        data, spec, here, batch_size=args.batch_size, workers=0, seed=0, augmentation=args.data_augmentation
    )
    images, targets = next(iter(loader))
    assert len(images) == sampler.batch_size
    assert ("masks" in targets[0]) == (ARCHITECTURES[args.model].task == "mask")
    assert len(build_val_loader(data, here, batch_size=1, workers=0)) == 6


def test_the_v2_models_have_their_recipes():
    found = {model_of(c): flags_of(c) for c in commands_in(PAGES["docs/recipes.md"]) if "_v2 " in c}
    assert set(found) == {m for m in ARCHITECTURES if m.endswith("_v2")}
    long = {
        "--epochs": ["400"], "--lr-steps": ["352", "384"], "--lr": ["0.1"], "--batch-size": ["2"],
        "--weight-decay": ["0.00004"], "--sync-bn": [], "--data-augmentation": ["lsj"],
    }  # fmt: skip
    for model in ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"):
        assert long.items() <= found[model].items()
        assert int(found[model]["--nnodes"][0]) * int(found[model]["--nproc_per_node"][0]) == 32
    retinanet = {
        "--nproc_per_node": ["8", "train.py"], "--dataset": ["coco"], "--model": ["retinanet_resnet50_fpn_v2"],
        "--weights-backbone": ["ResNet50_Weights.IMAGENET1K_V2"], "--opt": ["adamw"], "--lr": ["0.0001"],
        "--epochs": ["26"], "--lr-steps": ["16", "22"], "--weight-decay": ["0.05"], "--norm-weight-decay": ["0.0"],
        "--data-augmentation": ["multiscale"], "--sync-bn": [],
    }  # fmt: skip
    assert found["retinanet_resnet50_fpn_v2"] == {"": ["torchrun"], **retinanet}


def commands_in(text):
    """Return the command lines of a page's code blocks and code spans that run Python."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    blocks += ["\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    starts = re.compile(r"(sudo |\w+=\w+ )*(\.venv/bin/)?(python|torchrun)3? ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if starts.match(line.strip())]


SCRIPTS = ("train", "check_dataset", "predict", "score", "compare", "export", "sigmas")
DOCSTRINGS = {f"{name}.py": ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) for name in SCRIPTS}
COMMANDS = [(page, command) for page, text in {**PAGES, **DOCSTRINGS}.items() for command in commands_in(text)]


def test_all_commands_are_found():
    scripts = [word for _, command in COMMANDS for word in shlex.split(command) if word.endswith(".py")]
    assert set(scripts) >= set(DOCSTRINGS) and {page for page, _ in COMMANDS} >= set(DOCSTRINGS)
    assert scripts.count("train.py") >= 20


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_one_that_its_program_accepts(page, command):
    words = [w for w in shlex.split(command) if "=" not in w or w.startswith("-")]
    assert "..." not in command and "<" not in command, "a command must run as it stands"
    words = words[words[0] == "sudo" :]
    program, words = words[0].rpartition("/")[2], words[1:]
    if program == "torchrun":
        launch = get_torchrun_parser().parse_args(words)
        script, words = launch.training_script, launch.training_script_args
    elif words[0] == "-m":
        module = words[1]
        if module.startswith("tests."):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        else:
            assert module in ("venv", "pytest")
        return
    else:
        script, words = words[0], words[1:]
    assert (ROOT / script).is_file()
    if script.startswith("benchmarks/"):
        text = (ROOT / script).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
        return
    module = importlib.import_module(script.removesuffix(".py"))
    parser = module.get_args_parser()
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args(words)
        return
    args = parser.parse_args(words)
    if script == "train.py" and not (args.test_only and args.resume):  # a checkpoint says which model it is
        module.check_args(parser, args)
        has_weights = "--weights" in words or "--weights-backbone" in words or "_v2" in args.model
        is_meant = args.data_path == "tubes"  # the result to repeat, which says that it has none
        assert args.test_only or has_weights or is_meant, f"{page}: training from random weights, by mistake"
    elif script == "predict.py":
        module.check_args(parser, args)
    elif script == "check_dataset.py":
        module.check_data_args(parser, args)


def test_every_flag_is_explained_and_every_flag_mentioned_exists():
    options = {o for action in train.get_args_parser()._actions for o in action.option_strings if o[:2] == "--"}
    own = {o for o in options if not o.startswith("--no-")} - {"--help", "--wd", "--start_epoch"}
    explained = README + PAGES["docs/flags.md"]
    missing = sorted(option for option in own if f"`{option}" not in explained)
    assert not missing
    options |= {o for action in get_torchrun_parser()._actions for o in action.option_strings}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/**/*.py")]:
        if path.name != "test_readme.py":
            options |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text()))
    options |= {"--no-images", "--no-overlays"}  # argparse makes them
    of_others = {"--check", "--dist", "--dport", "--logdir", "--signal"}  # ruff, pytest, iptables, tensorboard, sbatch
    of_others |= {"--task", "--input-format", "--input-folder", "--category-names"}  # labelformat
    of_others |= {"--images-rel-path", "--output-format", "--output-file"}
    of_others |= {"--input-path", "--output-dir", "--save-media"}  # datumaro
    of_others |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue"}  # sbatch
    of_others |= {"--open-mode", "--output", "--job-name", "--array", "--dependency"}
    for page, text in PAGES.items():
        mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]*)", text))
        assert mentioned <= options | of_others, (page, mentioned - options - of_others)


def test_the_job_files_on_the_page_are_those_that_were_run():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGES["docs/cluster.md"], flags=re.M | re.S)
    assert len(blocks) == 3 and set(blocks) == {path.read_text() for path in ROOT.glob("docs/cluster/*.sbatch")}


def slugs_of(text):
    """Return the anchors that GitHub gives to a page's headings."""
    slugs = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{same}" if same else slug)
    return slugs


def links_of(text):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_anchor_resolves(page):
    links = [link for link in links_of(PAGES[page]) if not re.match(r"https?:", link)]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in slugs_of(target.read_text())):
            broken.append(link)
    assert links and not broken


def test_the_readme_leads_to_every_page_and_fits_one_sitting():
    assert {link.partition("#")[0] for link in links_of(README)} >= set(PAGES) - {"README.md"}
    assert len(README.splitlines()) <= 210


# The folders of the README's table.
FOLDERS = (
    "process", "pixels", "annotations", "optimization", "models", "runtime", "evaluation", "loading", "training", "report",
    "inference", "inspection", "drawing", "docs", "tests", "benchmarks",
)  # fmt: skip


def test_the_readme_names_every_root_file_and_every_folder():
    root_files = [path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "Makefile"]]
    for name in [*root_files, *(f"{folder}/" for folder in FOLDERS)]:
        assert f"`{name}`" in README, name
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(FOLDERS)
    assert all((ROOT / folder).is_dir() for folder in FOLDERS)


def test_files_that_the_pages_name_are_there():
    named = {path for text in PAGES.values() for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text)}
    assert len(named) >= 8
    assert not {path for path in named if not (ROOT / path).is_file()}


@pytest.mark.parametrize("page", ["README.md", "docs/own_data.md"])
def test_the_example_jsons_are_a_dataset_whose_mirror_map_follows_from_its_names(page, tmp_path):
    blocks = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGES[page], flags=re.M | re.S)]
    (annotation,) = (block for block in blocks if "bboxes" in block)
    (info,) = (block for block in blocks if "bboxes" not in block)
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    for split in ("train", "test"):
        for folder in ("images", "annotations"):
            (tmp_path / split / folder).mkdir(parents=True)
        pixels = np.random.default_rng(len(split)).integers(0, 256, (480, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / split / "images" / f"lot_{split}.jpg")
        (tmp_path / split / "annotations" / f"lot_{split}.json").write_text(json.dumps(annotation))
    data = load_data(Source("custom", tmp_path), "keypoint")
    assert data.label_map.num_classes == 2 and data.num_keypoints == 4
    assert data.flip_order.tolist() == [1, 0, 3, 2]
    assert read_dataset_info(tmp_path).skeleton.sigmas == (0.05,) * 4
    assert data.train.annotations.num_objects == len(annotation["bboxes"])


def test_no_example_switches_the_mirror_map_off():
    for text in PAGES.values():
        for block in re.findall(r"^```json\n(.*?)^```", text, flags=re.M | re.S):
            assert "flip_pairs" not in json.loads(block)
