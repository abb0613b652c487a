// Numbers: a process, its child, its threads and its timer know each other by them, whatever they are outside.
#include "subject.h"
#include <sched.h>
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

struct numbers {
	pid_t pid, tid, group, session, thread, child, parent_of_child, group_of_child;
};

static pid_t thread, child;
static _Atomic int *parent_of_child;
static _Atomic int ticks;
static timer_t timer;

static struct numbers look(void)
{
	return (struct numbers){ getpid(), gettid(), getpgrp(), getsid(0), thread, child, *parent_of_child, getpgid(child) };
}

static void tick(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	ticks += gettid() == thread;
}

static void *threaded(void *unused)
{
	thread = gettid();
	for (;;)
		pause();
	return unused;
}

// A signal from the child waits, and says who sent it.
static void is_from_child(void)
{
	siginfo_t info;
	sigset_t usr1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	expect(sigtimedwait(&usr1, &info, &(struct timespec){ 0, 0 }) == SIGUSR1, "it does not wait");
	expect(info.si_pid == child && info.si_value.sival_int == 77, "from %d, not %d", info.si_pid, child);
}

static void set_up(void)
{
	parent_of_child = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t own = getpid();
	sigset_t usr1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	must(sigprocmask(SIG_BLOCK, &usr1, NULL));
	child = must(fork());
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		must(sigqueue(own, SIGUSR1, (union sigval){ 77 }));
		for (;; nap(MS))
			*parent_of_child = getppid();
	}
	must(sigaction(SIGRTMIN, &(struct sigaction){ .sa_sigaction = tick, .sa_flags = SA_SIGINFO | SA_RESTART }, NULL));
	pthread_t made;
	zero(pthread_create(&made, NULL, threaded, NULL));
	while (!thread || !*parent_of_child)
		nap(MS);
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN };
	event.sigev_notify_thread_id = thread;
	must(timer_create(CLOCK_MONOTONIC, &event, &timer));
	nap(10 * MS);
}

// An orphan of ours goes to process 1, which must wait for it.
static void orphan_is_waited_for(void)
{
	_Atomic int *orphan = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t between = must(fork());
	if (!between) {
		pid_t parent = getpid();
		if (!must(fork())) {
			orphan[0] = getpid();
			while (getppid() == parent)
				nap(MS);
			_exit(getppid() != 1);
		}
		_exit(0);
	}
	expect(must(waitpid(between, NULL, 0)) == between);
	for (int i = 0; !orphan[0] || !kill(orphan[0], 0); i++, nap(MS))
		expect(i < 5000, "nobody waits for the orphan");
}

static int run(const char *part)
{
	set_up();
	struct numbers before = look();
	ready();
	wait_go();
	*parent_of_child = 0;
	for (int i = 0; !*parent_of_child; i++, nap(MS))
		expect(i < 5000, "the child does not run");
	if (!access(in_base("inherited"), F_OK))
		before.session = before.group = before.group_of_child = 0;
	struct numbers after = look();
	const pid_t *old = &before.pid, *new = &after.pid;
	for (size_t i = 0; i < sizeof before / sizeof *old; i++)
		expect(old[i] == new[i], "number %zu: %d -> %d", i, old[i], new[i]);
	is_from_child();
	must(timer_settime(timer, 0, &(struct itimerspec){ .it_value = timespec(MS) }, NULL));
	for (int i = 0; !ticks; i++, nap(MS))
		expect(i < 5000, "the timer does not signal its thread");
	must(kill(child, SIGTERM));
	int status;
	expect(must(waitpid(child, &status, 0)) == child && WTERMSIG(status) == SIGTERM);
	if (!strcmp(part, "check"))
		return passed();
	if (getppid() == 1)
		orphan_is_waited_for();
	if (!strcmp(part, "killed"))
		kill(getpid(), SIGKILL);
	return 42;
}

int main(int argc, char **argv)
{
	begin();
	expect(argc == 2);
	if (!strcmp(argv[1], "nested")) {
		must(unshare(CLONE_NEWPID));
		pid_t pid = must(fork());
		if (!pid)
			for (;;)
				pause();
		ready();
		wait_go();
		must(kill(pid, SIGKILL));
		must(waitpid(pid, NULL, 0));
		return passed();
	}
	if (!strcmp(argv[1], "proc")) {
		must(open("/proc/self/stat", O_RDONLY));
		ready();
		wait_go();
		return passed();
	}
	if (strcmp(argv[1], "member"))
		return run(argv[1]);
	// The root of the tree is in its parent's session and group.
	pid_t pid = must(fork());
	if (!pid)
		return run(argv[1]);
	must(waitpid(pid, NULL, 0));
	return passed();
}
