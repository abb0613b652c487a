// Trees of processes with sessions and groups, the dead, the stopped, and threads.
#include "subject.h"
#include <spawn.h>
#include <sys/rseq.h>

// --- a tree: each member checks that it still is who it was, next to whom it was ---
struct member {
	pid_t pid, parent, group, session;
};

static struct member self(void)
{
	return (struct member){ getpid(), getppid(), getpgrp(), getsid(0) };
}

static _Atomic int *settled;

// Every member waits for the test, then for its own children.
static void settle(const pid_t *children, int count)
{
	struct member before = self();
	(*settled)++;
	wait_go();
	struct member after = self();
	expect(!memcmp(&before, &after, sizeof before), "pid %d->%d parent %d->%d group %d->%d session %d->%d",
	       before.pid, after.pid, before.parent, after.parent, before.group, after.group, before.session, after.session);
	for (int i = 0; i < count; i++)
		join_child(children[i]);
}

// In the session of its parent, born before the parent left it; `own` group or that of `group`.
static pid_t child_in_group(pid_t group)
{
	pid_t pid = must(fork());
	if (pid) {
		setpgid(pid, group ? group : pid);
		return pid;
	}
	setpgid(0, group);
	settle(NULL, 0);
	_exit(0);
}

static pid_t session_of_its_own(void)
{
	pid_t pid = must(fork());
	if (pid)
		return pid;
	pid_t children[4];
	children[0] = must(fork()); // stays in the old session
	if (!children[0]) {
		settle(NULL, 0);
		_exit(0);
	}
	must(setsid());
	children[1] = child_in_group(0);
	children[2] = child_in_group(children[1]);
	children[3] = must(fork());
	if (!children[3]) {
		pid_t deeper = must(fork());
		if (!deeper) {
			must(setsid());
			settle(NULL, 0);
			_exit(0);
		}
		settle(&deeper, 1);
		_exit(0);
	}
	settle(children, 4);
	_exit(0);
}

static int sessions(void)
{
	settled = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t leader = child_in_group(0);
	pid_t children[] = { leader, child_in_group(leader), session_of_its_own(), child_in_group(getpgrp()) };
	while (*settled < 9)
		nap(MS);
	ready();
	settle(children, COUNT(children));
	return passed();
}

// --- the dead that nobody has waited for ---
static int zombies(void)
{
	static const int ends[] = { 0, 255, 7, -SIGKILL, -SIGTERM, -SIGSEGV };
	pid_t pids[COUNT(ends)];
	for (size_t i = 0; i < COUNT(ends); i++) {
		if ((pids[i] = must(fork())))
			continue;
		if (ends[i] >= 0)
			_exit(ends[i]);
		prctl(PR_SET_DUMPABLE, 0); // no core files
		signal(-ends[i], SIG_DFL);
		kill(getpid(), -ends[i]);
		pause();
	}
	for (size_t i = 0; i < COUNT(ends); i++)
		must(waitid(P_PID, pids[i], NULL, WEXITED | WNOWAIT));
	ready();
	wait_go();
	for (size_t i = 0; i < COUNT(ends); i++) {
		int status;
		expect(waitpid(pids[i], &status, WNOHANG) == pids[i]);
		int end = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
		expect(end == ends[i], "%d instead of %d", end, ends[i]);
		expect(WIFEXITED(status) || !WCOREDUMP(status));
	}
	return passed();
}

// --- stopped children: they stay so until somebody continues them, and the rest of the tree runs ---
static int stopped(void)
{
	_Atomic int *count = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t pids[2];
	for (int i = 0; i < 2; i++) {
		pids[i] = must(fork());
		if (!pids[i]) {
			setpgid(0, 0); // terminal stops have no effect in an orphaned group
			for (;; nap(MS))
				if (count[i]++ && !access(in_base("enough"), F_OK))
					_exit(i + 40);
		}
	}
	nap(20 * MS);
	must(kill(pids[0], SIGSTOP));
	must(kill(pids[1], SIGTSTP));
	for (int i = 0; i < 2; i++) {
		int status;
		expect(must(waitpid(pids[i], &status, WUNTRACED)) == pids[i] && WIFSTOPPED(status));
	}
	int before[] = { count[0], count[1] };
	ready();
	wait_go();
	nap(50 * MS);
	for (int i = 0; i < 2; i++)
		expect(count[i] == before[i], "child %d ran", i);
	put_file("enough", "");
	for (int i = 0; i < 2; i++) {
		int status;
		must(kill(pids[i], SIGCONT));
		expect(must(waitpid(pids[i], &status, 0)) == pids[i] && WIFEXITED(status) && WEXITSTATUS(status) == i + 40);
		expect(count[i] > before[i]);
	}
	return passed();
}

