// Timers of timer_create(2), by raw calls: their ids are the kernel's. Times are those of a life without the gap.
#include "subject.h"

struct timer {
	clockid_t clock;
	int notify, signal;
	ns first, interval;
	int id;
	ns armed; // when, by CLOCK_MONOTONIC
};

static pid_t other_thread;
static _Atomic int caught[65], by_thread, values[65], ids[65];

static void tick(int signal, siginfo_t *info, void *context)
{
	(void)context;
	if (info->si_code != SI_TIMER)
		return;
	values[signal] = info->si_value.sival_int;
	ids[signal] = info->si_timerid;
	caught[signal]++;
	if (gettid() == other_thread)
		by_thread++;
}

static void *wait_for_ticks(void *unused)
{
	(void)unused;
	other_thread = gettid();
	for (;; nap(MS))
		;
	return NULL;
}

static ns of_timespec(struct timespec time)
{
	return time.tv_sec * SECOND + time.tv_nsec;
}

static void create(struct timer *timer)
{
	struct sigevent event = { .sigev_notify = timer->notify, .sigev_signo = timer->signal };
	event.sigev_value.sival_int = timer->signal + 1000;
	if (timer->notify == SIGEV_THREAD_ID)
		event._sigev_un._tid = timer->signal < SIGRTMIN + 6 ? other_thread : gettid();
	must(syscall(SYS_timer_create, timer->clock, &event, &timer->id));
}

static void arm(struct timer *timer)
{
	struct itimerspec time = { timespec(timer->interval), timespec(timer->first) };
	must(syscall(SYS_timer_settime, timer->id, 0, &time, NULL));
	timer->armed = now(CLOCK_MONOTONIC);
}

// A text that has the id, signal, value, target and clock of every timer.
static char *listed(void)
{
	static char text[2][4096];
	static int which;
	char *into = text[which++];
	int fd = must(open("/proc/self/timers", O_RDONLY | O_CLOEXEC));
	into[must(read(fd, into, sizeof text[0] - 1))] = 0;
	close(fd);
	// The /proc of another namespace has other numbers for who is told.
	for (char *at = into; !proc_is_ours() && (at = strstr(at, "id.")); at++)
		memmove(at + 3, strchr(at, '\n'), strlen(strchr(at, '\n')) + 1);
	return into;
}

static ns left_of(int id)
{
	struct itimerspec time;
	must(syscall(SYS_timer_gettime, id, &time));
	return of_timespec(time.it_value);
}

static int take(int signal, siginfo_t *info, ns limit)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signal);
	int taken = -1;
	for (ns deadline = now(CLOCK_MONOTONIC) + limit, left = limit; left >= 0; left = deadline - now(CLOCK_MONOTONIC)) {
		struct timespec time = timespec(left);
		taken = sigtimedwait(&set, info, &time);
		if (taken != -1 || errno != EINTR) // by a handler
			break;
	}
	return taken;
}

static int is_pending(int signal)
{
	sigset_t set;
	must(sigpending(&set));
	return sigismember(&set, signal);
}

// A periodic timer whose signal is pending does not fire again before that is taken, which tells of the times that
// were missed; it goes on in phase.
static void take_pending(const struct timer *timer)
{
	int number = timer->signal - SIGRTMIN;
	siginfo_t info;
	ns since = now(CLOCK_MONOTONIC), left;
	while ((left = left_of(timer->id)) < timer->interval / 2 || now(CLOCK_MONOTONIC) - since < timer->interval)
		nap(5 * MS);
	ns start = now(CLOCK_MONOTONIC);
	ns phase = (start + left - timer->armed - timer->first - gap_min) % timer->interval;
	expect(phase <= gap_max - gap_min + 20 * MS || phase >= timer->interval - 20 * MS, "signal %d: %lld ms off", number,
	       phase / MS);
	expect(take(timer->signal, &info, 0) == timer->signal, "signal %d is not pending", number);
	expect(info.si_code == SI_TIMER && info.si_timerid == timer->id && info.si_value.sival_int == timer->signal + 1000,
	       "signal %d: code %d, timer %d, value %d", number, info.si_code, info.si_timerid, info.si_value.sival_int);
	expect(info.si_overrun > 0, "signal %d: overrun %d", number, info.si_overrun);
	int again = take(timer->signal, &info, 0);
	if (now(CLOCK_MONOTONIC) - start < left)
		expect(again == -1, "signal %d has come twice", number);
	expect(again != -1 || take(timer->signal, &info, 10 * SECOND) == timer->signal, "signal %d: no other", number);
	expect(now(CLOCK_MONOTONIC) - start >= left - 5 * MS, "signal %d: too early", number);
}

