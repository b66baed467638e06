"""What --help says: a plain sentence per flag, no default that says nothing, no flag without effect."""

import argparse
import logging
import re

import pytest

import check_dataset
import compare
import export
import flag_checks
import flags
import predict
import score
import sigmas


def parsers_of(name, parser):
    """A command's parser and those of its own commands."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {f"{name} {command}": own for command, own in action.choices.items()}
    return found


PARSERS = {
    name: parser
    for command, module in {
        "train": flags, "score": score, "predict": predict, "export": export, "compare": compare, "sigmas": sigmas,
        "check_dataset": check_dataset,
    }.items()
    for name, parser in parsers_of(command, module.get_args_parser()).items()
}  # fmt: skip

# A sentence begins with what the flag does.
VERBS = {
    "add", "allow", "also", "average", "batch", "begin", "build", "change", "check", "compare", "compile", "compute",
    "continue", "count", "cut", "decode", "divide", "draw", "drop", "end", "evaluate", "export", "give", "go", "keep", "learn",
    "leave", "let", "load", "lower", "measure", "multiply", "paste", "print", "pull", "raise", "read", "refuse", "resize",
    "save", "score", "search", "show", "shrink", "start", "stop", "synchronize", "take", "train", "update", "use", "write",
}  # fmt: skip

HIDDEN = {"--world-size": ["8"], "--backend": ["tensor"], "--use-v2": [], "--lr-step-size": ["3"]}


def visible(parser):
    return [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
    ]


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_says_in_a_sentence_what_it_does(name):
    for action in visible(PARSERS[name]):
        flag = (action.option_strings or [action.dest])[-1]
        assert action.help, f"{name} {flag} has no help"
        sentence = re.split(r"; default| \(default", action.help)[0]
        words = sentence.split()
        assert words[0] in VERBS, f"{name} {flag}: {action.help}"
        assert len(words) >= 4 and not sentence.endswith("."), f"{name} {flag}: {action.help}"


@pytest.mark.parametrize("name", PARSERS)
def test_defaults_that_say_nothing_are_left_out_and_others_are_shown(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = PARSERS[name].format_help()
    assert not re.search(r"\(default: (None|False|)\)", text)
    for action in visible(PARSERS[name]):
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            assert f"{action.help} (default: {action.default})" in " ".join(text.split())


@pytest.mark.parametrize("name", PARSERS)
def test_paths_and_models_have_a_word_of_their_own(name):
    for action in visible(PARSERS[name]):
        is_path = re.search(
            r"path|_dir$|images$|annotat|checkpoint$|output|json|weights|^model$|resume$|truth", action.dest
        )
        if is_path and action.nargs != 0:
            assert action.metavar and action.metavar.isupper(), f"{name} {action.dest}"


def test_models_are_listed_once():
    text = PARSERS["train"].format_help()
    assert len(re.findall(r"\bfcos_resnet50_fpn\b", text)) == 1


@pytest.mark.parametrize("flag", HIDDEN)
def test_a_flag_without_effect_is_not_in_the_help_and_says_so_when_given(flag, caplog):
    caplog.set_level(logging.INFO)
    parser = flags.get_args_parser()
    assert flag not in parser.format_help()
    flag_checks.log_ineffective_flags(parser.parse_args([]))
    assert not caplog.records
    flag_checks.log_ineffective_flags(parser.parse_args([flag, *HIDDEN[flag]]))
    assert flag in caplog.text and re.search("no effect|change nothing", caplog.text)
