"""Threads that compute, threads that talk to children which last, and threads that make children all the time."""
import hashlib, os, subprocess, sys, threading, time

ROUNDS = 2000
wrong = []
stop = threading.Event()
progress = {}

CHILD = """
import sys
total = 0
for line in sys.stdin:
    total += int(line)
    sys.stdout.write(f"{total}\\n")
    sys.stdout.flush()
"""


def compute(me):
    """A chain of hashes: one wrong bit anywhere and the end is another."""
    digest = b"%d" % me
    while not stop.is_set() or progress[me] < ROUNDS:
        digest = hashlib.sha256(digest * 100).digest()
        progress[me] += 1
    again = b"%d" % me
    for _ in range(progress[me]):
        again = hashlib.sha256(again * 100).digest()
    if again != digest:
        wrong.append(f"thread {me}: another hash after {progress[me]} rounds")


def talk(me):
    """A child that lasts, and knows the sum so far."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    total = 0
    while not stop.is_set():
        progress[me] += 1
        total += progress[me]
        child.stdin.write(f"{progress[me]}\n")
        child.stdin.flush()
        said = child.stdout.readline()
        if said != f"{total}\n":
            wrong.append(f"thread {me}: its child said {said!r} instead of {total}")
            break
        time.sleep(0.001)
    child.stdin.close()
    if child.wait() != 0:
        wrong.append(f"thread {me}: its child ended with {child.returncode}")


def make(me):
    """One short-lived pipeline after the other."""
    while not stop.is_set():
        progress[me] += 1
        command = f"seq {progress[me]} | (while read n; do last=$n; done; echo $last; exit 3)"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        if (done.returncode, done.stdout, done.stderr) != (3, f"{progress[me]}\n", ""):
            wrong.append(f"thread {me}: {done}")
            return


jobs = [compute, compute, talk, talk, make, make]
threads = []
for number, job in enumerate(jobs):
    progress[number] = 0
    threads.append(threading.Thread(target=job, args=(number,)))
    threads[-1].start()
while min(progress.values()) < 5:
    time.sleep(0.01)
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
before = dict(progress)
deadline = time.monotonic() + 15
while any(progress[number] < before[number] + 5 for number in progress):
    if wrong or time.monotonic() > deadline:
        wrong.append(f"no progress: {before} {progress}")
        break
    time.sleep(0.01)
stop.set()
for thread in threads:
    thread.join()
with open("result", "a") as result:
    result.write("\n".join(wrong or ["ok"]) + "\n")
sys.exit(bool(wrong))
