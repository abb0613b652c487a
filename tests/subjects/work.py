"""Eight threads, a condition variable, a timer and 100 MB of data with a known hash."""
import hashlib, os, random, signal, sys, threading, time

data = random.Random(1).randbytes(100_000_000)
known = hashlib.sha256(data).hexdigest()
condition = threading.Condition()
turn = 0
stop = False
ticks = 0
wrong = []


def tick(*_):
    global ticks
    ticks += 1


def work(me):
    """Passes a turn on to the next thread, again and again."""
    global turn
    while True:
        with condition:
            if not condition.wait_for(lambda: turn % 8 == me or stop, timeout=20):
                wrong.append(f"thread {me} waits for its turn {turn}")
                return
            if stop:
                return
            turn += 1
            condition.notify_all()
        time.sleep(0.002)


signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
for thread in threads:
    thread.start()
while turn < 16:
    time.sleep(0.01)
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
turns, ticked = turn, ticks
time.sleep(0.3)
if turn - turns < 8:
    wrong.append(f"{turn - turns} turns in 0.3 seconds")
if ticks - ticked < 3:
    wrong.append(f"{ticks - ticked} ticks in 0.3 seconds")
with condition:
    stop = True
    condition.notify_all()
for thread in threads:
    thread.join()
signal.setitimer(signal.ITIMER_REAL, 0)
if hashlib.sha256(data).hexdigest() != known:
    wrong.append("the data has changed")
if os.environ.get("SUBJECT") != "its environment":
    wrong.append("the environment has changed")
with open("result", "a") as result:
    result.write("\n".join(wrong or ["ok"]) + "\n")
sys.exit(bool(wrong))
