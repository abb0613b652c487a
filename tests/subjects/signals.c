// Signal actions, masks, pending signals with what they carry, alternate stacks, interval timers.
#include "subject.h"
#include <sys/ucontext.h>

static volatile sig_atomic_t caught;

static void handler(int signal) { caught = signal; }
static void informed(int signal, siginfo_t *info, void *context)
{
	(void)context;
	caught = info->si_value.sival_int == 5 ? signal : -1;
}

static int actions(void)
{
	static const int flags[] = { 0, SA_RESTART, SA_NODEFER, SA_RESETHAND, SA_SIGINFO | SA_RESTART, SA_ONSTACK };
	struct sigaction set[65], got, plain = { .sa_handler = handler };
	for (int signal = 1; signal <= 64; signal++) {
		if (signal == SIGKILL || signal == SIGSTOP || signal == 32 || signal == 33)
			continue;
		memset(&set[signal], 0, sizeof set[signal]);
		int kind = signal % 4;
		if (kind == 0)
			set[signal].sa_handler = SIG_IGN;
		if (kind > 1) {
			set[signal].sa_flags = flags[signal % COUNT(flags)];
			set[signal].sa_handler = handler;
			if (set[signal].sa_flags & SA_SIGINFO)
				set[signal].sa_sigaction = informed;
			sigaddset(&set[signal].sa_mask, 1 + signal % 31);
			sigaddset(&set[signal].sa_mask, SIGRTMIN + 1 + signal % 29);
		}
		must(sigaction(signal, &set[signal], &got));
		must(sigaction(signal, NULL, &set[signal])); // with the flag of the library's restorer
	}
	ready();
	wait_go();
	for (int signal = 1; signal <= 64; signal++) {
		if (signal == SIGKILL || signal == SIGSTOP || signal == 32 || signal == 33)
			continue;
		must(sigaction(signal, NULL, &got));
		expect(got.sa_handler == set[signal].sa_handler && got.sa_flags == set[signal].sa_flags, "signal %d", signal);
		expect(!memcmp(&got.sa_mask, &set[signal].sa_mask, 8), "mask of signal %d", signal);
	}
	must(sigaction(SIGUSR1, &plain, NULL));
	raise(SIGUSR1);
	expect(caught == SIGUSR1);
	return passed();
}

static void block(sigset_t *set, const int *signals, size_t count)
{
	sigemptyset(set);
	for (size_t i = 0; i < count; i++)
		sigaddset(set, signals[i]);
	zero(pthread_sigmask(SIG_BLOCK, set, NULL));
}

static void expect_next(const sigset_t *set, int signal, int code, int value)
{
	siginfo_t info;
	// The C library's own hides SI_TKILL.
	int got = syscall(SYS_rt_sigtimedwait, set, &info, &(struct timespec){ 0 }, 8);
	expect(got == signal, "signal %d instead of %d", got, signal);
	expect(info.si_code == code, "signal %d: code %d", signal, info.si_code);
	expect(info.si_pid == getpid() && info.si_uid == getuid(), "signal %d: from %d", signal, info.si_pid);
	expect(code != SI_QUEUE || info.si_value.sival_int == value, "signal %d: value %d", signal, info.si_value.sival_int);
}

static int tgkill_(pid_t tid, int signal) { return syscall(SYS_tgkill, getpid(), tid, signal); }

static pthread_barrier_t barrier;
static _Atomic pid_t second;

static void *other(void *with_continue)
{
	// With all of them blocked, a checkpoint has to stop it by SIGSTOP.
	const int mine[] = { SIGUSR2, SIGRTMIN + 4, SIGCONT, SIGURG, SIGWINCH, SIGCHLD };
	sigset_t set;
	block(&set, mine, with_continue ? COUNT(mine) : 2);
	second = gettid();
	pthread_barrier_wait(&barrier);
	wait_go();
	expect_next(&set, SIGUSR2, SI_TKILL, 0);
	if (with_continue)
		expect_next(&set, SIGCONT, SI_TKILL, 0);
	for (int value = 3; value > 0; value--)
		expect_next(&set, SIGRTMIN + 4, SI_QUEUE, value);
	sigdelset(&set, SIGCONT); // that of the process is for the other thread to take
	expect(sigtimedwait(&set, NULL, &(struct timespec){ 0 }) == -1 && errno == EAGAIN);
	return NULL;
}

