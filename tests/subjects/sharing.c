// Tasks that share an address space, signal actions, an fd table or places in every mix that clone(2) and unshare(2)
// can bring about. Each is an agent that does what it is told; who must see what follows from how they were made.
#include "subject.h"
#include <linux/kcmp.h>

enum { MEMORY, ACTIONS, FILES, PLACES, KINDS };
static const unsigned long FLAG[KINDS] = { CLONE_VM, CLONE_SIGHAND, CLONE_FILES, CLONE_FS };
static const int COMPARE[KINDS] = { KCMP_VM, KCMP_SIGHAND, KCMP_FILES, KCMP_FS };

enum order { NONE, SPAWN, THREAD, UNSHARE, SETSID, EXEC, SET, GET, WHERE, END };
enum { AGENTS = 40, STACK = 64 << 10, SLOT = 90 };

static struct agent {
	_Atomic int order, done, up;
	long a, b, c, result;
	pid_t tid;
	int is_thread, gone;
	char path[600];
} *agents; // shared by all
static char stacks[AGENTS][STACK] __attribute__((aligned(16)));
static volatile long cell; // shared by those that share memory
static int count = 1, classes, class_of[AGENTS][KINDS]; // known to the first agent only
static long value[AGENTS * KINDS]; // of each class

// Those that share memory share the C library's data with us: no errno, no buffers of its own.
static long raw(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 asm("r10") = d;
	asm volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
}

static void await(_Atomic int *word, int while_it_is)
{
	while (*word == while_it_is)
		raw(SYS_futex, (long)word, FUTEX_WAIT, while_it_is, 0);
}

static void tell(_Atomic int *word, int what)
{
	*word = what;
	raw(SYS_futex, (long)word, FUTEX_WAKE, INT32_MAX, 0);
}

// "d" and a number, in the agent's own memory.
static char *name_of(long number, char *name)
{
	name[0] = 'd', name[1] = '0' + number / 100, name[2] = '0' + number / 10 % 10, name[3] = '0' + number % 10;
	name[4] = 0;
	return name;
}

__attribute__((noreturn)) static int serve(void *index);

static void *serve_as_thread(void *index)
{
	serve(index);
}

static long set(int kind, long number, const char *home)
{
	struct { long handler, flags, restorer, mask; } action = { number << 12, 0x04000000, 0, 1 };
	char name[8];
	long fd;
	switch (kind) {
	case MEMORY:
		cell = number;
		return 0;
	case ACTIONS:
		return raw(SYS_rt_sigaction, SIGUSR2, (long)&action, 0, 8);
	case FILES: // another description each time
		fd = raw(SYS_open, (long)home, O_RDONLY, 0, 0);
		if (fd != SLOT) {
			raw(SYS_dup2, fd, SLOT, 0, 0);
			raw(SYS_close, fd, 0, 0, 0);
		}
		return fd < 0 ? fd : raw(SYS_lseek, SLOT, number, SEEK_SET, 0) - number;
	default:
		raw(SYS_umask, number, 0, 0, 0);
		long error = raw(SYS_chdir, (long)home, 0, 0, 0);
		return error ? error : raw(SYS_chdir, (long)name_of(number, name), 0, 0, 0);
	}
}

static long get(int kind)
{
	long action[4] = { 0 };
	switch (kind) {
	case MEMORY:
		return cell;
	case ACTIONS:
		raw(SYS_rt_sigaction, SIGUSR2, 0, (long)action, 8);
		return action[0] >> 12;
	case FILES:
		return raw(SYS_lseek, SLOT, 0, SEEK_CUR, 0);
	default: {
		long mask = raw(SYS_umask, 0, 0, 0, 0);
		raw(SYS_umask, mask, 0, 0, 0);
		return mask;
	}
	}
}

static long perform(struct agent *self, enum order order)
{
	switch (order) {
	case SPAWN:
		return clone(serve, stacks[self->c] + STACK, self->a | self->b, (void *)self->c);
	case THREAD:;
		pthread_t thread;
		return pthread_create(&thread, NULL, serve_as_thread, (void *)self->c);
	case UNSHARE:
		return raw(SYS_unshare, self->a, 0, 0, 0);
	case SETSID:
		return raw(SYS_setsid, 0, 0, 0, 0);
	case EXEC:
		return raw(SYS_execve, (long)"/proc/self/exe", (long)(char *[]){ "sharing", "idle", NULL }, 0, 0);
	case SET:
		return set(self->a, self->b, self->path);
	case GET:
		return get(self->a);
	case WHERE:
		return raw(SYS_getcwd, (long)self->path, sizeof self->path, 0, 0);
	default:
		return raw(self->is_thread ? SYS_exit : SYS_exit_group, 0, 0, 0, 0);
	}
}