// --- a parent that its child keeps in an uninterruptible wait ---
static int vforked(void)
{
	pid_t child = vfork();
	if (!child) {
		ready();
		wait_go();
		_exit(0);
	}
	join_child(must(child));
	return passed();
}

// The same by the call that posix_spawn(3) makes: its child opens a fifo, and waits for somebody to do the same.
static void *herald(void *unused)
{
	nap(50 * MS);
	ready();
	wait_go();
	close(must(open(in_base("fifo"), O_WRONLY)));
	return unused;
}

static int spawned(void)
{
	posix_spawn_file_actions_t actions;
	must(mkfifo(in_base("fifo"), 0600));
	zero(posix_spawn_file_actions_init(&actions));
	zero(posix_spawn_file_actions_addopen(&actions, 0, in_base("fifo"), O_RDONLY, 0));
	pthread_t thread;
	pid_t child;
	zero(pthread_create(&thread, NULL, herald, NULL));
	zero(posix_spawn(&child, "/bin/true", &actions, NULL, (char *[]){ "true", NULL }, environ));
	join_child(child);
	zero(pthread_join(thread, NULL));
	return passed();
}

// --- threads ---
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int stage;
static __thread uint64_t own;

static void *worker(void *number)
{
	long me = (long)number;
	char name[16], got[16];
	sigset_t mask, after;
	own = me * 1000;
	pid_t tid = gettid();
	snprintf(name, sizeof name, "worker %ld", me);
	zero(pthread_setname_np(pthread_self(), name));
	sigemptyset(&mask);
	sigaddset(&mask, SIGRTMIN + me);
	zero(pthread_sigmask(SIG_BLOCK, &mask, NULL));
	if (me % 2) {
		zero(pthread_mutex_lock(&lock));
		while (!stage)
			zero(pthread_cond_wait(&changed, &lock));
		zero(pthread_mutex_unlock(&lock));
	} else {
		wait_go();
	}
	zero(pthread_getname_np(pthread_self(), got, sizeof got));
	zero(pthread_sigmask(SIG_BLOCK, NULL, &after));
	expect(!strcmp(name, got), "%s", got);
	expect(own == (uint64_t)me * 1000 && gettid() == tid, "thread %d is %d now", tid, gettid());
	expect(sigismember(&after, SIGRTMIN + me) && !sigismember(&after, SIGRTMIN + me + 1));
	return (void *)(me + 1);
}

static void cleaned(void *flag) { *(int *)flag = 1; }
static void *endless(void *flag)
{
	pthread_cleanup_push(cleaned, flag);
	for (;;)
		pause();
	pthread_cleanup_pop(0);
}

static int threads(void)
{
	pthread_t workers[8], cancelled;
	int clean = 0;
	for (long i = 0; i < 8; i++)
		zero(pthread_create(&workers[i], NULL, worker, (void *)i));
	zero(pthread_create(&cancelled, NULL, endless, &clean));
	nap(20 * MS);
	ready();
	wait_go();
	zero(pthread_mutex_lock(&lock));
	stage = 1;
	zero(pthread_cond_broadcast(&changed));
	zero(pthread_mutex_unlock(&lock));
	for (long i = 0; i < 8; i++) {
		void *result;
		zero(pthread_join(workers[i], &result));
		expect((long)result == i + 1);
	}
	void *result;
	zero(pthread_cancel(cancelled));
	zero(pthread_join(cancelled, &result)); // by the tid address that the kernel clears
	expect(result == PTHREAD_CANCELED && clean);
	pthread_t another; // and new ones can be made
	zero(pthread_create(&another, NULL, worker, (void *)9));
	zero(pthread_join(another, &result));
	return passed();
}

// Threads that are made and end all the time, by two that stay: none gets lost, and none comes back.
static _Atomic long started, ended;
static volatile int enough;

static void *short_lived(void *number)
{
	long me = (long)number;
	started++;
	for (volatile int i = 0; i < 2000; i++)
		;
	ended++;
	return (void *)(me * 3);
}

static void *make_threads(void *number)
{
	for (long i = (long)number; !enough; i += 2) {
		pthread_t threads[3];
		void *result;
		for (int j = 0; j < 3; j++)
			zero(pthread_create(&threads[j], NULL, short_lived, (void *)(i + j)));
		for (int j = 0; j < 3; j++) {
			zero(pthread_join(threads[j], &result));
			expect((long)result == (i + j) * 3);
		}
	}
	return number;
}

static int churn(void)
{
	pthread_t makers[2];
	for (long i = 0; i < 2; i++)
		zero(pthread_create(&makers[i], NULL, make_threads, (void *)i));
	ready();
	wait_go();
	long before = started;
	while (started < before + 20)
		nap(MS);
	enough = 1;
	for (int i = 0; i < 2; i++)
		zero(pthread_join(makers[i], NULL));
	expect(started == ended, "%ld have started, %ld have ended", started, ended);
	return passed();
}

