"""The suite on a real SLURM: two nodes on this machine, the job files of docs/cluster/, and a verdict on every promise.

    sudo .venv/bin/python -m tests.cluster.slurm              # everything, some minutes of two cores; Debian, Ubuntu
    sudo .venv/bin/python -m tests.cluster.slurm --only preempted
    sudo .venv/bin/python -m tests.cluster.slurm --install    # first installs SLURM and munge with apt-get

Daemons, jobs, networks and files live in namespaces of their own, in memory, and vanish with this program, whatever
ends it. The trainings are SSDlite on small drawn pictures, on the CPU.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cluster.daemons import FOLDER, Cluster, enter_namespaces, missing_packages, wait_until  # noqa: E402

JOBS = ROOT / "docs" / "cluster"
NUM_IMAGES = 16
EPOCHS = 3
UPDATES = 4  # of an epoch, with two tasks and batches of two
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")


class Broken(Exception):
    """A promise was not kept."""


def expect(holds, text):
    if not holds:
        raise Broken(text)


class Job:
    """A job as its user sees it: its state, its log and the folder that it writes into.

    Args:
        cluster: Where it runs.
        arguments: Of sbatch.
        name: Of the job; its run is in runs/NAME.
    """

    def __init__(self, cluster, name, *arguments):
        self.cluster, self.name = cluster, name
        self.log_file = FOLDER / f"{name}.log"
        out = [f"--job-name={name}", f"--output={self.log_file}", f"--chdir={FOLDER}", "--open-mode=append"]
        self.number = cluster.ask("sbatch", "--parsable", *out, *arguments).strip()

    @property
    def folder(self):
        return FOLDER / "runs" / self.name

    def log(self):
        return self.log_file.read_text() if self.log_file.exists() else ""

    def fields(self):
        """Return what scontrol says of the job; of an array, of the task that it names last."""
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.ask("scontrol", "-o", "show", "job", self.number)))

    def end(self, seconds=900):
        """Wait for the job's end; returns its state and exit code, as in COMPLETED 0:0."""
        states = []

        def is_over():
            rows = self.cluster.ask("scontrol", "-o", "show", "job", self.number).splitlines()
            states[:] = [re.search(r"JobState=(\w+).* ExitCode=(\S+)", row).groups() for row in rows]
            return all(state in ENDED for state, _ in states)

        wait_until(is_over, f"the end of job {self.name}; its log ends with:\n{self.log()[-2000:]}", seconds)
        return sorted({" ".join(state) for state in states})

    def succeed(self):
        ends = self.end()
        expect(ends == ["COMPLETED 0:0"], f"job {self.name} ended with {ends}:\n{self.log()[-3000:]}")
        return self

    def wait_for_log(self, text, seconds=400, *, times=1):
        def found():
            return len(re.findall(text, self.log())) >= times

        wait_until(found, f"{text!r} in the log of {self.name}:\n{self.log()[-2000:]}", seconds)

    def metrics(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def result(self):
        return result_of(self.folder)


def result_of(folder):
    """Return the SHA-256 of the final weights and the scores of every epoch."""
    from runtime.checkpoint import load_checkpoint
    from training.verify_resume import hash_state

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_checkpoint(folder / "weights" / "checkpoint.pth")["model"]
    return hash_state(weights), [(line["epoch"], line.get("bbox")) for line in lines]


def train_flags(**changes):
    values = {
        "dataset": "coco", "data-path": FOLDER / "coco", "cache-dir": FOLDER / "cache", "device": "cpu", "workers": 1,
        "model": "ssdlite320_mobilenet_v3_large", "epochs": EPOCHS, "eval-every": EPOCHS, "batch-size": 2, "lr": 0.001,
        "print-freq": 1, "checkpoint-every": 2, **changes,
    }  # fmt: skip
    return ["--no-save-predictions", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def submit(cluster, name, *options, file="train.sbatch", **changes):
    """Submit a job file of the docs, with flags of sbatch in the place of its own, and flags of train.py."""
    small = ["--gpus-per-node=2", "--cpus-per-task=1", "--time=10", "--signal=USR1@60"]
    return Job(cluster, name, *small, *options, JOBS / file, *train_flags(**changes))


def two_tasks(cluster):
    """two tasks of one node train, and score as one process scores their checkpoint"""
    job = submit(cluster, "undisturbed", "--ntasks-per-node=2").succeed()
    expect("2 process(es) on cpu" in job.log(), "the two tasks are not one run")
    scores = [line for line in job.metrics() if "bbox" in line]
    expect(len(scores) == 1, f"{len(scores)} evaluations")
    checkpoint, out = job.folder / "weights" / "checkpoint.pth", FOLDER / "alone"
    flags = ["--test-only", "--resume", checkpoint, "--output-dir", out]
    cluster.ask("srun", "-n1", sys.executable, ROOT / "train.py", *train_flags(), *flags, timeout=600)
    alone = json.loads((out / "metrics.jsonl").read_text())
    expect(alone["bbox"] == scores[-1]["bbox"], f"one process scores {alone['bbox']}, two {scores[-1]['bbox']}")
    return f"box AP {alone['bbox']['AP']:.6f}"


def four_tasks(cluster):
    """four tasks of two nodes train and score"""
    job = submit(cluster, "four", "--nodes=2", "--ntasks-per-node=2", epochs=1, **{"eval-every": 1}).succeed()
    expect("4 process(es) on cpu" in job.log(), "the four tasks are not one run")
    expect("bbox" in job.metrics()[-1], "no scores")
    return f"box AP {job.metrics()[-1]['bbox']['AP']:.6f}"


def undisturbed(cluster):
    """Return weights and scores of the run of `two_tasks`."""
    folder = FOLDER / "runs" / "undisturbed"
    if not folder.exists():
        two_tasks(cluster)
    return result_of(folder)


def signalled(cluster):
    """--signal=USR1@30 saves and leaves with 0; the next job of that name goes on at that update"""
    options = ["--ntasks-per-node=2", "--time=2", "--signal=USR1@30"]
    job = submit(cluster, "signalled", *options, epochs=1000, **{"eval-every": 0, "checkpoint-every": 500}).succeed()
    stopped = re.findall(r"asked to stop: (.*)", job.log())
    expect(len(stopped) == 1, f"it does not say that it stops:\n{job.log()[-2000:]}")
    epoch = int(re.search(r"epoch (\d+)", stopped[0])[1])
    update = re.search(r"after update (\d+)", stopped[0])  # none between two epochs
    submit(cluster, "signalled", *options, epochs=epoch + 1, **{"eval-every": 0}).succeed()
    expect("continuing from runs/signalled" in job.log(), f"the next job started anew:\n{job.log()[-2000:]}")
    left = (epoch + 1) * UPDATES - int(update[1]) if update else UPDATES
    steps = re.findall(rf"Epoch: \[{epoch}\] \[(\d+)/{UPDATES}\]", job.log().partition("continuing")[2])
    expect(steps and int(steps[0]) == UPDATES - left + 1, f"{left} updates were left; the next job began with {steps}")
    return stopped[0]


def preempted(cluster):
    """USR1, scontrol requeue and preemption one after the other: the weights at the end are those of no disturbance"""
    reference = undisturbed(cluster)
    name, step = "disturbed", r"Epoch: \[\d+\] +\["
    first, job = (submit(cluster, name, "--ntasks-per-node=2", "--exclusive", "--dependency=singleton") for _ in "12")
    first.wait_for_log(step, times=2)
    cluster.ask("scancel", "--signal=USR1", first.number)
    first.succeed()
    job.wait_for_log(step, times=5)
    cluster.ask("scontrol", "requeue", job.number)
    restart(job, 1)
    job.wait_for_log(step, times=9)
    urgent = Job(cluster, "urgent", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    urgent.succeed()
    restart(job, 2)
    job.succeed()
    expect(job.log().count("asked to stop") == 3, f"it was not asked to stop three times:\n{job.log()}")
    expect(job.result() == reference, "other weights or scores than without a disturbance")
    return f"SHA-256 {job.result()[0][:12]}"


def restart(job, count):
    """Wait until SLURM has queued the job again, and let it start at once instead of after two minutes."""
    wait_until(lambda: job.fields()["Restarts"] == str(count), f"restart {count} of {job.name}", 60)
    wait_until(lambda: job.fields()["JobState"] == "PENDING", f"{job.name} in the queue", 60)
    job.cluster.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now")


def array(cluster):
    """an array of three seeds writes three folders, each with its seed"""
    job = submit(cluster, "seeds", file="seeds.sbatch", epochs=1, **{"eval-every": 0, "workers": 0}).succeed()
    return check_folders([job.folder / str(seed) for seed in range(3)])


def array_without_folders(cluster):
    """an array of three seeds without --output-dir, started in the same second, writes three folders too"""
    flags = " ".join(train_flags(epochs=1, **{"eval-every": 0, "workers": 0}))
    command = f"srun {sys.executable} train.py {flags} --seed $SLURM_ARRAY_TASK_ID"
    Job(cluster, "unnamed", "--array=0-2", "--ntasks=1", "--wrap", command).succeed()
    return check_folders(sorted((FOLDER / "runs").glob("coco-ssdlite*")))


def check_folders(folders):
    expect(len(folders) == 3, f"three seeds wrote {[folder.name for folder in folders]}")
    seeds = sorted(json.loads((folder / "args.json").read_text())["args"]["seed"] for folder in folders)
    expect(seeds == [0, 1, 2], f"the folders are of seeds {seeds}")
    lines = [len((folder / "metrics.jsonl").read_text().splitlines()) for folder in folders]
    expect(lines == [1, 1, 1], f"the folders have {lines} epochs")
    weights = {(folder / "weights" / "checkpoint.pth").read_bytes() for folder in folders}
    expect(len(weights) == 3, "two seeds have the same weights")
    return ", ".join(str(folder.relative_to(FOLDER)) for folder in folders)


def without_srun(cluster):
    """python without srun in a job of several tasks says in one line to use srun, and ends with 1 at once"""
    command = f"{sys.executable} train.py {' '.join(train_flags())}"
    for options in (["--ntasks=2"], ["--nodes=2", "--ntasks-per-node=2"]):
        job = Job(cluster, f"bare{len(options)}", *options, "--wrap", command)
        expect(job.end(300) == ["FAILED 1:0"], f"ended with {job.end()}:\n{job.log()}")
        check_advice(job.log())
    # What salloc starts when it opens a shell: SLURM's default of InteractiveStepOptions, without the terminal.
    shell = ["salloc", "--ntasks=2", "srun", "--interactive", "--preserve-env", "sh", "-c"]
    done = subprocess.run(
        [*shell, f"cd {FOLDER}; {command}"], env=cluster.environment, capture_output=True, text=True, timeout=300
    )
    expect(done.returncode == 1, f"in the shell of salloc it ended with {done.returncode}")
    check_advice(done.stdout + done.stderr)
    return ""


def check_advice(text):
    lines = [line for line in text.splitlines() if "train.py: error" in line]
    expect(len(lines) == 1 and "`srun " in lines[0], f"no advice in one line:\n{text[-2000:]}")
    expect("Traceback" not in text, text[-2000:])


def under_torchrun(cluster):
    """torchrun on two nodes: SIGTERM saves; the next job ends with the weights of two tasks under srun"""
    reference = undisturbed(cluster)
    options = ["--nodes=2", "--gpus-per-node=1", "--signal=TERM@60"]
    job = submit(cluster, "launched", *options, file="torchrun.sbatch")
    job.wait_for_log(r"Epoch: \[\d+\] +\[", times=3)
    cluster.ask("scancel", "--signal=TERM", job.number)
    ends = job.end()
    expect("asked to stop" in job.log() and "NOT saved" not in job.log(), f"it has not saved:\n{job.log()[-3000:]}")
    job = submit(cluster, "launched", *options, file="torchrun.sbatch").succeed()
    expect(job.result() == reference, "other weights or scores than under srun")
    return f"after SIGTERM {ends[0]}; SHA-256 {job.result()[0][:12]}"


CLAIMS = (
    two_tasks, four_tasks, preempted, under_torchrun, array, array_without_folders, without_srun, signalled,
)  # fmt: skip


def prove(claims):
    """Run the claims on a new cluster; returns the exit code."""
    FOLDER.mkdir()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    cluster = Cluster()
    cluster.start()
    from helpers.drawn import draw_coco

    draw_coco(FOLDER / "coco", num_images=NUM_IMAGES)
    (FOLDER / "train.py").symlink_to(ROOT / "train.py")  # jobs run here, as in a copy of the suite
    broken = 0
    for claim in claims:
        begun = time.monotonic()
        try:
            verdict = "ok     " + (claim(cluster) or "as told")
        except (Broken, TimeoutError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            broken += 1
            verdict = f"BROKEN {error}"
            cluster.ask("scancel", "--user=root", check=False)
        print(f"{inspect.getdoc(claim)}: {time.monotonic() - begun:.0f} s\n    {verdict}", flush=True)
    cluster.stop()
    version = cluster.ask("sinfo", "--version").strip()
    print(f"{len(claims) - broken} of {len(claims)} promises are kept on {version}, two nodes")
    return int(broken > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[claim.__name__ for claim in CLAIMS], help="prove these alone")
    parser.add_argument("--install", action="store_true", help="install missing packages with apt-get first")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("namespaces need root: start it with sudo")
    if missing := missing_packages():
        if not args.install:
            parser.error(f"needs {' '.join(missing)}: apt-get install {' '.join(missing)}, or --install")
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], check=True)
    enter_namespaces()
    return prove([claim for claim in CLAIMS if not args.only or claim.__name__ in args.only])


if __name__ == "__main__":
    sys.exit(main())
