// One system call that blocks, by name. A call with a time limit must end neither early nor late; one without
// goes on until a helper ends it, which waits for the test's go. None may return EINTR.
#include "subject.h"
#include <sys/epoll.h>

static const ns LENGTH = 1500 * MS;

static void timed(long (*call)(void), long want, int want_errno)
{
	ns start = now(CLOCK_MONOTONIC);
	ready();
	errno = 0;
	long got = call();
	int error = errno;
	ns end = now(CLOCK_MONOTONIC);
	wait_go();
	expect(got == want && error == want_errno, "returned %ld, %s", got, strerror(error));
	expect_relative(start, end, LENGTH);
}

// A wait until a point in time goes on while the process does not exist.
static void absolute(long (*call)(void), long want, int want_errno)
{
	ns start = now(CLOCK_MONOTONIC);
	ready();
	errno = 0;
	long got = call();
	int error = errno;
	ns end = now(CLOCK_MONOTONIC);
	wait_go();
	expect(got == want && error == want_errno, "returned %ld, %s", got, strerror(error));
	gap_min = gap_max = 0;
	expect_relative(start, end, LENGTH);
}

static void announce_release(void)
{
	char text[32];
	snprintf(text, sizeof text, "%lld", now(CLOCK_MONOTONIC));
	put_file("released", text);
}

// A child that ends the wait, once the test allows it.
static pid_t releaser(void (*hold)(void), void (*release)(void))
{
	pid_t pid = must(fork());
	if (pid) {
		while (hold && access("held", F_OK))
			nap(MS);
		return pid;
	}
	if (hold) {
		hold();
		put_file("held", "");
	}
	wait_go();
	announce_release();
	release();
	_exit(0);
}

static void released(long (*call)(void), long want)
{
	ready();
	errno = 0;
	long got = call();
	int error = errno;
	ns end = now(CLOCK_MONOTONIC);
	char text[32];
	expect(get_file("released", text, sizeof text), "it returned too early: %ld, %s", got, strerror(error));
	expect(got == want, "returned %ld, %s", got, strerror(error));
	expect(end - atoll(text) < LATE, "late by %lld us", (end - atoll(text)) / 1000);
}

static struct timespec length, left;
static int ends[2];
static struct pollfd polled;
static uint32_t *word;
static pid_t child;
static int id;
static volatile sig_atomic_t handled;

static void handler(int signal)
{
	handled = signal;
}

// --- sleeps ---
static long call_nanosleep(void) { return nanosleep(&length, NULL); }
static long call_nanosleep_rem(void) { return nanosleep(&length, &left); }
static long call_clock_nanosleep(void) { return clock_nanosleep(CLOCK_MONOTONIC, 0, &length, NULL); }
static long call_clock_nanosleep_rem(void) { return clock_nanosleep(CLOCK_BOOTTIME, 0, &length, &left); }
static long call_clock_nanosleep_real(void) { return clock_nanosleep(CLOCK_REALTIME, 0, &length, NULL); }
static long until(clockid_t clock)
{
	struct timespec end = timespec(now(clock) + LENGTH);
	return clock_nanosleep(clock, TIMER_ABSTIME, &end, NULL);
}
static long call_until_monotonic(void) { return until(CLOCK_MONOTONIC); }
static long call_until_realtime(void) { return until(CLOCK_REALTIME); }

// --- poll and its relatives, on a pipe that stays empty or gets a byte ---
static void write_byte(void) { must(write(ends[1], "x", 1)); }
static long call_poll_for(void) { return poll(&polled, 1, LENGTH / MS); }
static long call_poll(void) { return poll(&polled, 1, -1); }
static long call_ppoll_for(void) { return syscall(SYS_ppoll, &polled, 1, &length, NULL, 8); }
static long call_ppoll(void)
{
	sigset_t set;
	sigfillset(&set);
	return ppoll(&polled, 1, NULL, &set);
}
static long select_for(struct timeval *limit)
{
	fd_set set;
	FD_ZERO(&set);
	FD_SET(ends[0], &set);
	return select(ends[0] + 1, &set, NULL, NULL, limit);
}
static long wait_for_event(int limit)
{
	struct epoll_event event = { EPOLLIN, { .fd = ends[0] } };
	long count = epoll_wait(id, &event, 1, limit);
	expect(count != 1 || event.data.fd == ends[0]);
	return count;
}
static long call_epoll_for(void) { return wait_for_event(LENGTH / MS); }
static long call_epoll(void) { return wait_for_event(-1); }
static long call_epoll_pwait2(void)
{
	struct epoll_event event;
	return epoll_pwait2(id, &event, 1, &length, NULL);
}
static void make_epoll(void)
{
	id = must(epoll_create1(0));
	must(epoll_ctl(id, EPOLL_CTL_ADD, ends[0], &(struct epoll_event){ EPOLLIN, { .fd = ends[0] } }));
}
static long call_select_for(void)
{
	struct timeval limit = { LENGTH / SECOND, LENGTH % SECOND / 1000 };
	return select_for(&limit);
}
static long call_select(void) { return select_for(NULL); }
static long pselect_for(struct timespec *limit)
{
	fd_set set;
	sigset_t mask;
	FD_ZERO(&set);
	FD_SET(ends[0], &set);
	sigfillset(&mask);
	return pselect(ends[0] + 1, &set, NULL, NULL, limit, &mask);
}
static long call_pselect_for(void) { return pselect_for(&length); }
static long call_pselect(void) { return pselect_for(NULL); }
static long call_read(void)
{
	char byte;
	return read(ends[0], &byte, 1);
}
static void drain(void)
{
	static char buffer[65536];
	must(read(ends[0], buffer, sizeof buffer));
}
static long call_write(void) { return write(ends[1], "more", 4); }
static void fill(void)
{
	static char buffer[65536];
	must(write(ends[1], buffer, sizeof buffer));
}

