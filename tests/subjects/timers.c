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
		event._sigev_un._tid = other_thread;
	must(syscall(SYS_timer_create, timer->clock, &event, &timer->id));
}

static void arm(struct timer *timer)
{
	struct itimerspec time = { timespec(timer->interval), timespec(timer->first) };
	must(syscall(SYS_timer_settime, timer->id, 0, &time, NULL));
	timer->armed = now(CLOCK_MONOTONIC);
}

int main(void)
{
	begin();
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
		{ CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + 1, 20 * MS, 20 * MS },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR2, 0, 0 }, // goes, and leaves a gap in the ids
		{ CLOCK_BOOTTIME, SIGEV_THREAD_ID, SIGRTMIN + 2, 1200 * MS, 5 * SECOND },
		{ CLOCK_MONOTONIC, SIGEV_NONE, SIGRTMIN + 3, 100 * SECOND, 7 * SECOND },
		{ of_thread, SIGEV_SIGNAL, SIGRTMIN + 4, 1000 * SECOND, 3 * SECOND },
		{ CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGRTMIN + 4, 2000 * SECOND, 0 },
		{ of_process, SIGEV_SIGNAL, SIGRTMIN + 4, 3000 * SECOND, 0 },
		{ CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 5, 0, 0 }, // never armed
	};
	for (size_t i = 0; i < COUNT(all); i++)
		create(&all[i]);
	must(syscall(SYS_timer_delete, all[2].id));
	for (size_t i = 0; i < COUNT(all); i++)
		if (all[i].first)
			arm(&all[i]);
	ready();
	wait_go();

	for (size_t i = 0; i < COUNT(all); i++) {
		struct itimerspec time;
		if (i == 2) {
			expect(syscall(SYS_timer_gettime, all[i].id, &time) == -1 && errno == EINVAL, "it is back");
			continue;
		}
		must(syscall(SYS_timer_gettime, all[i].id, &time));
		ns passed_at_most = now(CLOCK_MONOTONIC) - all[i].armed - gap_min;
		ns left = of_timespec(time.it_value), interval = of_timespec(time.it_interval);
		if ((i == 0 && caught[SIGRTMIN]) || !all[i].first) {
			expect(!left && !interval, "timer %zu is armed: %lld", i, left);
			continue;
		}
		expect(interval == all[i].interval, "timer %zu: interval %lld", i, interval);
		if (all[i].first >= 100 * SECOND)
			expect(left > all[i].first - passed_at_most - 20 * MS && left <= all[i].first + 20 * MS,
			       "timer %zu: %lld ms left of %lld, after at most %lld", i, left / MS, all[i].first / MS,
			       passed_at_most / MS);
	}
	ns deadline = now(CLOCK_MONOTONIC) + 10 * SECOND;
	while ((!caught[SIGRTMIN] || !caught[SIGRTMIN + 2]) && now(CLOCK_MONOTONIC) < deadline)
		nap(5 * MS);
	int ticks = caught[SIGRTMIN + 1];
	nap(200 * MS);
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
