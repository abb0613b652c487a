// Smaller attributes of a task, each set to something unusual. Those that /proc shows the test compares.
#include "subject.h"
#include <sys/personality.h>
#include <sys/resource.h>
#include <linux/ioprio.h>

// Below what everybody has: only a privilege allows to raise them again.
static const struct { int which; rlim_t soft, hard; } limits[] = {
	{ RLIMIT_CORE, 0, 1 << 20 }, { RLIMIT_NOFILE, 100, 200 }, { RLIMIT_STACK, 4 << 20, 6 << 20 },
	{ RLIMIT_NPROC, 3000, 4000 }, { RLIMIT_FSIZE, 1 << 24, 1 << 25 },
};

// Everything that a task can ask about itself and that does not change by itself, one word after another.
struct word {
	const char *name;
	int index;
	long value;
};
static struct word words[2][10000];
static int asked;

static void note(struct word *into, const char *name, int index, const void *value, size_t size)
{
	// The error is an answer, too.
	for (size_t at = 0; at < size; at += sizeof(long)) {
		struct word *word = &into[asked++];
		*word = (struct word){ name, index * 100 + (int)(at / sizeof(long)), 0 };
		memcpy(&word->value, (const char *)value + at, size - at < sizeof(long) ? size - at : sizeof(long));
	}
}

static void ask(struct word *into)
{
	asked = 0;
	union { char bytes[1024]; long words[128]; struct rlimit limit; uint32_t caps[8]; } out;
#define ASK(index, call) do { \
		memset(&out, 0, sizeof out); \
		errno = 0; \
		long result[2] = { (long)(call) }; \
		result[1] = errno; \
		note(into, #call, index, result, sizeof result); \
		note(into, #call, index + 1000, &out, 128); \
	} while (0)
	ASK(0, getpid());
	ASK(0, getppid());
	ASK(0, gettid());
	ASK(0, getpgid(0));
	ASK(0, getsid(0));
	ASK(0, getresuid((void *)&out.caps[0], (void *)&out.caps[1], (void *)&out.caps[2]));
	ASK(0, getresgid((void *)&out.caps[0], (void *)&out.caps[1], (void *)&out.caps[2]));
	ASK(0, syscall(SYS_setfsuid, -1));
	ASK(0, syscall(SYS_setfsgid, -1));
	ASK(0, getgroups(64, (void *)&out));
	uint32_t header[2] = { 0x20080522, 0 };
	ASK(0, syscall(SYS_capget, header, &out));
	for (int cap = 0; cap < 42; cap++) {
		ASK(cap, prctl(PR_CAPBSET_READ, cap));
		ASK(cap, prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0));
	}
	// Those that only answer.
	static const int gets[] = {
		PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_GET_UNALIGN, PR_GET_KEEPCAPS, PR_GET_TIMING, PR_GET_NAME, PR_GET_ENDIAN,
		PR_GET_SECCOMP, PR_GET_TSC, PR_GET_SECUREBITS, PR_GET_TIMERSLACK, PR_MCE_KILL_GET, PR_GET_CHILD_SUBREAPER,
		PR_GET_NO_NEW_PRIVS, PR_GET_TID_ADDRESS, PR_GET_THP_DISABLE, PR_GET_IO_FLUSHER, 66 /* PR_GET_MDWE */,
		68 /* PR_GET_MEMORY_MERGE */,
	};
	for (size_t i = 0; i < COUNT(gets); i++) {
		int written = gets[i] == PR_GET_PDEATHSIG || gets[i] == PR_GET_UNALIGN || gets[i] == PR_GET_NAME ||
			gets[i] == PR_GET_ENDIAN || gets[i] == PR_GET_TSC || gets[i] == PR_GET_CHILD_SUBREAPER ||
			gets[i] == PR_GET_TID_ADDRESS;
		ASK(gets[i], prctl(gets[i], written ? (long)&out : 0, 0, 0, 0));
	}
	for (int which = 0; which < 3; which++) {
		ASK(which, prctl(PR_GET_SPECULATION_CTRL, which, 0, 0, 0));
		ASK(which, syscall(SYS_getitimer, which, &out));
	}
	for (int scope = 0; scope < 3; scope++) {
		ASK(scope, getpriority(scope, 0));
		ASK(scope, syscall(SYS_ioprio_get, scope + 1, 0));
	}
	for (int which = 0; which < RLIM_NLIMITS; which++)
		ASK(which, getrlimit(which, &out.limit));
	ASK(0, syscall(SYS_sched_getattr, 0, &out, 56, 0));
	ASK(0, syscall(SYS_sched_getaffinity, 0, sizeof out, &out));
	ASK(0, sched_getscheduler(0));
	ASK(0, sched_rr_get_interval(0, (void *)&out));
	ASK(0, syscall(SYS_get_mempolicy, &out, NULL, 0, NULL, 0));
	ASK(0, sigaltstack(NULL, (void *)&out));
	ASK(0, syscall(SYS_rt_sigprocmask, 0, NULL, &out, 8));
	ASK(0, syscall(SYS_rt_sigpending, &out, 8));
	for (int signal = 1; signal < 65; signal++) {
		memset(&out, 0, sizeof out);
		ASK(signal, syscall(SYS_rt_sigaction, signal, NULL, &out, 8));
	}
	ASK(0, personality(0xffffffff));
	ASK(0, syscall(SYS_get_robust_list, 0, &out, (char *)&out + 8));
	ASK(0, syscall(SYS_arch_prctl, 0x1003 /* ARCH_GET_FS */, &out));
	ASK(0, syscall(SYS_arch_prctl, 0x1004 /* ARCH_GET_GS */, &out));
	ASK(0, syscall(SYS_arch_prctl, 0x1011 /* ARCH_GET_CPUID */, 0));
	ASK(0, syscall(SYS_arch_prctl, 0x1022 /* ARCH_GET_XCOMP_PERM */, &out));
	ASK(0, syscall(SYS_arch_prctl, 0x1024 /* ARCH_GET_XCOMP_GUEST_PERM */, &out));
	ASK(0, (getcwd(out.bytes, sizeof out), 0));
	mode_t mask;
	ASK(0, (mask = umask(0), umask(mask), mask));
	ASK(0, syscall(SYS_membarrier, 1 << 9 /* MEMBARRIER_CMD_GET_REGISTRATIONS */, 0, 0));
}

