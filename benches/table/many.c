/* Many tasks and files: `many THREADS PROCESSES FILES WATCHES SHARED`. A tree of processes, each with eight children as
   far as they go, in which each has that many threads. Of four threads three wait for a futex and one sleeps. The first
   process has that many open files, half of them event counters, and an epoll instance for that many of these; its
   descendants have it all, too, or share its one table. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
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

static void open_files(long files, long watches, const char *program)
{
	struct rlimit limit;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	int epoll = watches ? epoll_create1(0) : 0;
	for (long i = 0; i < files || i < watches; i++) {
		int counter = i % 2 == 0 || i < watches;
		int fd = counter ? eventfd(i, EFD_NONBLOCK) : open(program, O_RDONLY);
		struct epoll_event event = { EPOLLIN, { .u64 = i } };
		if (fd < 0 || (i < watches && epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)))
			die("a file");
		if (!counter)
			lseek(fd, i, SEEK_SET);
	}
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	long threads = atol(argv[1]), processes = atol(argv[2]), own = 0, shared = atol(argv[5]);
	atomic_long *there = mmap(NULL, sizeof *there, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	setsid();
	close_range(3, ~0u, 0);
	for (uint64_t place = 0; place < 512; place++) {
		uint64_t mixed = (place + 1) * 0x9e3779b97f4a7c15u;
		contents[place] = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u ^ mixed >> 29;
	}
	printf("%lu\n", (unsigned long)contents);
	fflush(stdout);
	open_files(atol(argv[3]), atol(argv[4]), argv[0]);
	for (long child = own * CHILDREN + 1; child <= own * CHILDREN + CHILDREN && child < processes; child++) {
		pid_t pid = syscall(SYS_clone, SIGCHLD | (shared ? CLONE_FILES : 0), 0, 0, 0, 0);
		if (pid < 0)
			die("fork");
		if (pid == 0) {
			own = child;
			child = own * CHILDREN;
		}
	}
	start_threads(threads);
	/* Those who share it let go of it together. */
	atomic_fetch_add(there, 1);
	while (shared && own == 0 && atomic_load(there) < processes)
		usleep(1000);
	/* When all have let go of the pipe, all are ready: but for their last step, for which there is no sign. */
	if (!shared || own == 0)
		dup2(0, 1);
	for (;;)
		pause();
}
