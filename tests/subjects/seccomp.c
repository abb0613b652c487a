// System call filters, some of them shared by all threads, some not; strict mode; filters older than the loss of
// the right to install any.
#include "subject.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>

// Denies one system call with this errno.
static long deny(int call, int error, unsigned flags)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog header = { COUNT(program), program };
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &header);
}

// Kills whoever calls something else than what the subject and its C library need.
static long allow_little(void)
{
	static const int calls[] = {
		SYS_read, SYS_write, SYS_openat, SYS_close, SYS_rename, SYS_access, SYS_getcwd, SYS_clock_nanosleep,
		SYS_restart_syscall, SYS_exit, SYS_exit_group, SYS_gettid, SYS_getpid, SYS_mmap, SYS_munmap, SYS_brk,
		SYS_futex, SYS_rt_sigreturn, SYS_getuid, SYS_newfstatat, SYS_fstat, SYS_madvise, SYS_rt_sigprocmask,
		SYS_getrandom,
	};
	struct sock_filter program[COUNT(calls) * 2 + 2] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	};
	size_t length = 1;
	for (size_t i = 0; i < COUNT(calls); i++) {
		program[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i], 0, 1);
		program[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	program[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	struct sock_fprog header = { length, program };
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &header);
}

static int status_of(const char *path, const char *key)
{
	char text[8192];
	int fd = must(open(path, O_RDONLY));
	ssize_t length = must(read(fd, text, sizeof text - 1));
	text[length] = 0;
	close(fd);
	char *line = strstr(text, key);
	expect(line, "%s in %s", key, path);
	return atoi(line + strlen(key));
}

#define MODE "\nSeccomp:"
#define FILTERS "\nSeccomp_filters:"

#define OWN "/proc/thread-self/status"

// The first so many of three calls are denied.
static void expect_denied(int count)
{
	struct utsname name;
	struct sysinfo info;
	errno = 0;
	expect((syscall(SYS_uname, &name) == -1 && errno == 71) == (count > 0), "uname: errno %d", errno);
	errno = 0;
	expect((syscall(SYS_getppid) == -1 && errno == 72) == (count > 1), "getppid: errno %d", errno);
	errno = 0;
	expect((syscall(SYS_sysinfo, &info) == -1 && errno == 73) == (count > 2), "sysinfo: errno %d, not %d denied; %d filters", errno, count, status_of(OWN, FILTERS));
	expect(syscall(SYS_getpgid, 0) >= 0);
	expect(status_of(OWN, MODE) == (count ? 2 : 0));
	expect(status_of(OWN, FILTERS) == count, "%d filters", status_of(OWN, FILTERS));
}

static _Atomic int set_up, checked, go_on;

// Has the two filters of its process, and this many more.
static void *member(void *more)
{
	if (more)
		must(deny(SYS_sysinfo, 73, 0));
	set_up++;
	while (!go_on)
		nap(5 * MS);
	expect_denied(more ? 3 : 2);
	checked++;
	while (go_on < 2)
		nap(5 * MS);
	if (!more)
		expect_denied(3);
	return NULL;
}

// Looks at another process's filters, as one that has none itself.
static void inspect(pid_t pid)
{
	struct { uint64_t number, flags; } filter;
	must(ptrace(PTRACE_SEIZE, pid, 0, 0));
	must(ptrace(PTRACE_INTERRUPT, pid, 0, 0));
	expect(waitpid(pid, NULL, __WALL) == pid);
	for (int i = 0; i < 2; i++) {
		filter.number = i;
		must(ptrace(PTRACE_SECCOMP_GET_METADATA, pid, sizeof filter, &filter));
		expect(filter.flags == (i ? SECCOMP_FILTER_FLAG_LOG : 0), "filter %d: flags %#lx", i, (long)filter.flags);
		expect(ptrace(PTRACE_SECCOMP_GET_FILTER, pid, i, 0) == 4);
	}
	must(ptrace(PTRACE_DETACH, pid, 0, 0));
}