// --- futexes, in memory that the helper shares ---
static long futex(int op, uint32_t value, const struct timespec *limit, uint32_t bits)
{
	return syscall(SYS_futex, word, op, value, limit, NULL, bits);
}
static void wake(void)
{
	atomic_store((_Atomic uint32_t *)word, 1);
	must(futex(FUTEX_WAKE, 1, NULL, 0));
}
static long call_futex(void) { return futex(FUTEX_WAIT, 0, NULL, 0); }
static long call_futex_for(void) { return futex(FUTEX_WAIT, 0, &length, 0); }
static long call_futex_bitset(void) { return futex(FUTEX_WAIT_BITSET, 0, NULL, 5); }
static long call_futex_until(void)
{
	struct timespec end = timespec(now(CLOCK_MONOTONIC) + LENGTH);
	return futex(FUTEX_WAIT_BITSET, 0, &end, FUTEX_BITSET_MATCH_ANY);
}

// --- waiting for a child ---
static void nothing(void) {}
static long call_wait4(void)
{
	int status;
	return wait4(child, &status, 0, NULL);
}
static long call_waitid(void)
{
	siginfo_t info = { 0 };
	return waitid(P_ALL, 0, &info, WEXITED) == 0 && info.si_pid == child;
}

// --- waiting for a signal ---
static void send_signal(void) { must(kill(getppid(), SIGUSR1)); }
static long call_sigsuspend(void)
{
	sigset_t set;
	sigfillset(&set);
	sigdelset(&set, SIGUSR1);
	sigsuspend(&set);
	sigset_t after;
	sigprocmask(SIG_BLOCK, NULL, &after);
	return handled == SIGUSR1 && sigismember(&after, SIGUSR1) && !sigismember(&after, SIGUSR2);
}
static long call_pause(void)
{
	pause();
	return handled == SIGUSR1;
}
static void block_usr1(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	must(sigprocmask(SIG_BLOCK, &set, NULL));
}
static long wait_usr1(const struct timespec *limit)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	return syscall(SYS_rt_sigtimedwait, &set, NULL, limit, 8);
}
static long call_sigwaitinfo(void) { return wait_usr1(NULL); }
static long call_sigtimedwait(void) { return wait_usr1(&length); }

// --- System V IPC ---
static struct { long type; char text[8]; } message = { 7, "message" };
static long call_semop(void)
{
	struct sembuf take = { 0, -1, 0 };
	return semop(id, &take, 1);
}
static long call_semtimedop(void)
{
	struct sembuf take = { 0, -1, 0 };
	return semtimedop(id, &take, 1, &length);
}
static void give(void)
{
	struct sembuf give = { 0, 1, 0 };
	must(semop(id, &give, 1));
}
static long call_msgrcv(void) { return msgrcv(id, &message, sizeof message.text, 7, 0); }
static void send_message(void) { must(msgsnd(id, &message, sizeof message.text, 0)); }
static void remove_semaphore(void) { semctl(id, 0, IPC_RMID); }
static void remove_queue(void) { msgctl(id, IPC_RMID, NULL); }

// --- files ---
static int locked;
static void open_locked(void) { locked = must(open("lock", O_RDWR | O_CREAT, 0600)); }
static void hold_flock(void)
{
	open_locked();
	must(flock(locked, LOCK_EX));
}
static void close_locked(void) { close(locked); }
static long call_flock(void) { return flock(locked, LOCK_EX); }
static struct flock whole = { .l_type = F_WRLCK };
static void hold_posix(void)
{
	open_locked();
	must(fcntl(locked, F_SETLK, &whole));
}
static long call_setlkw(void) { return fcntl(locked, F_SETLKW, &whole); }
static long call_open(void) { return open("fifo", O_RDONLY) > 2; }
static void open_other_end(void) { must(open("fifo", O_WRONLY)); }

