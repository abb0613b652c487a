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
	ready();
	wait_go();
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
