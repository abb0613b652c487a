/* Many tasks: `many THREADS PROCESSES`. A tree of processes, each with eight children as far as they go, in which each
   has that many threads. Of four threads three wait for a futex and one sleeps. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHILDREN 8

/* As benches/table/subject.rs fills it. */
static uint64_t contents[512];
static pthread_barrier_t started;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *wait_for_ever(void *number)
{
	pthread_barrier_wait(&started);
	if ((long)number % 4 == 0)
		for (;;)
			sleep(100000);
	pthread_mutex_lock(&lock);
	for (;;)
		pthread_cond_wait(&never, &lock);
	return NULL;
}

static void start_threads(long count)
{
	pthread_attr_t small;
	pthread_t thread;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 16384);
	pthread_barrier_init(&started, NULL, count);
	for (long i = 1; i < count; i++)
		if (pthread_create(&thread, &small, wait_for_ever, (void *)i))
			die("pthread_create");
	pthread_barrier_wait(&started);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	long threads = atol(argv[1]), processes = atol(argv[2]), own = 0;
	setsid();
	close_range(3, ~0u, 0);
	for (uint64_t place = 0; place < 512; place++) {
		uint64_t mixed = (place + 1) * 0x9e3779b97f4a7c15u;
		contents[place] = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u ^ mixed >> 29;
	}
	printf("%lu\n", (unsigned long)contents);
	fflush(stdout);
	for (long child = own * CHILDREN + 1; child <= own * CHILDREN + CHILDREN && child < processes; child++) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (pid == 0) {
			own = child;
			child = own * CHILDREN;
		}
	}
	start_threads(threads);
	/* When all have let go of the pipe, all are ready: but for their last step, for which there is no sign. */
	dup2(0, 1);
	for (;;)
		pause();
}
