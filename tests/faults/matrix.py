"""The fault matrix: real kills, signals and broken disks, and after each of them a run that goes on to the last bit.

    python -m tests.faults.matrix                                # everything, about an hour of two cores
    python -m tests.faults.matrix matrix --instants 1 --models ssdlite320_mobilenet_v3_large
    python -m tests.faults.matrix writes restarts                # SIGKILL inside a checkpoint write; restarts of torchrun
    FAULT_PATIENCE=60 python -m tests.faults.matrix              # on a machine that is busy: waits of 60 s instead of 20

A campaign is one run of two gloo processes that meets all faults in a random order, each at a random instant, and is
continued with ``--resume auto`` after each. Every step that any of its processes computes must have the losses (by
hex) of the same step in a run without faults, and the weights at the end its SHA-256.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults.jobs import HANG_SECONDS, Job, children, lives, loading_processes, send, start  # noqa: E402
from faults.writes import count_torn_writes  # noqa: E402
from helpers.drawn import draw_coco  # noqa: E402

MODELS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")
SAVE_EVERY = 2
NUM_IMAGES = 24

PEER_GONE = "another process of this run has ended or does not answer"


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: With its number in the fault list.
        inject: Does it; returns the text that the log must show, or None.
        codes: Exit codes of the processes (or of torchrun) that are right.
        moment: Event after which it happens.
        torchrun: Flags of torchrun; None starts the two processes directly.
        again: How many steps may be computed again.
        env: For the processes.
        prefix: Of their command lines.
    """

    name: str
    inject: Callable[[Job, random.Random], str | None]
    codes: tuple[int, ...]
    moment: str = "step"
    torchrun: tuple[str, ...] | None = None
    again: int = SAVE_EVERY
    env: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()


def newest(job):
    return job.out / "weights" / "checkpoint.pth"


def kill_process(job, rng):
    send(job.pids()[rng.randrange(2)], signal.SIGKILL)
    return PEER_GONE


def kill_and_let_restart(job, rng):
    """Under torchrun with --max-restarts: wait until the job has come back by itself, then end it."""
    before = set(job.pids().values())
    killed_at = time.time()
    send(job.pids()[rng.randrange(2)], signal.SIGKILL)
    if job.wait_for(lambda: any(s["pid"] not in before for s in job.steps()), HANG_SECONDS):
        job.recovered_in = next(s["time"] for s in job.steps() if s["pid"] not in before) - killed_at
        job.restarts = max(int(e["restarts"]) for e in job.events("start"))
    send(job.processes[0].pid, signal.SIGTERM)
    return


def kill_in_save(job, rng):
    job.wait_for(lambda: any(newest(job).parent.glob("*.tmp")))
    time.sleep(rng.random() * 0.1)
    send(job.pids()[0], signal.SIGKILL)
    return


def stop_launcher(job, rng):
    send(job.processes[0].pid, signal.SIGTERM)
    return "asked to stop: "


def stop_process(job, rng):
    send(job.pids()[rng.randrange(2)], signal.SIGTERM)
    return "asked to stop: "


def stop_in_start(job, rng):
    stop_process(job, rng)
    return "asked to stop: |stopped by SIGTERM"


def stop_in_save(job, rng):
    job.wait_for(lambda: any(newest(job).parent.glob("*.tmp")))
    return stop_process(job, rng)


def stop_everything(job, rng):
    """As schedulers do: every process of the job gets the signal, loading processes too."""
    for pid in job.pids().values():
        for member in [*children(pid), pid]:
            send(member, signal.SIGTERM)
    return "asked to stop: "


def interrupt(job, rng):
    for process in job.processes:
        os.killpg(process.pid, signal.SIGINT)
    return "asked to stop: "


def interrupt_twice(job, rng):
    for _ in range(2):
        interrupt(job, rng)
        time.sleep(0.1)
    return


def kill_launcher(job, rng):
    pids = [pid for pid in job.pids().values() if lives(pid)]
    pids += [child for pid in pids for child in children(pid)]
    send(job.processes[0].pid, signal.SIGKILL)
    end = time.time() + 15
    while any(map(lives, pids)) and time.time() < end:
        time.sleep(0.05)
    assert not any(map(lives, pids)), "orphans of torchrun live on"
    return


