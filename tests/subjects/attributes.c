// What a task can be asked about itself, each set to something unusual: credentials, scheduling, limits, attributes. Of a
// process ("process"), and of threads, no two alike ("threads"). What /proc shows of it the test compares, too.
#include "subject.h"
#include <sys/personality.h>
#include <sys/resource.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/ioprio.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>

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
enum { WORDS = 10000 };
static __thread int asked;

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
	ASK(0, syscall(SYS_brk, 0)); // the C library remembers it
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

static struct word *remember(void)
{
	static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER; // to read the umask is to change it
	struct word *words = calloc(WORDS, sizeof *words);
	zero(pthread_mutex_lock(&one_at_a_time));
	ask(words);
	zero(pthread_mutex_unlock(&one_at_a_time));
	expect(asked > 1000 && asked < WORDS, "%d words", asked);
	return words;
}

static void compare(const struct word *before)
{
	int count = asked;
	const struct word *after = remember();
	expect(asked == count, "%d words", asked);
	for (int i = 0; i < count; i++)
		expect(before[i].value == after[i].value, "thread %d: %s at %d: %lx -> %lx", gettid() - getpid(), before[i].name,
		       before[i].index, before[i].value, after[i].value);
}

static void write_to(const char *file, const char *text)
{
	int fd = must(open(file, O_WRONLY));
	must(write(fd, text, strlen(text)));
	close(fd);
}

static int process(void)
{
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
	// What a kernel or a processor may not have.
	prctl(PR_SET_PDEATHSIG, SIGWINCH);
	prctl(67 /* PR_SET_MEMORY_MERGE */, 1, 0, 0, 0);
	prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0);
	for (int command = 1 << 1; command <= 1 << 8; command <<= 1)
		if (command & (1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8)) // the registrations
			syscall(SYS_membarrier, command, 0, 0);
	int loginuid = open("/proc/self/loginuid", O_WRONLY), autogroup = open("/proc/self/autogroup", O_WRONLY);
	if (write(loginuid, "4242", 4) != 4 || write(autogroup, "5", 1) != 1)
		expect(errno == EBADF || errno == EPERM, "%s", strerror(errno));
	close(loginuid);
	close(autogroup);
	struct word *before = remember();
	ready();
	wait_go();
	compare(before);
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
	expect(prctl(PR_GET_DUMPABLE) == 0);
	expect(syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) == IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6));
	expect(personality(0xffffffff) == ADDR_NO_RANDOMIZE);
	return passed();
}

// --- threads ---
static void set_capabilities(uint64_t permitted, uint64_t effective, uint64_t inheritable)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	for (int half = 0; half < 2; half++)
		data[half] = (struct __user_cap_data_struct){ effective >> 32 * half, permitted >> 32 * half,
			inheritable >> 32 * half };
	must(syscall(SYS_capset, &header, data));
}

#define CAP(name) (1ull << CAP_##name)

// Raw calls: the C library's change all threads.
static void another_user(void)
{
	gid_t groups[] = { 7, 1007, 100007 };
	must(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
	must(syscall(SYS_setgroups, COUNT(groups), groups));
	must(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NOROOT));
	must(syscall(SYS_setresgid, 2001, 2002, 2003));
	syscall(SYS_setfsgid, 2004);
	must(syscall(SYS_setresuid, 1001, 1002, 1003));
	syscall(SYS_setfsuid, 1004);
	uint64_t inheritable = CAP(NET_RAW) | CAP(CHECKPOINT_RESTORE);
	set_capabilities(CAP(CHOWN) | CAP(SYS_NICE) | inheritable, CAP(CHOWN), inheritable);
	must(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
	must(prctl(PR_SET_PDEATHSIG, SIGURG)); // a change of users clears it
}

static void nobody(void)
{
	must(syscall(SYS_setgroups, 0, NULL));
	must(syscall(SYS_setresgid, 65534, 65534, 65534));
	must(syscall(SYS_setresuid, 65534, 65534, 65534));
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	must(prctl(PR_SET_TIMERSLACK, 77777));
}

static void real_time(void)
{
	must(sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &(struct sched_param){ .sched_priority = 3 }));
	must(personality(ADDR_COMPAT_LAYOUT | SHORT_INODE));
	must(prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
}

static void round_robin(void)
{
	must(sched_setscheduler(0, SCHED_RR, &(struct sched_param){ .sched_priority = 5 }));
	syscall(SYS_arch_prctl, 0x1012 /* ARCH_SET_CPUID */, 0); // not every processor can
	must(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
}

static void idle(void)
{
	must(sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){ 0 }));
	must(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)));
	must(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0));
	prctl(PR_SET_SPECULATION_CTRL, 0 /* PR_SPEC_STORE_BYPASS */, PR_SPEC_FORCE_DISABLE, 0, 0);
}