// To the process and to each of two threads; standard ones, queued ones in their order, and SIGCONT.
static void take_continue(void)
{
	sigset_t only;
	sigemptyset(&only);
	sigaddset(&only, SIGCONT);
	sigtimedwait(&only, NULL, &(struct timespec){ 0 });
}

static int pend(int with_continue)
{
	const int all[] = { SIGUSR1, SIGCONT, SIGHUP, SIGRTMIN + 2, SIGRTMIN + 3, SIGTERM };
	sigset_t set;
	block(&set, all, COUNT(all));
	zero(pthread_barrier_init(&barrier, NULL, 2));
	pthread_t thread;
	zero(pthread_create(&thread, NULL, other, with_continue ? &thread : NULL));
	pthread_barrier_wait(&barrier);
	must(kill(getpid(), SIGUSR1));
	if (with_continue) {
		must(kill(getpid(), SIGCONT));
		must(tgkill_(second, SIGCONT));
	}
	must(tgkill_(gettid(), SIGHUP));
	for (int value = 1; value <= 40; value++) {
		must(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = value }));
		must(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = -value }));
	}
	must(sigqueue(getpid(), SIGTERM, (union sigval){ .sival_int = 77 }));
	must(tgkill_(second, SIGUSR2));
	for (int value = 3; value > 0; value--) {
		siginfo_t info = { .si_signo = SIGRTMIN + 4, .si_code = SI_QUEUE, .si_pid = getpid(), .si_uid = getuid() };
		info.si_value.sival_int = value;
		must(syscall(SYS_rt_tgsigqueueinfo, getpid(), second, SIGRTMIN + 4, &info));
	}
	ready();
	wait_go();
	zero(pthread_join(thread, NULL));
	expect_next(&set, SIGHUP, SI_TKILL, 0);
	expect_next(&set, SIGUSR1, SI_USER, 0);
	expect_next(&set, SIGTERM, SI_QUEUE, 77);
	if (with_continue)
		expect_next(&set, SIGCONT, SI_USER, 0);
	else
		take_continue(); // perhaps somebody has stopped and continued us
	for (int value = 1; value <= 40; value++)
		expect_next(&set, SIGRTMIN + 2, SI_QUEUE, -value);
	for (int value = 1; value <= 40; value++)
		expect_next(&set, SIGRTMIN + 3, SI_QUEUE, value);
	expect(sigtimedwait(&set, NULL, &(struct timespec){ 0 }) == -1 && errno == EAGAIN);
	return passed();
}

static int pending(void) { return pend(1); }
static int pending_others(void) { return pend(0); }

// A child has ended: SIGCHLD is pending with its status, and so is its wait.
static int of_child(void)
{
	const int all[] = { SIGCHLD };
	sigset_t set;
	block(&set, all, 1);
	pid_t child = must(fork());
	if (!child)
		_exit(23);
	while (sigpending(&set), !sigismember(&set, SIGCHLD))
		nap(MS);
	ready();
	wait_go();
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	expect(sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGCHLD);
	expect(info.si_code == CLD_EXITED && info.si_pid == child && info.si_status == 23);
	int status;
	expect(waitpid(child, &status, WNOHANG) == child && WEXITSTATUS(status) == 23);
	return passed();
}

static char stack_memory[65536];

