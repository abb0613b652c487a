// Holds what cannot be checkpointed, and a lot that a checkpoint could disturb: both must be as before.
#include "subject.h"
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

static _Atomic int over;
static volatile int ticks;
static void tick(int signal) { (void)signal; ticks++; }

static void *count(void *sum)
{
	uint64_t number = 0, total = 0;
	while (!over)
		total += ++number;
	*(int *)sum = total == (number % 2 ? (number + 1) / 2 * number : number / 2 * (number + 1));
	return NULL;
}

int main(void)
{
	begin();
	int event = must(eventfd(7, 0)), timer = must(timerfd_create(CLOCK_MONOTONIC, 0));
	int socket_ = must(socket(AF_INET, SOCK_STREAM, 0));
	pid_t child = must(fork());
	if (!child) {
		must(inotify_init());
		wait_go();
		return 0;
	}
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + 1);
	zero(pthread_sigmask(SIG_BLOCK, &set, NULL));
	must(kill(getpid(), SIGUSR1));
	must(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = 9 }));
	int right = 0;
	pthread_t thread;
	zero(pthread_create(&thread, NULL, count, &right));
	signal(SIGALRM, tick);
	must(setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 20000 }, { 0, 20000 } }, NULL));
	ready();
	wait_go();
	int before = ticks;
	nap(200 * MS);
	expect(ticks > before + 4, "%d ticks", ticks - before);
	over = 1;
	zero(pthread_join(thread, NULL));
	expect(right, "the sum is wrong");
	uint64_t value;
	expect(read(event, &value, 8) == 8 && value == 7);
	siginfo_t info;
	expect(sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGUSR1);
	expect(sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGRTMIN + 1 && info.si_value.sival_int == 9);
	close(timer);
	close(socket_);
	join_child(child);
	return passed();
}