static void deadline(void)
{
	struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t times[3]; uint32_t clamps[2]; }
		attributes = { sizeof attributes, 6 /* SCHED_DEADLINE */, 0, 0, 0, { 2 * MS, 20 * MS, 30 * MS }, { 0 } };
	// Not where a cpuset splits the processors.
	if (syscall(SYS_sched_setattr, 0, &attributes, 0))
		expect(errno == EPERM || errno == EBUSY, "%s", strerror(errno));
	prctl(PR_SET_SPECULATION_CTRL, 1 /* PR_SPEC_INDIRECT_BRANCH */, PR_SPEC_DISABLE, 0, 0);
}

static void nice_one(void)
{
	must(setpriority(PRIO_PROCESS, gettid(), 11));
	must(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_RT, 2)));
	must(prctl(PR_SET_KEEPCAPS, 1));
	// Utilization clamps: where the kernel has them.
	struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t times[3]; uint32_t clamps[2]; }
		attributes = { sizeof attributes, 0, 0x60 | 0x18, 0, 0, { 0 }, { 100, 900 } };
	syscall(SYS_sched_setattr, 0, &attributes, 0);
}

static void (*const changes[])(void) = { another_user, nobody, real_time, round_robin, idle, deadline, nice_one };
static _Atomic int changed, dumpable, remembered, go_on, compared;

static void *one_thread(void *change)
{
	(*(void (*const *)(void))change)();
	changed++;
	while (!dumpable) // some answers are about the whole process
		nap(MS);
	struct word *before = remember();
	remembered++;
	while (!go_on)
		nap(10 * MS); // reads no clock
	compare(before);
	compared++;
	while (compared < (int)COUNT(changes))
		nap(10 * MS);
	return change;
}

static int threads(void)
{
	pthread_t all[COUNT(changes)];
	for (size_t i = 0; i < COUNT(changes); i++)
		zero(pthread_create(&all[i], NULL, one_thread, (void *)&changes[i]));
	while (changed < (int)COUNT(changes))
		nap(MS);
	must(prctl(PR_SET_DUMPABLE, 1)); // a change of users has ended that
	dumpable++;
	while (remembered < (int)COUNT(changes))
		nap(MS);
	ready();
	wait_go();
	expect(prctl(PR_GET_DUMPABLE) == 1);
	go_on = 1;
	for (size_t i = 0; i < COUNT(changes); i++)
		zero(pthread_join(all[i], NULL));
	return passed();
}

// --- whoever restores: something that its children inherit, before it becomes another program ---
static void core_group(void) { must(prctl(62 /* PR_SCHED_CORE */, 1 /* CREATE */, 0, 1 /* the process */, 0)); }
static void no_new_privs(void) { must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); }
static void mdwe(void) { must(prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0)); }
static void merge(void) { must(prctl(67 /* PR_SET_MEMORY_MERGE */, 1, 0, 0, 0)); }
static void bounding(void) { must(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT)); }
static void store_bypass(long how) { must(prctl(PR_SET_SPECULATION_CTRL, 0 /* PR_SPEC_STORE_BYPASS */, how, 0, 0)); }
static void speculation(void) { store_bypass(PR_SPEC_DISABLE); }
static void speculation_for_good(void) { store_bypass(PR_SPEC_FORCE_DISABLE); }

static void filter(void)
{
	struct sock_filter allow = { BPF_RET, 0, 0, SECCOMP_RET_ALLOW };
	must(prctl(PR_SET_SECCOMP, 2 /* filters */, &(struct sock_fprog){ 1, &allow }));
}

static const struct { const char *name; void (*restrict_)(void); } ways[] = {
	{ "core_group", core_group }, { "no_new_privs", no_new_privs }, { "mdwe", mdwe }, { "merge", merge }, { "bounding", bounding },
	{ "speculation", speculation }, { "speculation_for_good", speculation_for_good }, { "filter", filter },
};

static int become(char **argv)
{
	for (size_t i = 0; i < COUNT(ways); i++)
		if (!strcmp(ways[i].name, argv[0])) {
			ways[i].restrict_();
			must(execv(argv[1], argv + 1));
		}
	fail("usage");
}

int main(int argc, char **argv)
{
	begin();
	if (argc > 3 && !strcmp(argv[1], "become"))
		return become(argv + 2);
	if (argc == 2 && !strcmp(argv[1], "process"))
		return process();
	if (argc == 2 && !strcmp(argv[1], "threads"))
		return threads();
	fail("usage");
}
