// What every C subject needs: it sets itself up, calls ready(), then wait_go(), checks itself, and ends with
// `return passed();`. The first failed expect() of any of its processes decides.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef long long ns;
#define MS 1000000LL
#define SECOND 1000000000LL
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

// The directory that the subject was started in; "" inside a chroot to it.
static char base[512];
// For how long the process did not exist, at least and at most; known after wait_go().
static ns gap_min, gap_max;

static const char *in_base(const char *name)
{
	static __thread char path[640];
	snprintf(path, sizeof path, "%s/%s", base, name);
	return path;
}

// Says what is wrong, and where.
__attribute__((format(printf, 3, 4), noreturn)) static void fail_at(int line, const char *what, const char *format, ...)
{
	char text[512];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	int fd = open(in_base("result"), O_WRONLY | O_CREAT | O_APPEND, 0600);
	dprintf(fd < 0 ? 2 : fd, "line %d: %s: %s\n", line, what, text);
	_exit(1);
}

#define fail(...) fail_at(__LINE__, "failed", __VA_ARGS__)
#define expect(condition, ...)                                                                     \
	do {                                                                                       \
		if (!(condition))                                                                  \
			fail_at(__LINE__, #condition, "" __VA_ARGS__);                             \
	} while (0)
#define must(call)                                                                                 \
	({                                                                                         \
		__typeof__(call) result_ = (call);                                                 \
		if ((long)result_ == -1)                                                           \
			fail_at(__LINE__, #call, "%s", strerror(errno));                           \
		result_;                                                                           \
	})
// For the pthread_* functions, which return their error.
#define zero(call)                                                                                 \
	do {                                                                                       \
		int error_ = (call);                                                               \
		if (error_)                                                                        \
			fail_at(__LINE__, #call, "%s", strerror(error_));                          \
	} while (0)

static void begin(void)
{
	must((long)getcwd(base, sizeof base));
}

static ns now(clockid_t clock)
{
	struct timespec time;
	clock_gettime(clock, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

static struct timespec timespec(ns time)
{
	return (struct timespec){ time / SECOND, time % SECOND };
}

static void nap(ns time)
{
	struct timespec left = timespec(time);
	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

static void put_file(const char *name, const char *text)
{
	char hidden[64];
	snprintf(hidden, sizeof hidden, ".%s.%d", name, gettid());
	char *from = strdup(in_base(hidden));
	int fd = must(open(from, O_WRONLY | O_CREAT | O_TRUNC, 0600));
	must(write(fd, text, strlen(text)));
	close(fd);
	must(rename(from, in_base(name)));
	free(from);
}

static int get_file(const char *name, char *text, size_t size)
{
	int fd = open(in_base(name), O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t length = must(read(fd, text, size - 1));
	text[length] = 0;
	close(fd);
	return 1;
}

static void ready(void)
{
	put_file("ready", "");
}

static int gone_yet(void)
{
	char text[64];
	if (!get_file("go", text, sizeof text))
		return 0;
	expect(sscanf(text, "%lld %lld", &gap_min, &gap_max) == 2, "%s", text);
	return 1;
}

static void wait_go(void)
{
	while (!gone_yet())
		nap(2 * MS);
}

static int passed(void)
{
	if (access(in_base("result"), F_OK))
		put_file("result", "ok\n");
	return 0;
}

// Ends a subject that this machine cannot run.
__attribute__((unused, noreturn)) static void skip(const char *why)
{
	char text[256];
	snprintf(text, sizeof text, "skip: %s\n", why);
	put_file("result", text);
	put_file("ready", "");
	_exit(0);
}

// Waits for a child and expects it to have found nothing wrong.
__attribute__((unused)) static void join_child(pid_t pid)
{
	int status;
	pid_t got;
	while ((got = waitpid(pid, &status, 0)) == -1 && errno == EINTR)
		;
	expect(got == pid, "%d %s", got, strerror(errno));
	expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", status);
}

static const ns EARLY = 50 * MS, LATE = 300 * MS;

// A relative wait of this length began at `start`: did it end in time?
__attribute__((unused)) static void expect_relative(ns start, ns end, ns length)
{
	ns took = end - start;
	expect(took >= length + gap_min - EARLY, "early: took %lld us instead of %lld (+ %lld gone)", took / 1000,
	       length / 1000, gap_min / 1000);
	expect(took <= length + gap_max + LATE, "late: took %lld us instead of %lld (+ %lld gone)", took / 1000,
	       length / 1000, gap_max / 1000);
}

// A pattern that no two pages have in common.
__attribute__((unused)) static void paint(void *memory, size_t size, uint64_t seed)
{
	uint64_t *word = memory;
	for (size_t i = 0; i < size / 8; i++)
		word[i] = (seed + i) * 0x9e3779b97f4a7c15ull ^ seed << 32;
}

#define expect_painted(memory, size, seed) expect_painted_at(memory, size, seed, __LINE__)
__attribute__((unused)) static void expect_painted_at(void *memory, size_t size, uint64_t seed, int line)
{
	uint64_t *word = memory;
	for (size_t i = 0; i < size / 8; i++)
		expect(word[i] == ((seed + i) * 0x9e3779b97f4a7c15ull ^ seed << 32),
		       "from line %d: word %zu of the memory painted with %llu", line, i, (long long)seed);
}

#define PAGE 4096L

__attribute__((unused)) static int is_same_namespace(const char *status)
{
	char path[PATH_MAX];
	struct stat own, other;
	snprintf(path, sizeof path, "%.*s/ns/pid", (int)(strrchr(status, '/') - status), status);
	must(stat("/proc/self/ns/pid", &own));
	return !stat(path, &other) && own.st_ino == other.st_ino;
}

__attribute__((unused)) static int proc_is_ours(void)
{
	char own[PATH_MAX];
	return getpid() == atoi(must(realpath("/proc/self", own)) + strlen("/proc/"));
}

// By which number /proc knows a task: it may be the /proc of a pid namespace around ours.
__attribute__((unused)) static pid_t in_proc(pid_t tid)
{
	if (proc_is_ours())
		return tid;
	glob_t all;
	pid_t found = 0;
	zero(glob("/proc/[0-9]*/task/[0-9]*/status", 0, NULL, &all));
	for (size_t i = 0; i < all.gl_pathc && !found; i++) {
		char text[4096];
		FILE *file = fopen(all.gl_pathv[i], "r");
		if (!file)
			continue;
		text[fread(text, 1, sizeof text - 1, file)] = 0;
		fclose(file);
		char *line = strstr(text, "NSpid:"), *end = line ? strchr(line, '\n') : NULL;
		if (!end)
			continue;
		*end = 0;
		if (atoi(strrchr(line, '\t') + 1) == tid && is_same_namespace(all.gl_pathv[i]))
			found = atoi(line + strlen("NSpid:"));
	}
	globfree(&all);
	expect(found, "/proc does not know %d", tid);
	return found;
}

// How many pages of this memory two processes have in common; 0 too where that is not for us to know.
__attribute__((unused)) static int in_common(pid_t a, pid_t b, char *memory, size_t size)
{
	const size_t count = size / PAGE;
	uint64_t *entries[2] = { malloc(count * 8), malloc(count * 8) };
	for (int i = 0; i < 2; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/%d/pagemap", in_proc(i ? b : a));
		int fd = must(open(path, O_RDONLY));
		expect(pread(fd, entries[i], count * 8, (unsigned long)memory / PAGE * 8) == (ssize_t)(count * 8));
		close(fd);
	}
	int common = 0;
	for (size_t i = 0; i < count; i++) {
		const uint64_t number = (1ull << 55) - 1;
		common += entries[0][i] >> 63 && (entries[0][i] & number) && (entries[0][i] & number) == (entries[1][i] & number);
	}
	free(entries[0]);
	free(entries[1]);
	return common;
}