__attribute__((noreturn)) static int serve(void *index)
{
	struct agent *self = &agents[(long)index];
	self->tid = raw(SYS_gettid, 0, 0, 0, 0);
	tell(&self->up, 1);
	for (;;) {
		await(&self->order, NONE);
		self->result = perform(self, self->order);
		self->order = NONE;
		tell(&self->done, 1);
	}
}

// Tells an agent, and does not wait if it is not going to answer.
static long order(int who, enum order what, long a, long b, long c)
{
	struct agent *agent = &agents[who];
	agent->a = a, agent->b = b, agent->c = c;
	if (!who)
		return agent->result = perform(agent, what);
	agent->done = 0;
	tell(&agent->order, what);
	if (what == END)
		return agent->gone = 1;
	if (what != EXEC)
		await(&agent->done, 0);
	return agent->result;
}

static int spawn(int by, unsigned long flags, int exit_signal)
{
	int index = count++;
	agents[index].is_thread = !!(flags & CLONE_THREAD);
	expect(order(by, SPAWN, flags, exit_signal, index) > 0, "%ld", agents[by].result);
	for (int kind = 0; kind < KINDS; kind++)
		class_of[index][kind] = flags & FLAG[kind] ? class_of[by][kind] : classes++;
	await(&agents[index].up, 0);
	return index;
}

static int thread(int by)
{
	int index = count++;
	agents[index].is_thread = 1;
	expect(order(by, THREAD, 0, 0, index) == 0);
	memcpy(class_of[index], class_of[by], sizeof class_of[by]);
	await(&agents[index].up, 0);
	return index;
}

static void leave(int who, int kind)
{
	expect(order(who, UNSHARE, FLAG[kind], 0, 0) == 0);
	class_of[who][kind] = classes++;
}

static void write_value(int who, int kind, long number)
{
	char name[8];
	mkdir(in_base(name_of(number, name)), 0777);
	strcpy(agents[who].path, base);
	expect(order(who, SET, kind, number, 0) == 0, "agent %d kind %d: %ld", who, kind, agents[who].result);
	value[class_of[who][kind]] = number;
}

static void check_value(int who, int kind, const char *when)
{
	long seen = order(who, GET, kind, 0, 0), number = value[class_of[who][kind]];
	expect(seen == number, "%s agent %d kind %d: %ld instead of %ld", when, who, kind, seen, number);
}

static void check_values(const char *when)
{
	for (int who = 0; who < count; who++) {
		if (agents[who].gone)
			continue;
		for (int kind = 0; kind < KINDS; kind++)
			check_value(who, kind, when);
		char path[sizeof base + 8], name[8];
		snprintf(path, sizeof path, "%s/%s", base, name_of(value[class_of[who][PLACES]], name));
		expect(order(who, WHERE, 0, 0, 0) > 0 && !strcmp(agents[who].path, path), "%s agent %d: %s instead of %s",
		       when, who, agents[who].path, path);
	}
}

// What the kernel says of every pair.
static void check_kernel(const char *when)
{
	for (int a = 0; a < count; a++)
		for (int b = 0; b < a; b++)
			for (int kind = 0; kind < KINDS && !agents[a].gone && !agents[b].gone; kind++) {
				long order = must(syscall(SYS_kcmp, agents[a].tid, agents[b].tid, COMPARE[kind], 0, 0));
				expect((order == 0) == (class_of[a][kind] == class_of[b][kind]), "%s agents %d and %d, kind %d",
				       when, a, b, kind);
			}
}

// A field of its stat(5), the third or a later one.
static const char *stat_of(pid_t tid, int number)
{
	static char text[1024];
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/stat", in_proc(tid));
	FILE *file = must(fopen(path, "r"));
	size_t length = fread(text, 1, sizeof text - 1, file);
	text[length] = 0;
	fclose(file);
	char *at = strrchr(text, ')');
	for (int field = 2; field < number; field++)
		at = strchr(at + 1, ' ');
	return at + 1;
}