// Who dies with a robust mutex tells the next one: a thread, and a process that shares it.
static _Atomic int *held;
static void *die_with(void *mutex)
{
	zero(pthread_mutex_lock(mutex));
	++*held;
	wait_go();
	return NULL;
}

static int robust(void)
{
	pthread_mutexattr_t kind;
	pthread_mutex_t *mutexes =
		must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	held = (void *)(mutexes + 2);
	zero(pthread_mutexattr_init(&kind));
	zero(pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST));
	zero(pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED));
	for (int i = 0; i < 2; i++)
		zero(pthread_mutex_init(&mutexes[i], &kind));
	pthread_t thread;
	zero(pthread_create(&thread, NULL, die_with, &mutexes[0]));
	pid_t child = must(fork());
	if (!child) {
		die_with(&mutexes[1]);
		_exit(0);
	}
	while (*held < 2)
		nap(MS);
	ready();
	for (int i = 0; i < 2; i++)
		expect(pthread_mutex_lock(&mutexes[i]) == EOWNERDEAD, "mutex %d", i);
	wait_go();
	zero(pthread_join(thread, NULL));
	join_child(child);
	return passed();
}

// The kernel keeps the number of the processor up to date in each thread's rseq area.
static void *follow(void *unused)
{
	wait_go();
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	cpu_set_t before;
	must(sched_getaffinity(0, sizeof before, &before));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &before))
			continue;
		cpu_set_t one;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		must(sched_setaffinity(0, sizeof one, &one));
		uint32_t seen = ((volatile struct rseq *)area)->cpu_id;
		expect(seen == (uint32_t)cpu, "rseq says %u on %d", seen, cpu);
	}
	return unused;
}

// Waits inside a critical section, and begins it again whenever it is aborted: as long as the kernel knows that it is in
// there, it is when it leaves.
static volatile int leave;
static void *critical(void *unused)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	uint64_t known;
	asm volatile(".pushsection .data\n.balign 32\n"
		     "5: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n" // struct rseq_cs
		     "3: lea 5b(%%rip), %%rax\nmov %%rax, %[section]\n"
		     "1: cmpl $0, %[leave]\nje 1b\nmov %[section], %[known]\n"
		     "2: jmp 6f\n.byte 0x0f, 0xb9, 0x3d\n.long 0x53053053\n" // RSEQ_SIG
		     "4: jmp 3b\n6:\n"
		     : [known] "=&r"(known), [section] "+m"(area->rseq_cs)
		     : [leave] "m"(leave)
		     : "rax", "memory", "cc");
	expect(known, "the kernel has forgotten the critical section");
	return unused;
}

static int rseq(void)
{
	if (!__rseq_size)
		skip("this C library does not use rseq");
	pthread_t thread, inside;
	zero(pthread_create(&thread, NULL, follow, NULL));
	zero(pthread_create(&inside, NULL, critical, NULL));
	nap(20 * MS);
	ready();
	follow(NULL);
	leave = 1;
	zero(pthread_join(inside, NULL));
	zero(pthread_join(thread, NULL));
	return passed();
}

// Processes of several threads, any of which replaces or ends all of them, and is not asked when: so many times each.
static void *rash(void *lives)
{
	nap(gettid() % 7 * 50000);
	if (lives)
		must(execl("/proc/self/exe", "tasks", "rash", (char[]){ (char)('0' + (long)lives - 1), 0 }, NULL));
	_exit(7);
}

static int be_rash(long lives)
{
	pthread_t threads[3];
	for (int i = 0; i < 3; i++)
		while (pthread_create(&threads[i], NULL, rash, (void *)lives) == EAGAIN)
			sched_yield(); // one of the others is in execve(2)
	pause();
	_exit(8); // nobody sends it a signal
}

static int restless(void)
{
	enum { AT_ONCE = 3 };
	int running = 0, over = 0;
	ready();
	while (!over || running) {
		for (over = gone_yet(); !over && running < AT_ONCE; running++)
			if (!must(fork()))
				_exit(be_rash(2));
		int status;
		must(wait(&status));
		expect(WIFEXITED(status) && WEXITSTATUS(status) == 7, "%x", status);
		running--;
	}
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	if (argc == 3 && !strcmp(argv[1], "rash"))
		return be_rash(*argv[2] - '0');
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "sessions", sessions }, { "zombies", zombies }, { "stopped", stopped }, { "vfork", vforked }, { "spawn", spawned },
		{ "threads", threads }, { "churn", churn }, { "robust", robust }, { "rseq", rseq },
		{ "restless", restless },
	};
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
