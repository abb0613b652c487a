"""asyncio: timers, children by their pipes, streams over socket pairs, threads that wake the loop."""
import asyncio, hashlib, os, socket, sys

wrong = []
progress = {}
stop = False


def complain(what):
    if len(wrong) < 10:
        wrong.append(what)


async def wait(me):
    """Timers: none fires too early, and those of one moment in their order."""
    loop = asyncio.get_running_loop()
    while not stop:
        fired = []
        begun = loop.time()
        for number in range(5):
            loop.call_later(0.005, fired.append, number)
        await asyncio.sleep(0.012)
        taken = loop.time() - begun
        if taken < 0.011 or sorted(fired) != [0, 1, 2, 3, 4]:
            complain(f"timers: {fired} after {taken}")
        try:
            await asyncio.wait_for(asyncio.get_running_loop().create_future(), 0.005)
            complain("a future nobody sets was set")
        except asyncio.TimeoutError:
            progress[me] += 1


async def make(me):
    """One short-lived pipeline after the other."""
    while not stop:
        progress[me] += 1
        number = progress[me]
        command = f"seq {number} | (while read n; do last=$n; done; echo $last; cat; exit 3)"
        child = await asyncio.create_subprocess_shell(
            command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        said, errors = await child.communicate(b"more")
        if (child.returncode, said, errors) != (3, b"%d\n" % number, b""):
            complain(f"child {number}: {child.returncode} {said} {errors}")


async def talk(me):
    """A child that lasts, and knows the sum so far."""
    script = "while read n; do sum=$((sum + n)); echo $sum; done"
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    total = 0
    while not stop:
        progress[me] += 1
        total += progress[me]
        child.stdin.write(b"%d\n" % progress[me])
        await child.stdin.drain()
        said = await child.stdout.readline()
        if said != b"%d\n" % total:
            complain(f"a child says {said} instead of {total}")
            break
    child.stdin.close()
    if await child.wait() != 0:
        complain(f"it ended with {child.returncode}")


async def stream(me):
    """A socket pair that is full most of the time: every byte arrives, in order."""
    one, other = socket.socketpair()
    reader, other_writer = await asyncio.open_connection(sock=one)
    _, writer = await asyncio.open_connection(sock=other)
    block = bytes(range(251)) * 400

    async def write():
        while not stop:
            writer.write(block)
            await writer.drain()
        writer.close()

    writing = asyncio.create_task(write())
    pattern = hashlib.sha256(block).digest()
    while True:
        try:
            read = await reader.readexactly(len(block))
        except asyncio.IncompleteReadError as end:
            if end.partial:
                complain(f"{len(end.partial)} bytes at the end")
            break
        if hashlib.sha256(read).digest() != pattern:
            complain("a block has changed")
        progress[me] += 1
    await writing
    other_writer.close()


async def think(me):
    """Threads, which tell the loop by its own socket pair that they are done."""
    loop = asyncio.get_running_loop()

    def chain(rounds):
        digest = b""
        for _ in range(rounds):
            digest = hashlib.sha256(digest * 50).digest()
        return digest

    known = chain(300)
    while not stop:
        if await loop.run_in_executor(None, chain, 300) != known:
            complain("another hash")
        progress[me] += 1


async def main():
    global stop
    jobs = []
    for number, job in enumerate([wait, make, make, talk, stream, think]):
        progress[number] = 0
        jobs.append(asyncio.create_task(job(number)))
    while min(progress.values()) < 3:
        await asyncio.sleep(0.005)
    open("ready", "w").close()
    while not os.path.exists("go"):
        await asyncio.sleep(0.005)
    before = dict(progress)
    while any(progress[number] < before[number] + 3 for number in progress) and not wrong:
        await asyncio.sleep(0.005)
    stop = True
    await asyncio.gather(*jobs)


asyncio.run(main())
with open("result", "a") as result:
    result.write("\n".join(wrong or ["ok"]) + "\n")
sys.exit(bool(wrong))