// --- which of them, how it is prepared, and what it must return ---
static void pipe_and_word(void)
{
	must(pipe2(ends, O_CLOEXEC));
	polled = (struct pollfd){ .fd = ends[0], .events = POLLIN };
	word = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	signal(SIGUSR1, handler);
}
static void make_semaphore(void) { id = must(semget(IPC_PRIVATE, 1, 0600)); }
static void make_queue(void) { id = must(msgget(IPC_PRIVATE, 0600)); }
static void make_fifo(void) { must(mkfifo("fifo", 0600)); }

static const struct {
	const char *name;
	long (*call)(void);
	enum { FOR, UNTIL, RELEASED } kind;
	long want;
	int want_errno;
	void (*prepare)(void), (*release)(void), (*clean)(void), (*hold)(void);
} calls[] = {
	{ "nanosleep", call_nanosleep, FOR, 0, 0 },
	{ "nanosleep_rem", call_nanosleep_rem, FOR, 0, 0 },
	{ "clock_nanosleep", call_clock_nanosleep, FOR, 0, 0 },
	{ "clock_nanosleep_rem", call_clock_nanosleep_rem, FOR, 0, 0 },
	{ "clock_nanosleep_real", call_clock_nanosleep_real, FOR, 0, 0 },
	{ "until_monotonic", call_until_monotonic, UNTIL, 0, 0 },
	{ "until_realtime", call_until_realtime, UNTIL, 0, 0 },
	{ "poll_for", call_poll_for, FOR, 0, 0 },
	{ "ppoll_for", call_ppoll_for, FOR, 0, 0 },
	{ "select_for", call_select_for, FOR, 0, 0 },
	{ "pselect_for", call_pselect_for, FOR, 0, 0 },
	{ "epoll_for", call_epoll_for, FOR, 0, 0, make_epoll },
	{ "epoll_pwait2", call_epoll_pwait2, FOR, 0, 0, make_epoll },
	{ "epoll", call_epoll, RELEASED, 1, 0, make_epoll, write_byte },
	{ "futex_for", call_futex_for, FOR, -1, ETIMEDOUT },
	{ "futex_until", call_futex_until, UNTIL, -1, ETIMEDOUT },
	{ "sigtimedwait", call_sigtimedwait, FOR, -1, EAGAIN, block_usr1 },
	{ "semtimedop", call_semtimedop, FOR, -1, EAGAIN, make_semaphore, NULL, remove_semaphore },
	{ "read", call_read, RELEASED, 1, 0, NULL, write_byte },
	{ "write", call_write, RELEASED, 4, 0, fill, drain },
	{ "poll", call_poll, RELEASED, 1, 0, NULL, write_byte },
	{ "ppoll", call_ppoll, RELEASED, 1, 0, NULL, write_byte },
	{ "select", call_select, RELEASED, 1, 0, NULL, write_byte },
	{ "pselect", call_pselect, RELEASED, 1, 0, NULL, write_byte },
	{ "futex", call_futex, RELEASED, 0, 0, NULL, wake },
	{ "futex_bitset", call_futex_bitset, RELEASED, 0, 0, NULL, wake },
	{ "wait4", call_wait4, RELEASED, 0, 0, NULL, nothing },
	{ "waitid", call_waitid, RELEASED, 1, 0, NULL, nothing },
	{ "sigsuspend", call_sigsuspend, RELEASED, 1, 0, block_usr1, send_signal },
	{ "pause", call_pause, RELEASED, 1, 0, NULL, send_signal },
	{ "sigwaitinfo", call_sigwaitinfo, RELEASED, SIGUSR1, 0, block_usr1, send_signal },
	{ "semop", call_semop, RELEASED, 0, 0, make_semaphore, give, remove_semaphore },
	{ "msgrcv", call_msgrcv, RELEASED, 8, 0, make_queue, send_message, remove_queue },
	{ "flock", call_flock, RELEASED, 0, 0, open_locked, close_locked, NULL, hold_flock },
	{ "setlkw", call_setlkw, RELEASED, 0, 0, open_locked, close_locked, NULL, hold_posix },
	{ "open_fifo", call_open, RELEASED, 1, 0, make_fifo, open_other_end },
};

int main(int argc, char **argv)
{
	begin();
	expect(argc == 2, "usage");
	for (size_t i = 0; i < COUNT(calls); i++) {
		if (strcmp(calls[i].name, argv[1]))
			continue;
		length = timespec(LENGTH);
		pipe_and_word();
		if (calls[i].prepare)
			calls[i].prepare();
		switch (calls[i].kind) {
		case FOR: timed(calls[i].call, calls[i].want, calls[i].want_errno); break;
		case UNTIL: absolute(calls[i].call, calls[i].want, calls[i].want_errno); break;
		case RELEASED:
			if (calls[i].release)
				child = releaser(calls[i].hold, calls[i].release);
			int waits = calls[i].release == nothing;
			released(calls[i].call, waits && calls[i].call == call_wait4 ? child : calls[i].want);
			if (child && !waits)
				join_child(child);
		}
		if (calls[i].clean)
			calls[i].clean();
		return passed();
	}
	fail("no such call: %s", argv[1]);
}