// Its child inspects it; `differ`: one of its threads has a filter of its own.
static int filters(int differ)
{
	pid_t inspector = must(fork());
	if (!inspector) {
		char text[8];
		wait_go();
		while (!get_file("inspect", text, sizeof text))
			nap(2 * MS);
		inspect(getppid());
		put_file("inspected", "");
		return 0;
	}
	pthread_t threads[3];
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	zero(pthread_create(&threads[0], NULL, member, NULL));
	while (set_up < 1)
		nap(MS);
	expect(deny(SYS_uname, 71, SECCOMP_FILTER_FLAG_TSYNC) == 0);
	expect(deny(SYS_getppid, 72, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG) == 0);
	zero(pthread_create(&threads[1], NULL, member, NULL));
	zero(pthread_create(&threads[2], NULL, member, (void *)(long)differ));
	while (set_up < 3)
		nap(MS);
	expect_denied(2);
	ready();
	wait_go();
	expect_denied(2);
	go_on = 1;
	while (checked < 3)
		nap(MS);
	char text[8];
	put_file("inspect", "");
	while (!get_file("inspected", text, sizeof text))
		nap(2 * MS);
	if (differ) {
		// A thread with a filter of its own cannot be made like this one.
		expect(deny(SYS_sysinfo, 73, SECCOMP_FILTER_FLAG_TSYNC) > 0);
		must(deny(SYS_sysinfo, 73, 0));
		return join_child(inspector), passed();
	}
	expect(deny(SYS_sysinfo, 73, SECCOMP_FILTER_FLAG_TSYNC) == 0);
	go_on = 2;
	for (size_t i = 0; i < COUNT(threads); i++)
		zero(pthread_join(threads[i], NULL));
	expect_denied(3);
	join_child(inspector);
	return passed();
}

// Nothing but a few calls, with death for the rest: no remote call may be subject to it.
static int deadly(void)
{
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	must(allow_little());
	put_file("ready", "");
	wait_go();
	expect(status_of("/proc/self/status", MODE) == 2 && status_of("/proc/self/status", FILTERS) == 1);
	return passed();
}

// Installed by root, who has become somebody else since.
static int dropped(void)
{
	must(chmod(base, 0777));
	must(deny(SYS_uname, 71, 0));
	must(setresgid(65534, 65534, 65534));
	must(setresuid(65534, 65534, 65534));
	ready();
	wait_go();
	expect(getuid() == 65534 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
	expect_denied(1);
	expect(deny(SYS_getppid, 72, 0) == -1 && errno == EACCES);
	return passed();
}

// --- strict mode: read, write, exit ---
struct strict {
	int in, out, forbidden;
	_Atomic int tid;
};

static long raw(long call, long a, const void *b, long c)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(call), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static void *strict(void *argument)
{
	struct strict *self = argument;
	must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
	char byte;
	raw(SYS_write, self->out, "s", 1);
	if (raw(SYS_read, self->in, &byte, 1) != 1)
		raw(SYS_exit, 7, NULL, 0);
	byte++;
	raw(SYS_write, self->out, &byte, 1);
	if (self->forbidden)
		raw(SYS_getpid, 0, NULL, 0);
	raw(SYS_exit, 0, NULL, 0);
	__builtin_unreachable();
}

static void *strict_thread(void *argument)
{
	((struct strict *)argument)->tid = gettid();
	return strict(argument);
}

static int strict_mode(void)
{
	enum { CHILD, DOOMED, THREAD, COUNT_ };
	int in[COUNT_][2], out[COUNT_][2];
	pid_t pid[COUNT_] = { 0 };
	pthread_t thread;
	static struct strict self[COUNT_];
	char byte;
	for (int i = 0; i < COUNT_; i++) {
		must(pipe(in[i]));
		must(pipe(out[i]));
		self[i] = (struct strict){ in[i][0], out[i][1], i == DOOMED, 0 };
		if (i == THREAD)
			zero(pthread_create(&thread, NULL, strict_thread, &self[i]));
		else if (!(pid[i] = must(fork())))
			strict(&self[i]);
		expect(read(out[i][0], &byte, 1) == 1 && byte == 's');
	}
	pid[THREAD] = self[THREAD].tid;
	ready();
	wait_go();
	for (int i = 0; i < COUNT_; i++) {
		char path[64];
		sprintf(path, "/proc/%d/status", in_proc(pid[i]));
		expect(status_of(path, MODE) == 1, "%d: %d", i, status_of(path, MODE));
		must(write(in[i][1], "a", 1));
		expect(read(out[i][0], &byte, 1) == 1 && byte == 'b');
	}
	expect(status_of("/proc/self/status", MODE) == 0);
	int status;
	expect(waitpid(pid[CHILD], &status, 0) == pid[CHILD] && status == 0, "status %#x", status);
	expect(waitpid(pid[DOOMED], &status, 0) == pid[DOOMED] && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
	       "status %#x", status);
	zero(pthread_join(thread, NULL));
	return passed();
}

// Hands some calls to a listener: cannot be restored.
static int listener(void)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_uname, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog header = { COUNT(program), program };
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	must(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &header));
	ready();
	wait_go();
	struct utsname name;
	// Nobody listens.
	expect(syscall(SYS_uname, &name) == -1 && errno == ENOSYS);
	return passed();
}

int main(int argc, char **argv)
{
	(void)argc;
	begin();
	const char *what = argv[1];
	if (!strcmp(what, "different"))
		return filters(1);
	if (!strcmp(what, "shared"))
		return filters(0);
	if (!strcmp(what, "deadly"))
		return deadly();
	if (!strcmp(what, "dropped"))
		return dropped();
	if (!strcmp(what, "listener"))
		return listener();
	return strict_mode();
}