static void write_to(const char *file, const char *text)
{
	int fd = must(open(file, O_WRONLY));
	must(write(fd, text, strlen(text)));
	close(fd);
}

int main(void)
{
	begin();
	for (size_t i = 0; i < COUNT(limits); i++)
		must(setrlimit(limits[i].which, &(struct rlimit){ limits[i].soft, limits[i].hard }));
	must(setpriority(PRIO_PROCESS, 0, 7));
	must(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){ 0 }));
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	must(sched_setaffinity(0, sizeof one, &one));
	must(personality(ADDR_NO_RANDOMIZE));
	must(prctl(PR_SET_TIMERSLACK, 123456));
	must(prctl(PR_SET_CHILD_SUBREAPER, 1));
	must(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	must(prctl(PR_SET_TSC, PR_TSC_ENABLE));
	must(prctl(PR_SET_NAME, "a (strange) na"));
	must(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6)));
	write_to("/proc/self/oom_score_adj", "321");
	write_to("/proc/self/coredump_filter", "0x11");
	must(prctl(PR_SET_KEEPCAPS, 1));
	must(prctl(PR_SET_DUMPABLE, 0));
	must(prctl(PR_SET_DUMPABLE, 1));
	ask(words[0]);
	int before = asked;
	ready();
	wait_go();
	ask(words[1]);
	expect(asked == before && asked > 1000 && asked < (int)COUNT(words[0]), "%d words", asked);
	for (int i = 0; i < asked; i++)
		expect(words[0][i].value == words[1][i].value, "%s at %d: %lx -> %lx", words[0][i].name, words[0][i].index,
		       words[0][i].value, words[1][i].value);
	for (size_t i = 0; i < COUNT(limits); i++) {
		struct rlimit got;
		must(getrlimit(limits[i].which, &got));
		expect(got.rlim_cur == limits[i].soft && got.rlim_max == limits[i].hard, "limit %d", limits[i].which);
	}
	int value = 0;
	expect(prctl(PR_GET_TIMERSLACK) == 123456);
	must(prctl(PR_GET_CHILD_SUBREAPER, &value));
	expect(value == 1);
	expect(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1);
	expect(prctl(PR_GET_KEEPCAPS) == 1);
	expect(prctl(PR_GET_DUMPABLE) == 1);
	expect(syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) == IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6));
	expect(personality(0xffffffff) == ADDR_NO_RANDOMIZE);
	return passed();
}
