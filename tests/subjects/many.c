// Many tasks, no two alike: threads of one process, asked and rebuilt several at a time; a tree of processes.
#include "subject.h"
#include <sys/resource.h>

enum { THREADS = 120, PROCESSES = 40 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int stage, there;

// What only the thread itself can tell, or only its own number.
struct own {
	char name[16];
	sigset_t mask;
	stack_t stack;
	int nice, slack, cpus;
	pid_t tid;
	pthread_t self;
};

static struct own look(void)
{
	struct own own = { .tid = gettid(), .self = pthread_self() };
	cpu_set_t cpus;
	must(prctl(PR_GET_NAME, own.name));
	zero(pthread_sigmask(SIG_BLOCK, NULL, &own.mask));
	must(sigaltstack(NULL, &own.stack));
	own.nice = getpriority(PRIO_PROCESS, own.tid);
	own.slack = must(prctl(PR_GET_TIMERSLACK));
	must(sched_getaffinity(0, sizeof cpus, &cpus));
	own.cpus = CPU_COUNT(&cpus);
	return own;
}

static void *one(void *number)
{
	long me = (long)number;
	char name[16];
	sigset_t mask;
	cpu_set_t cpus;
	snprintf(name, sizeof name, "thread %ld", me);
	must(prctl(PR_SET_NAME, name));
	sigemptyset(&mask);
	for (int bit = 0; bit < 8; bit++)
		if (me >> bit & 1)
			sigaddset(&mask, SIGRTMIN + bit);
	if (me % 7 == 0)
		sigaddset(&mask, SIGURG);
	if (me == 77)
		sigfillset(&mask);
	zero(pthread_sigmask(SIG_SETMASK, &mask, NULL));
	if (me % 3) {
		stack_t stack = { .ss_sp = malloc(MINSIGSTKSZ + me), .ss_size = MINSIGSTKSZ + me };
		must(sigaltstack(&stack, NULL));
	}
	must(setpriority(PRIO_PROCESS, gettid(), me % 5));
	must(prctl(PR_SET_TIMERSLACK, 50000 + me));
	must(sched_getaffinity(0, sizeof cpus, &cpus));
	if (me % 4 == 1 && CPU_COUNT(&cpus) > 1)
		for (int cpu = CPU_SETSIZE - 1; cpu >= 0; cpu--)
			if (CPU_ISSET(cpu, &cpus)) {
				CPU_CLR(cpu, &cpus);
				must(sched_setaffinity(0, sizeof cpus, &cpus));
				break;
			}
	struct own before = look();
	zero(pthread_mutex_lock(&lock));
	there++;
	if (me % 2)
		while (!stage)
			zero(pthread_cond_wait(&changed, &lock));
	zero(pthread_mutex_unlock(&lock));
	if (me % 2 == 0) // asleep, with a time that remains
		for (; !__atomic_load_n(&stage, __ATOMIC_SEQ_CST);)
			nap(300 * MS);
	struct own after = look();
	expect(!memcmp(&before, &after, sizeof before), "%s is %s: tid %d->%d nice %d->%d slack %d->%d cpus %d->%d stack %zu->%zu",
	       before.name, after.name, before.tid, after.tid, before.nice, after.nice, before.slack, after.slack,
	       before.cpus, after.cpus, before.stack.ss_size, after.stack.ss_size);
	return number;
}

static int threads(void)
{
	static pthread_t all[THREADS];
	pthread_attr_t small;
	zero(pthread_attr_init(&small));
	zero(pthread_attr_setstacksize(&small, 64 * 1024));
	for (long i = 0; i < THREADS; i++)
		zero(pthread_create(&all[i], &small, one, (void *)i));
	for (int now = 0; now < THREADS; nap(MS)) {
		zero(pthread_mutex_lock(&lock));
		now = there;
		zero(pthread_mutex_unlock(&lock));
	}
	ready();
	wait_go();
	zero(pthread_mutex_lock(&lock));
	__atomic_store_n(&stage, 1, __ATOMIC_SEQ_CST);
	zero(pthread_cond_broadcast(&changed));
	zero(pthread_mutex_unlock(&lock));
	for (long i = 0; i < THREADS; i++) {
		void *result;
		zero(pthread_join(all[i], &result));
		expect(result == (void *)i);
	}
	return passed();
}

// Process number i has the children 4i+1 to 4i+4.
static int processes(void)
{
	struct { _Atomic int there, go; } *common =
		must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	static int own; // in memory that is its own after fork(2)
	pid_t children[4];
	int count = 0;
	for (int child = 4 * own + 1; child <= 4 * own + 4 && child < PROCESSES; child++) {
		pid_t pid = must(fork());
		if (pid) {
			children[count++] = pid;
		} else {
			own = child;
			count = 0;
			child = 4 * own;
		}
	}
	char name[16], got[16];
	snprintf(name, sizeof name, "process %d", own);
	must(prctl(PR_SET_NAME, name));
	int number = own;
	pid_t pid = getpid(), parent = getppid();
	common->there++;
	if (!own) {
		while (common->there < PROCESSES)
			nap(MS);
		ready();
		wait_go();
		common->go = 1;
	}
	while (!common->go)
		nap(20 * MS);
	must(prctl(PR_GET_NAME, got));
	expect(!strcmp(name, got) && number == own && pid == getpid() && (!own || parent == getppid()), "%s is %s", name, got);
	for (int i = 0; i < count; i++)
		join_child(children[i]);
	if (own)
		_exit(0);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	if (argc == 2 && !strcmp(argv[1], "threads"))
		return threads();
	if (argc == 2 && !strcmp(argv[1], "processes"))
		return processes();
	fail("usage");
}