def fill_disk(job, rng):
    """A limit of the file size stands in for the full disk; the training goes on until it is asked to stop."""
    pid = job.pids()[0]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    job.wait_for(lambda: "cannot write checkpoint" in job.log())
    count = len(job.steps())
    job.wait_for(lambda: len(job.steps()) > count)
    send(pid, signal.SIGTERM)
    return "NOT saved"


def _kill_all(job):
    for pid in job.pids().values():
        send(pid, signal.SIGKILL)


BROKEN = (b"", b"\0" * 5000, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None)


def break_newest(job, rng):
    """The newest checkpoint becomes empty, zeros, a web page, a git-lfs pointer, or is cut off."""
    _kill_all(job)
    job.end()
    if newest(job).with_name("checkpoint_previous.pth").exists():
        kind, data = rng.choice(BROKEN), newest(job).read_bytes()
        replacement = newest(job).with_name("broken")
        replacement.write_bytes(data[: rng.randrange(len(data))] if kind is None else kind)
        replacement.replace(newest(job))  # not in place: the file may have a second name
    return


def flip_bit(job, rng):
    _kill_all(job)
    job.end()
    if newest(job).with_name("checkpoint_previous.pth").exists():
        data = bytearray(newest(job).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        replacement = newest(job).with_name("broken")
        replacement.write_bytes(data)
        replacement.replace(newest(job))
    return


def nothing(text):
    return lambda job, rng: text


def on_loading_process(number):
    def inject(job, rng):
        workers = loading_processes(job.pids()[rng.randrange(2)])
        job.stopped = workers if number == signal.SIGSTOP else []
        for worker in workers:
            send(worker, number)
        return "a loading process has died" if number == signal.SIGKILL else r"DataLoader timed out|Timeout \(0:"

    return inject


def use_up_files(job, rng):
    pid = job.pids()[rng.randrange(2)]
    count = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, count))
    return


def stop_process_dead(job, rng):
    """A process that no longer answers: the other one gives up after its time is over."""
    rank = rng.randrange(2)
    send(job.pids()[rank], signal.SIGSTOP)
    job.wait_for(lambda: job.processes[1 - rank].poll() is not None, HANG_SECONDS)
    send(job.pids()[rank], signal.SIGKILL)
    return PEER_GONE


STANDALONE = ("--standalone",)
NO_MEMORY = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"', "sh")

FAULTS = (
    Fault("P1 SIGKILL of a process", kill_process, (-9, 1)),
    Fault("P2 the same, torchrun restarts", kill_and_let_restart, (1,), torchrun=(*STANDALONE, "--max-restarts=5")),
    Fault("P3 SIGKILL while a checkpoint is written", kill_in_save, (-9, 1)),
    Fault("P4 SIGTERM to torchrun", stop_launcher, (1,), torchrun=STANDALONE, again=0),
    Fault("P5 SIGTERM to one process", stop_process, (0,), again=0),
    Fault("P5 SIGTERM to every process", stop_everything, (0,), again=0),
    Fault("P6 Ctrl-C", interrupt, (0,), again=0),
    Fault("P6 Ctrl-C twice", interrupt_twice, (130, 1, 0)),
    Fault("P7 SIGTERM in start-up", stop_in_start, (0,), moment="data", again=0),
    Fault("P7 SIGTERM in an evaluation", stop_process, (0,), moment="evaluation", again=0),
    Fault("P7 SIGTERM while a checkpoint is written", stop_in_save, (0,), again=0),
    Fault("P8 SIGKILL of torchrun", kill_launcher, (-9,), torchrun=STANDALONE),
    Fault("P9 full disk", fill_disk, (0, 1), again=SAVE_EVERY + 6),
    Fault("P10 newest checkpoint broken", break_newest, (-9,), again=2 * SAVE_EVERY),
    Fault("P11 bit flipped in the newest checkpoint", flip_bit, (-9,), again=2 * SAVE_EVERY),
    Fault("P22 NaN loss on one process", nothing("loss not finite"), (3,), env={"FAULT_NAN": "1 2"}),
    Fault("P26 loading process killed", on_loading_process(signal.SIGKILL), (1,)),
    Fault("P27 loading process stuck", on_loading_process(signal.SIGSTOP), (1,)),
    Fault("P28 /dev/shm full", nothing("/dev/shm"), (1,), moment="data", prefix=NO_MEMORY),
    Fault("P29 no more open files", use_up_files, (0, 1)),  # 0 where the rest of the run opens no more than before
    Fault("P34 process does not answer", stop_process_dead, (-9, 1)),
)