// Its signal has been pending all the time: it tells how many periods were missed, as far as we know how long that was.
static void count_missed(const struct timer *timer)
{
	siginfo_t info;
	ns since = now(CLOCK_MONOTONIC) - timer->armed - timer->first;
	expect(take(timer->signal, &info, 0) == timer->signal, "signal %d is not pending", timer->signal - SIGRTMIN);
	ns until = now(CLOCK_MONOTONIC) - timer->armed - timer->first;
	ns least = (since - gap_max) / timer->interval - 1, most = (until - gap_min) / timer->interval + 1;
	expect(info.si_overrun >= least && info.si_overrun <= most && info.si_timerid == timer->id,
	       "signal %d: overrun %d, not %lld to %lld", timer->signal - SIGRTMIN, info.si_overrun, least, most);
}

// Arms it so that this many periods have gone by since it was due, and takes its signal.
static void take_late(struct timer *timer, int periods)
{
	struct itimerspec time = { timespec(timer->interval), timespec(now(timer->clock) - (2 * periods + 1) * timer->interval / 2) };
	must(syscall(SYS_timer_settime, timer->id, TIMER_ABSTIME, &time, NULL));
	timer->armed = now(CLOCK_MONOTONIC);
	timer->first = timer->interval / 2;
	siginfo_t info;
	expect(take(timer->signal, &info, 10 * SECOND) == timer->signal && info.si_timerid == timer->id);
	expect(info.si_overrun >= periods && syscall(SYS_timer_getoverrun, timer->id) == info.si_overrun, "%d", info.si_overrun);
}

