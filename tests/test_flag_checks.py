"""What flags rule out: every number has a range, and a flag without effect says so."""

import logging

import pytest

import flags
from flag_checks import check_args, log_ineffective_flags

PARSER = flags.get_args_parser()
NUMBERS = {action.option_strings[-1]: action for action in PARSER._actions if action.type in (int, float)}

# Any number starts a stream of random numbers; below 0 no groups are made; the others change nothing.
ANY = {"--seed", "--aspect-ratio-group-factor", "--world-size", "--lr-step-size"}


def refusal(capsys, *words):
    """Return the line with which flags are refused, None where they are taken."""
    try:
        check_args(PARSER, PARSER.parse_args(["--device", "cpu", *words]))
    except SystemExit as exit_:
        assert exit_.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    return None


@pytest.mark.parametrize("flag", [flag for flag, action in NUMBERS.items() if action.type is float])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_no_share_or_factor_may_be_nan_infinite_or_negative(flag, value, capsys):
    line = refusal(capsys, flag, value)
    assert line is not None and flag.replace("--wd", "--weight-decay") in line


@pytest.mark.parametrize("flag", sorted({f for f, action in NUMBERS.items() if action.type is int} - ANY))
def test_no_count_may_be_negative(flag, capsys):
    line = refusal(capsys, flag, "-1")
    assert line is not None and flag.replace("_", "-") in line


RANGES = {
    "--lr -1": "--lr -1.0: expected a finite number, 0 or more",
    "--warmup-iters -1": "--warmup-iters -1: must not be negative",
    "--momentum 1": "--momentum 1.0: expected 0 to below 1",
    "--clip-grad-norm 0": "--clip-grad-norm 0.0: expected a finite number above 0",
    "--max-dets 0": "--max-dets 0: must be at least 1",
    "--lr-steps 3 -3": "--lr-steps -3: must not be negative",
    "--rpn-score-thresh 1.1": "--rpn-score-thresh 1.1: expected 0 to 1",
    "--lr 0 --warmup-iters 0 --momentum 0 --lr-gamma 0 --wd 0 --lr-steps 0 --rpn-score-thresh 1": None,
}


@pytest.mark.parametrize("words", RANGES)
def test_the_words_say_what_holds(words, capsys):
    line = refusal(capsys, *words.split())
    assert line == RANGES[words] if line is None else line.endswith(RANGES[words])


def test_what_a_checkpoint_has_of_its_own_has_no_effect_beside_resume(caplog):
    caplog.set_level(logging.INFO)
    for given in (("--weights", "COCO_V1"), ("--weights-backbone", "a.pth"), ("--start-epoch", "3")):
        for resume, is_named in (("", False), ("auto", False), ("last.pth", True)):
            caplog.clear()
            log_ineffective_flags(PARSER.parse_args(["--resume", resume, *given]))
            assert (f"{given[0]} has no effect beside --resume" in caplog.text) == is_named