@dataclass
class Outcome:
    """What became of one fault."""

    fault: str
    model: str
    hang: bool = False
    lost: bool = False
    resumed: bool = False
    exact: bool = True
    again: int = 0
    problems: list[str] = field(default_factory=list)
    restarts: int | None = None
    seconds: float | None = None


def flags_for(model, data):
    size = [] if model.startswith("ssd") else ["--min-size", "64", "--max-size", "96"]
    flags = ["--data-path", data, "--model", model, "--device", "cpu", "--workers", "1", "--epochs", "6"]
    flags += ["--lr", "0.001", "--batch-size", "2", "--checkpoint-every", SAVE_EVERY, "--eval-every", "2"]
    return [*flags, "--print-freq", "1", "--no-save-predictions", "--resume", "auto", *size]


def key_of(step):
    return step["rank"], step["epoch"], tuple(step["ids"])


class Campaign:
    """One run through all faults, beside what the run without faults computed."""

    def __init__(self, folder, model, flags, reference, rng):
        self.folder, self.model, self.flags, self.reference, self.rng = folder, model, flags, reference, rng
        self.count = self.num_runs = 0

    def launch(self, fault=None):
        self.count += 1
        folder = self.folder / f"trace{self.count}"
        options = {} if fault is None else {"torchrun": fault.torchrun, "env": fault.env, "prefix": fault.prefix}
        return start(folder, self.folder / f"out{self.num_runs}", self.flags, **options)

    def run(self, faults):
        """Meet the faults in a random order; returns an outcome for each, and one for every end of a run."""
        outcomes, pending, previous = [], [], None
        todo = self.rng.sample(faults, len(faults))
        while todo:
            fault = todo[0]
            job = self.launch(fault)
            outcome = Outcome(fault.name, self.model)
            if not self.meet(fault, job, outcome):  # the run has come to its end: the next fault meets a new one
                outcomes.append(self.finish(pending, previous))
                pending, previous = [], None
                self.num_runs += 1
                continue
            todo.pop(0)
            if job.steps():
                self.judge(pending, previous, job)
                pending, previous = [], job
            pending.append((fault, outcome))
            outcomes.append(outcome)
            print(f"  {self.model}: {fault.name}: {'; '.join(outcome.problems) or 'ok'}", flush=True)
        outcomes.append(self.finish(pending, previous))
        return outcomes

    def meet(self, fault, job, outcome):
        """Wait for the moment, make the fault, watch what follows; returns False if the run was over before."""
        count = self.rng.randint(1, 4)
        if fault.moment == "step":
            reached = job.wait_for(lambda: len(job.steps()) >= count)
        else:
            reached = job.wait_for(lambda: bool(job.events(fault.moment)))
        if not reached:
            codes = job.end()
            if codes is not None and not any(codes):
                return False
        time.sleep(self.rng.random() * 0.3)
        try:
            text = fault.inject(job, self.rng)
        except AssertionError as error:
            text = None
            outcome.problems.append(str(error))
        codes = job.end()
        for pid in job.stopped:
            send(pid, signal.SIGKILL)
        if fault.env and codes is not None and not any(codes):  # it had fewer steps left than its fault waits for
            return False
        outcome.hang = codes is None
        if outcome.hang:
            outcome.problems.append("hang")
        elif not set(codes) <= set(fault.codes):
            outcome.problems.append(f"exit codes {codes}, expected {fault.codes}")
        log = job.log()
        if text is not None and not re.search(text, log):
            outcome.problems.append(f"no {text!r} in the log")
        said = len(re.findall(r"\.py: error: |Timeout \(0:|NOT saved", log))
        if fault.torchrun is None and not outcome.hang and said < codes.count(1):
            outcome.problems.append("a process ended with 1 and did not say why in one line")
        if "--max-restarts=5" in (fault.torchrun or ()):
            outcome.restarts, outcome.seconds = job.restarts, job.recovered_in
            if job.recovered_in is None:
                outcome.problems.append("did not come back")
        self.check_losses(job, outcome)
        self.check_checkpoint(job, outcome)
        if outcome.problems:
            print("\n".join(f"    | {line[:200]}" for line in log.splitlines()[-25:]), flush=True)
        return True

    def check_losses(self, job, outcome):
        steps = [step for rank in (0, 1) for step in job.steps(rank)]
        wrong = [step for step in steps if self.reference["losses"].get(key_of(step)) != step["losses"]]
        if wrong:
            outcome.exact = False
            outcome.problems.append(f"{len(wrong)} of {len(steps)} steps with other losses, first {wrong[0]}")

    def check_checkpoint(self, job, outcome):
        from runtime.checkpoint import find_newest

        if not newest(job).exists():
            return
        outcome.lost = find_newest(newest(job).parent) is None
        if outcome.lost:
            outcome.problems.append("no checkpoint is left")

    def judge(self, pending, previous, job):
        """Say of the faults since the last step whether the run went on where it should."""
        if previous is None:
            for _, outcome in pending:
                outcome.resumed = True
            return
        order = self.reference["order"]
        again = order.index(key_of(previous.steps()[-1])) + 1 - order.index(key_of(job.steps()[0]))
        limit = max(fault.again for fault, _ in pending)
        for _, outcome in pending:
            outcome.again, outcome.resumed = again, 0 <= again <= limit
            if not outcome.resumed:
                outcome.problems.append(f"continued {again} steps back, expected 0 to {limit}")
                print(f"  {self.model}: {outcome.fault}: {outcome.problems[-1]}", flush=True)

    def finish(self, pending, previous):
        """Let the run come to its end, and compare weights and scores with those of the run without faults."""
        job = self.launch()
        codes = job.end(600)
        if job.steps():
            self.judge(pending, previous, job)
        elif codes is not None and not any(codes):  # nothing was left to compute
            for _, pending_outcome in pending:
                pending_outcome.resumed = True
        outcome = Outcome("end of the campaign", self.model)
        if codes is None or any(codes):
            outcome.problems.append(f"the last launch ended with {codes}")
        self.check_losses(job, outcome)
        for found, expected in zip(result_of(job), self.reference["result"]):
            if found != expected:
                outcome.exact = False
                outcome.problems.append(f"at the end {found}, without faults {expected}")
        print(
            f"  {self.model}: end: {'; '.join(outcome.problems) or 'weights and scores as without faults'}", flush=True
        )
        return outcome