// Counts that cannot be had again: of processor time, of another thread, of one whose next signal waits.
static int refused(void)
{
	sigset_t all;
	sigfillset(&all);
	must(sigprocmask(SIG_BLOCK, &all, NULL));
	pthread_t thread;
	zero(pthread_create(&thread, NULL, wait_for_ticks, NULL));
	while (!other_thread)
		nap(MS);
	struct timer timers[] = {
		{ CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGRTMIN + 6, 0, 1000 },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 7, 0, 50 * MS },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 8, 0, 100 * SECOND }, // is none of them
	};
	for (size_t i = 0; i < COUNT(timers); i++) {
		create(&timers[i]);
		take_late(&timers[i], i ? 2 : 0);
	}
	while (!syscall(SYS_timer_getoverrun, timers[0].id))
		take_late(&timers[0], 0);
	while (!is_pending(timers[1].signal))
		nap(MS);
	ready();
	wait_go();
	expect(syscall(SYS_timer_getoverrun, timers[2].id) == 2);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	if (argc == 2 && !strcmp(argv[1], "refused"))
		return refused();
	sigset_t blocked;
	sigemptyset(&blocked);
	for (int i = 6; i < 13; i++)
		sigaddset(&blocked, SIGRTMIN + i);
	must(sigprocmask(SIG_BLOCK, &blocked, NULL));
	pthread_t thread;
	zero(pthread_create(&thread, NULL, wait_for_ticks, NULL));
	while (!other_thread)
		nap(MS);
	clockid_t of_thread, of_process;
	zero(pthread_getcpuclockid(thread, &of_thread));
	zero(clock_getcpuclockid(0, &of_process));
	struct sigaction action = { .sa_sigaction = tick, .sa_flags = SA_SIGINFO | SA_RESTART };
	for (int i = 0; i < 6; i++)
		must(sigaction(SIGRTMIN + i, &action, NULL));
	struct timer all[] = {
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN, 1500 * MS, 0 },
		{ CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + 1, 300 * MS, 300 * MS },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR2, 0, 0 }, // goes, and leaves a gap in the ids
		{ CLOCK_BOOTTIME, SIGEV_THREAD_ID, SIGRTMIN + 2, 1200 * MS, 5 * SECOND },
		{ CLOCK_MONOTONIC, SIGEV_NONE, SIGRTMIN + 3, 100 * SECOND, 7 * SECOND },
		{ of_thread, SIGEV_SIGNAL, SIGRTMIN + 4, 1000 * SECOND, 3 * SECOND },
		{ CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGRTMIN + 4, 2000 * SECOND, 0 },
		{ of_process, SIGEV_SIGNAL, SIGRTMIN + 4, 3000 * SECOND, 0 },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 5, 0, 0 }, // never armed
		// Their signals are blocked, and pending.
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 6, MS, 400 * MS },
		{ CLOCK_REALTIME, SIGEV_THREAD_ID, SIGRTMIN + 7, MS, 300 * MS },
		{ CLOCK_BOOTTIME, SIGEV_SIGNAL, SIGRTMIN + 8, MS, 0 },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 9, MS, 100 * SECOND },
		{ CLOCK_BOOTTIME, SIGEV_THREAD_ID, SIGRTMIN + 12, 30 * MS, 20 * MS },
		// Their signals have been taken late.
		{ CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + 10, 0, 1000 * SECOND },
		{ CLOCK_MONOTONIC, SIGEV_THREAD_ID, SIGRTMIN + 11, 0, 40 * SECOND },
	};
	struct timer *late = &all[14];
	const struct timer *pending = &all[9];
	for (size_t i = 0; i < COUNT(all); i++)
		create(&all[i]);
	must(syscall(SYS_timer_delete, all[2].id));
	for (size_t i = 0; i < COUNT(all); i++)
		if (all[i].first)
			arm(&all[i]);
	take_late(&late[0], 70000);
	take_late(&late[1], 1);
	for (int i = 0; i < 5; i++)
		while (!is_pending(pending[i].signal))
			nap(MS);
	nap(400 * MS); // 20 periods of the last one
	const char *before = listed();
	ready();
	wait_go();

	for (int i = 0; i < 5; i++)
		expect(is_pending(pending[i].signal), "the signal of timer %d is not pending", pending[i].id);
	expect(syscall(SYS_timer_getoverrun, late[0].id) == 70000 && !is_pending(late[0].signal));
	expect(syscall(SYS_timer_getoverrun, late[1].id) == 1 && !is_pending(late[1].signal));
	const char *after = listed();
	expect(!strcmp(before, after), "not\n%s, but\n%s", before, after);
	for (size_t i = 0; i < COUNT(all); i++) {
		struct itimerspec time;
		if (i == 2) {
			expect(syscall(SYS_timer_gettime, all[i].id, &time) == -1 && errno == EINVAL, "it is back");
			continue;
		}
		must(syscall(SYS_timer_gettime, all[i].id, &time));
		ns passed_at_most = now(CLOCK_MONOTONIC) - all[i].armed - gap_min;
		ns left = of_timespec(time.it_value), interval = of_timespec(time.it_interval);
		if ((i == 0 && caught[SIGRTMIN]) || &all[i] == &pending[2] || !all[i].first) {
			expect(!left && !interval, "timer %zu is armed: %lld", i, left);
			continue;
		}
		expect(interval == all[i].interval, "timer %zu: interval %lld", i, interval);
		if (all[i].first >= 20 * SECOND)
			expect(left > all[i].first - passed_at_most - 20 * MS && left <= all[i].first + 20 * MS,
			       "timer %zu: %lld ms left of %lld, after at most %lld", i, left / MS, all[i].first / MS,
			       passed_at_most / MS);
	}
	count_missed(&pending[4]);
	take_pending(&pending[0]);
	take_pending(&pending[1]);
	siginfo_t info;
	expect(take(pending[2].signal, &info, 0) == pending[2].signal && info.si_code == SI_TIMER);
	expect(take(pending[3].signal, &info, 0) == pending[3].signal && !info.si_overrun);
	expect(take(pending[2].signal, &info, 0) == -1, "the signal of a timer without an interval has come twice");
	ns deadline = now(CLOCK_MONOTONIC) + 10 * SECOND;
	while ((!caught[SIGRTMIN] || !caught[SIGRTMIN + 2]) && now(CLOCK_MONOTONIC) < deadline)
		nap(5 * MS);
	int ticks = caught[SIGRTMIN + 1];
	nap(700 * MS);
	expect(caught[SIGRTMIN] == 1, "%d signals of the first", caught[SIGRTMIN]);
	expect(caught[SIGRTMIN + 1] > ticks, "the ticking one has stopped");
	expect(caught[SIGRTMIN + 2] >= 1 && by_thread >= caught[SIGRTMIN + 2], "its thread got %d", by_thread);
	expect(!caught[SIGRTMIN + 3] && !caught[SIGRTMIN + 4] && !caught[SIGRTMIN + 5], "signals of others");
	for (int i = 0; i < 3; i++) {
		int signal = SIGRTMIN + i, id = all[i == 2 ? 3 : i].id;
		expect(values[signal] == signal + 1000 && ids[signal] == id, "signal %d: value %d of timer %d, not %d", i,
		       values[signal], ids[signal], id);
	}
	struct timer next = { CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0 };
	create(&next);
	expect(next.id >= 0, "no more timers");
	return passed();
}