static void without_leader(int same)
{
	int headless = spawn(0, CLONE_FILES, SIGCHLD);
	spawn(headless, same | CLONE_FILES | CLONE_FS, 0);
	int hand = spawn(headless, same | CLONE_FS, 0);
	spawn(hand, same | CLONE_FILES, 0);
	spawn(headless, CLONE_VM | CLONE_FS, SIGCHLD);
	agents[headless].is_thread = 1;
	order(headless, END, 0, 0, 0);
	while (stat_of(agents[headless].tid, 3)[0] != 'Z')
		nap(MS);
}

static int mixes(int with_dead)
{
	const int all = CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS;
	pid_t session = getsid(0);
	sigset_t signals;
	sigfillset(&signals);
	must(sigprocmask(SIG_BLOCK, &signals, NULL));
	must(prctl(PR_SET_CHILD_SUBREAPER, 1));
	// What can be set only once, by one of those who share it.
	const int PR_SET_MDWE_ = 65, PR_GET_MDWE_ = 66;
	int mdwe = prctl(PR_SET_MDWE_, 1, 0, 0, 0) == 0;

	// With their parent.
	spawn(0, CLONE_VM, SIGCHLD);
	spawn(0, CLONE_VM | CLONE_SIGHAND, SIGCHLD);
	spawn(0, CLONE_FILES, SIGCHLD);
	spawn(0, CLONE_FS, SIGCHLD);
	int notified = spawn(0, all, SIGUSR1);
	int silent = spawn(0, CLONE_VM | CLONE_FS, 0);
	// With siblings, and their parent in part or not at all.
	int other = spawn(0, 0, SIGCHLD);
	int sibling = spawn(other, CLONE_VM | CLONE_SIGHAND | CLONE_FILES, SIGCHLD);
	spawn(sibling, CLONE_VM | CLONE_FS | CLONE_PARENT, 0);
	int apart = spawn(0, CLONE_FS, SIGCHLD);
	spawn(apart, CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_PARENT, 0);
	spawn(apart, CLONE_VM | CLONE_PARENT, 0);
	// A grandchild with its grandparent.
	int between = spawn(0, CLONE_FS | CLONE_FILES, SIGCHLD);
	spawn(between, CLONE_FS | CLONE_FILES, SIGCHLD);
	leave(between, PLACES);
	leave(between, FILES);
	// Cousins.
	int uncle = spawn(other, CLONE_FILES, SIGCHLD), aunt = spawn(other, CLONE_FILES | CLONE_FS, SIGCHLD);
	spawn(uncle, CLONE_FILES, SIGCHLD);
	spawn(aunt, CLONE_FILES | CLONE_FS, SIGCHLD);
	leave(uncle, FILES);
	leave(aunt, FILES);
	leave(aunt, PLACES);
	// An orphan of a session whose leader has gone.
	int leader = spawn(0, all, SIGCHLD);
	expect(order(leader, SETSID, 0, 0, 0) == agents[leader].tid);
	int orphan = spawn(leader, all, SIGCHLD);
	order(leader, END, 0, 0, 0);
	expect(must(waitpid(agents[leader].tid, NULL, __WALL)) == agents[leader].tid);
	// Threads that have left their process, one that has followed, and a child of theirs.
	int files = thread(0), places = thread(0);
	leave(files, FILES);
	leave(places, PLACES);
	int both = thread(files);
	leave(both, PLACES);
	spawn(both, CLONE_FILES | CLONE_FS, SIGCHLD);
	spawn(places, CLONE_VM | CLONE_SIGHAND | CLONE_FILES, SIGCHLD);
	thread(0);
	int alone = thread(0);
	leave(alone, FILES);
	leave(alone, PLACES);
	// Threads of others, and of one whose leader has ended.
	const int same = CLONE_THREAD | CLONE_VM | CLONE_SIGHAND;
	spawn(apart, same | CLONE_FILES, 0);
	if (with_dead)
		without_leader(same);
	// One that has ended, of which we were told in another way than usual.
	siginfo_t info;
	sigset_t unusual;
	sigemptyset(&unusual);
	sigaddset(&unusual, SIGRTMIN + 3);
	int dead = with_dead ? spawn(0, 0, SIGRTMIN + 3) : 0;
	if (dead) {
		order(dead, END, 0, 0, 0);
		expect(sigwaitinfo(&unusual, &info) == SIGRTMIN + 3 && info.si_pid == agents[dead].tid);
	}
	while (sigtimedwait(&signals, NULL, &(struct timespec){ 0 }) > 0)
		;

	expect(count <= AGENTS && classes <= (int)COUNT(value) && classes < 200);
	for (int who = 0; who < count; who++)
		for (int kind = 0; kind < KINDS && !agents[who].gone; kind++)
			write_value(who, kind, class_of[who][kind]);
	check_kernel("before");
	check_values("before");

	ready();
	wait_go();
	check_kernel("after");
	check_values("as it was");
	for (int kind = 0; kind < KINDS; kind++) {
		for (int who = 0; who < count; who++) {
			if (agents[who].gone)
				continue;
			write_value(who, kind, 200 + who);
			for (int other = 0; other < count; other++)
				if (!agents[other].gone && class_of[other][kind] == class_of[who][kind])
					check_value(other, kind, "changed");
		}
		check_values("changed"); // and by nobody else
	}

	expect(prctl(PR_GET_MDWE_, 0, 0, 0, 0) == mdwe || !mdwe);
	expect(getsid(agents[orphan].tid) == agents[leader].tid && getsid(0) == session);
	expect(atoi(stat_of(agents[notified].tid, 38)) == SIGUSR1 && atoi(stat_of(agents[silent].tid, 38)) == 0);
	// The test of a killed checkpoint stops and continues our children.
	while (sigtimedwait(&signals, &info, &(struct timespec){ 0 }) > 0)
		expect(!with_dead && (info.si_signo == SIGCHLD || info.si_signo == SIGCONT), "signal %d", info.si_signo);
	int status;
	if (dead)
		expect(must(waitpid(agents[dead].tid, &status, __WALL | WNOHANG)) == agents[dead].tid && status == 0);
	order(notified, END, 0, 0, 0);
	expect(sigwaitinfo(&signals, &info) == SIGUSR1 && info.si_pid == agents[notified].tid);
	order(silent, END, 0, 0, 0);
	expect(must(waitpid(agents[silent].tid, NULL, __WALL)) == agents[silent].tid);
	expect(sigtimedwait(&signals, &info, &(struct timespec){ 0 }) == -1, "signal %d", info.si_signo);
	for (int who = count - 1; who > 0; who--)
		if (!agents[who].gone)
			order(who, END, 0, 0, 0);
	while (waitpid(-1, NULL, __WALL) > 0)
		;
	return passed();
}