def result_of(job):
    """Return the SHA-256 of the weights and the scores of every epoch."""
    from runtime.checkpoint import load_checkpoint
    from training.verify_resume import hash_state

    lines = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
    return hash_state(load_checkpoint(newest(job))["model"]), [(line["epoch"], line.get("bbox")) for line in lines]


def run_without_faults(folder, flags):
    job = start(folder / "trace", folder / "out", flags)
    codes = job.end(900)
    assert codes == [0, 0], f"the run without faults ended with {codes}\n{job.log()}"
    steps = job.steps(0)
    losses = {key_of(step): step["losses"] for rank in (0, 1) for step in job.steps(rank)}
    return {"losses": losses, "order": [key_of(step) for step in steps], "result": result_of(job)}


def run_matrix(models, instants, seed, only=(), folder=None):
    """Return the outcomes of all campaigns."""
    faults = [f for f in FAULTS if not only or f.name.split()[0] in only]
    if os.geteuid() != 0:
        faults = [f for f in faults if not f.prefix]
    outcomes = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data = draw_coco(Path(name) / "coco", num_images=NUM_IMAGES)
        for model in models:
            begun = time.time()
            reference = run_without_faults(Path(name) / model, flags_for(model, data))
            print(f"{model}: without faults {time.time() - begun:.0f} s", flush=True)
            for instant in range(instants):
                rng = random.Random(f"{seed} {model} {instant}")
                place = Path(name) / f"{model}-{instant}"
                campaign = Campaign(place, model, flags_for(model, data), reference, rng)
                outcomes += campaign.run(faults)
    return outcomes