static void on_stack(int signal)
{
	char here;
	expect(&here > stack_memory && &here < stack_memory + sizeof stack_memory, "not on its stack");
	stack_t stack;
	must(sigaltstack(NULL, &stack));
	expect(stack.ss_flags == SS_ONSTACK && stack.ss_sp == stack_memory);
	ready();
	wait_go();
	must(sigaltstack(NULL, &stack));
	expect(stack.ss_flags == SS_ONSTACK && stack.ss_sp == stack_memory && stack.ss_size == sizeof stack_memory);
	sigset_t now_blocked;
	sigprocmask(SIG_BLOCK, NULL, &now_blocked);
	expect(sigismember(&now_blocked, SIGUSR1) && sigismember(&now_blocked, SIGUSR2));
	caught = signal;
}

static int altstack(void)
{
	must(sigaltstack(&(stack_t){ .ss_sp = stack_memory, .ss_size = sizeof stack_memory }, NULL));
	struct sigaction action = { .sa_handler = on_stack, .sa_flags = SA_ONSTACK };
	sigaddset(&action.sa_mask, SIGUSR2);
	must(sigaction(SIGUSR1, &action, NULL));
	raise(SIGUSR1);
	expect(caught == SIGUSR1);
	stack_t stack;
	must(sigaltstack(NULL, &stack));
	expect(stack.ss_flags == 0 && stack.ss_sp == stack_memory);
	sigset_t now_blocked;
	sigprocmask(SIG_BLOCK, NULL, &now_blocked);
	expect(!sigismember(&now_blocked, SIGUSR1) && !sigismember(&now_blocked, SIGUSR2));
	return passed();
}

static volatile ns rang;
static void ring(int signal)
{
	(void)signal;
	if (!rang)
		rang = now(CLOCK_MONOTONIC);
}

static ns of_timeval(struct timeval time) { return time.tv_sec * SECOND + time.tv_usec * 1000; }

// One that rings once after 1.5 s, and two that count the time of a processor.
static int timers(void)
{
	signal(SIGALRM, ring);
	const ns length = 1500 * MS;
	struct itimerval once = { .it_value = { 1, 500000 } }, slow = { { 7, 0 }, { 100, 0 } }, got;
	ns start = now(CLOCK_MONOTONIC);
	must(setitimer(ITIMER_REAL, &once, NULL));
	must(setitimer(ITIMER_VIRTUAL, &slow, NULL));
	must(setitimer(ITIMER_PROF, &slow, NULL));
	ready();
	wait_go();
	while (!rang && now(CLOCK_MONOTONIC) < start + length + gap_max + SECOND)
		pause();
	expect(rang, "it never rings");
	expect_relative(start, rang, length);
	for (int which = ITIMER_VIRTUAL; which <= ITIMER_PROF; which++) {
		must(getitimer(which, &got));
		expect(of_timeval(got.it_interval) == 7 * SECOND, "interval of timer %d", which);
		ns value = of_timeval(got.it_value); // the kernel adds a tick to what it is given
		expect(value > 98 * SECOND && value <= 100 * SECOND + 20 * MS, "timer %d: %lld us left", which, value / 1000);
	}
	return passed();
}

// One that rings again and again, at the same moments.
static volatile int ticks;
static void tick(int signal) { (void)signal; ticks++; }
static int ticking(void)
{
	signal(SIGALRM, tick);
	ns start = now(CLOCK_MONOTONIC);
	must(setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 50000 }, { 0, 50000 } }, NULL));
	ready();
	wait_go();
	int before = ticks;
	nap(500 * MS);
	int seen = ticks;
	expect(seen >= before + 3, "%d ticks in half a second", seen - before);
	ns end = now(CLOCK_MONOTONIC);
	// A tick that is late is not lost, unless the next one is due as well.
	expect(seen <= (end - start - gap_min) / (50 * MS) + 1, "%d ticks in %lld us", seen, (end - start) / 1000);
	expect(seen >= (end - start - gap_max) / (50 * MS) / 2 - 4, "%d ticks in %lld us", seen, (end - start) / 1000);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "actions", actions }, { "pending", pending }, { "pending_others", pending_others }, { "of_child", of_child },
		{ "altstack", altstack }, { "timers", timers }, { "ticking", ticking },
	};
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