// Memory in common with a grandparent, whose child has executed a program since.
static int impossible(void)
{
	int between = spawn(0, CLONE_VM, SIGCHLD), below = spawn(between, CLONE_VM, SIGUSR1);
	order(between, EXEC, 0, 0, 0);
	while (syscall(SYS_kcmp, agents[0].tid, agents[between].tid, KCMP_VM, 0, 0) == 0)
		nap(MS);
	expect(syscall(SYS_kcmp, agents[0].tid, agents[below].tid, KCMP_VM, 0, 0) == 0);
	char number[16];
	sprintf(number, "%d", agents[below].tid);
	put_file("below", number);
	ready();
	wait_go();
	write_value(0, MEMORY, 7);
	expect(order(below, GET, MEMORY, 0, 0) == 7);
	order(below, END, 0, 0, 0);
	must(kill(agents[between].tid, SIGKILL));
	while (waitpid(-1, NULL, __WALL) > 0)
		;
	return passed();
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "idle"))
		for (;;)
			pause();
	begin();
	expect(argc == 2);
	agents = must(mmap(NULL, AGENTS * sizeof *agents, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	agents[0].tid = getpid();
	for (int kind = 0; kind < KINDS; kind++)
		class_of[0][kind] = classes++;
	if (!strcmp(argv[1], "mixes"))
		return mixes(1);
	if (!strcmp(argv[1], "living"))
		return mixes(0);
	if (!strcmp(argv[1], "impossible"))
		return impossible();
	fail("usage");
}