def count_restarts(kills, seed, plain):
    """Kill a process of a torchrun job again and again; return (kills, recovered, restarts used, seconds of each)."""
    rng = random.Random(seed)
    recovered, restarts, seconds = 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        data = draw_coco(Path(name) / "coco", num_images=NUM_IMAGES)
        for kill in range(kills):
            flags = [*flags_for(MODELS[0], data), "--eval-every", "0"]
            env = {"FAULT_PLAIN_GROUP": "1"} if plain else {}
            torchrun = (*STANDALONE, "--max-restarts=8")
            job = start(Path(name) / f"trace{kill}", Path(name) / f"out{kill}", flags, torchrun=torchrun, env=env)
            job.wait_for(lambda job=job: len(job.steps()) >= 3)
            kill_and_let_restart(job, rng)
            job.end()
            if job.recovered_in is not None:
                recovered += 1
                restarts += job.restarts
                seconds.append(job.recovered_in)
            print(f"  kill {kill + 1}, {'default' if plain else 'our'} group: restarts {job.restarts}", flush=True)
    return kills, recovered, restarts, seconds


def print_matrix(outcomes):
    ends = [o for o in outcomes if o.fault == "end of the campaign"]
    outcomes = [o for o in outcomes if o.fault != "end of the campaign"]
    print("\n| fault | runs | resumed | bit-exact | checkpoints lost | hangs | steps computed again, most |")
    print("|---|---|---|---|---|---|---|")
    for fault in FAULTS:
        rows = [o for o in outcomes if o.fault == fault.name]
        if rows:
            print(row_of(fault.name, rows))
    print(row_of("all", outcomes))
    exact = sum(not o.problems for o in ends)
    print(f"\nWeights and scores at the end as without faults: {exact} of {len(ends)} runs.")


def row_of(name, rows):
    cells = [len(rows), sum(o.resumed for o in rows), sum(o.exact for o in rows)]
    cells += [sum(o.lost for o in rows), sum(o.hang for o in rows), max(o.again for o in rows)]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["matrix", "writes", "restarts"], help="matrix, writes, restarts")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--instants", type=int, default=3, help="campaigns per model")
    parser.add_argument("--only", nargs="+", default=(), metavar="P1", help="numbers of faults")
    parser.add_argument("--kills", type=int, default=200, help="inside a checkpoint write")
    parser.add_argument("--restarts", type=int, default=6, help="kills under torchrun, of each kind of group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the outcomes of the matrix")
    parser.add_argument("--report", nargs="+", help="print the table of such files, and run nothing")
    args = parser.parse_args()
    if args.report:
        print_matrix([Outcome(**o) for name in args.report for o in json.loads(Path(name).read_text())])
        return 0
    begun, bad = time.time(), 0
    if "matrix" in args.parts:
        outcomes = []
        for model in args.models:
            outcomes += run_matrix([model], args.instants, args.seed, args.only)
            if args.json:  # what comes later may be cut off
                Path(args.json).write_text(json.dumps([vars(o) for o in outcomes]))
        print_matrix(outcomes)
        bad += sum(bool(o.problems) for o in outcomes)
    if "writes" in args.parts:
        for name, (kills, torn) in count_torn_writes(args.kills, args.seed).items():
            print(f"{name}: {torn} of {kills} SIGKILLs inside a save left no readable checkpoint", flush=True)
            bad += torn if name != "plain torch.save" else 0
    if "restarts" in args.parts:
        for plain in (False, True):
            kills, back, used, seconds = count_restarts(args.restarts, args.seed, plain)
            mean = f", {used / back:.2f} restarts each, {sum(seconds) / back:.1f} s from kill to step" if back else ""
            print(f"{'default' if plain else 'our'} process group: {back} of {kills} kills recovered{mean}", flush=True)
    print(f"{time.time() - begun:.0f} s on {len(os.sched_getaffinity(0))} core(s)")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
