"""Two hosts for real, as network namespaces: one is killed and brought back, and the run goes on to the last bit.

    sudo python -m tests.faults.two_hosts

Needs root and ``ip``. Each host runs ``torchrun --nnodes=2``; they meet on a link of their own.
"""

import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults.jobs import children, send, start  # noqa: E402
from faults.matrix import MODELS, NUM_IMAGES, flags_for, key_of, result_of, run_without_faults  # noqa: E402
from helpers.drawn import draw_coco  # noqa: E402

HOSTS = ("detection-a", "detection-b")
ADDRESSES = ("10.77.31.1", "10.77.31.2")
NAMES = Path("/etc/netns")  # what ip shows as /etc to the processes of a namespace
LINKS = ("det-veth-a", "det-veth-b")


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True)


def make_hosts():
    ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
    for host, link, address in zip(HOSTS, LINKS, ADDRESSES):
        ip("netns", "add", host)
        # torchrun looks its own name up again and again; without an answer each look-up takes many seconds.
        (NAMES / host).mkdir(parents=True, exist_ok=True)
        (NAMES / host / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        (NAMES / host / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        ip("link", "set", link, "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", link)
        ip("-n", host, "link", "set", link, "up")
        ip("-n", host, "link", "set", "lo", "up")


def remove_hosts():
    ip("link", "del", LINKS[0], check=False)
    for host in HOSTS:
        ip("netns", "del", host, check=False)
        shutil.rmtree(NAMES / host, ignore_errors=True)


def start_host(number, folder, out, flags):
    launcher = ["--nnodes=2", "--max-restarts=4", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29533"]
    launcher += ["--rdzv-id=two-hosts", f"--rdzv-conf=is_host={int(number == 0)}", f"--local-addr={ADDRESSES[number]}"]
    # With torchrun's shared store the host that stayed does not tell its address to one that comes back (torch 2.15).
    env = {"GLOO_SOCKET_IFNAME": LINKS[number], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    prefix = ("ip", "netns", "exec", HOSTS[number])
    return start(folder, out, flags, processes=1, torchrun=launcher, env=env, prefix=prefix)


def all_steps(jobs):
    return sorted((step for job in jobs for step in job.events("step")), key=lambda step: step["time"])


def wait_for_step_after(moment, jobs, seconds):
    end = time.time() + seconds
    while time.time() < end:
        later = [step for step in all_steps(jobs) if step["time"] > moment]
        if len({step["rank"] for step in later}) == 2:
            return later[0]["time"]
        time.sleep(0.05)
    return None


def run(kills, seed=0, away=3.0):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = draw_coco(folder / "coco", num_images=NUM_IMAGES)
        flags, out = flags_for(MODELS[0], data), folder / "out"
        reference = run_without_faults(folder / "alone", flags)
        hosts = [start_host(number, folder / f"host{number}", out, flags) for number in (0, 1)]
        jobs, times = list(hosts), []
        for kill in range(kills):
            count = len(all_steps(jobs)) + 2 * rng.randint(2, 6)
            hosts[0].wait_for(lambda count=count: len(all_steps(jobs)) >= count)
            time.sleep(rng.random())
            for pid in [*children(hosts[1].processes[0].pid), hosts[1].processes[0].pid]:
                send(pid, signal.SIGKILL)
            hosts[1].end()
            time.sleep(away)
            back = time.time()
            hosts[1] = start_host(1, folder / f"host1-{kill}", out, flags)
            jobs.append(hosts[1])
            resumed = wait_for_step_after(back, jobs, 120)
            used = max(int(event["restarts"]) for event in hosts[0].events("start"))
            if resumed is None:
                print(f"kill {kill + 1}: not recovered; restarts so far {used}", flush=True)
                print("\n".join(job.log()[-3000:] for job in jobs))
                break
            times.append(resumed - back)
            print(f"kill {kill + 1}: host b back after {away:.0f} s, first step {times[-1]:.1f} s later; "
                  f"restarts so far {used}", flush=True)  # fmt: skip
        codes = [host.end(600) for host in hosts]
        steps = all_steps(jobs)
        wrong = sum(reference["losses"].get(key_of(step)) != step["losses"] for step in steps)
        same = result_of(hosts[0]) == reference["result"]
        print(f"{len(times)} of {kills} kills recovered, {used} restarts, exit codes {codes}; {len(steps)} steps, "
              f"{wrong} with other losses; weights and scores at the end as on one host: {same}")  # fmt: skip
        return 0 if len(times) == kills and not wrong and same else 1


def main():
    remove_hosts()
    make_hosts()
    try:
        return run(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    finally:
        remove_hosts()


if __name__ == "__main__":
    sys.exit(main())
