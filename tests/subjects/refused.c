// Holds what cannot be checkpointed, and a lot that a checkpoint could disturb: both must be as before.
#include "subject.h"
#include <linux/filter.h>
#include <linux/perf_event.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ptrace.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/user.h>
#include <sys/un.h>

static _Atomic int over;
static _Atomic int elsewhere, keyrings, dispatches;
static volatile int ticks;
static void tick(int signal) { (void)signal; ticks++; }

// One thread that is in another namespace than the others, too.
static void *count(void *sum)
{
	must(unshare(CLONE_NEWUTS));
	keyrings += syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -1 /* of the thread */, 1) != -1;
	elsewhere = gettid();
	uint64_t number = 0, total = 0;
	while (!over)
		total += ++number;
	*(int *)sum = total == (number % 2 ? (number + 1) / 2 * number : number / 2 * (number + 1));
	return NULL;
}

// One whose system calls are signals for the moment (syscall user dispatch): it makes none.
static void *dispatch(void *unused)
{
	static volatile char selector;
	if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector) == 0)
		dispatches = gettid();
	else
		dispatches = -1; // a kernel without it
	selector = dispatches > 0;
	while (!over)
		;
	selector = 0;
	return unused;
}

// Sets a hardware breakpoint in its parent, where nobody ever gets.
static void set_breakpoint(void)
{
	static long never;
	pid_t parent = getppid();
	must(ptrace(PTRACE_SEIZE, parent, 0, 0));
	must(ptrace(PTRACE_INTERRUPT, parent, 0, 0));
	expect(waitpid(parent, NULL, __WALL) == parent);
	must(ptrace(PTRACE_POKEUSER, parent, offsetof(struct user, u_debugreg[0]), &never));
	must(ptrace(PTRACE_POKEUSER, parent, offsetof(struct user, u_debugreg[7]), 0xd0001));
	must(ptrace(PTRACE_DETACH, parent, 0, 0));
}

static char expected[4096];

// A descriptor that must be named in these words, if this machine has such.
static void hold(int fd, const char *words)
{
	if (fd >= 0)
		snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "fd %d %s\n", fd, words);
}

static void hold_nameless(void)
{
	char room[512] = { 0 };
	hold(syscall(SYS_io_uring_setup, 4, room), "io_uring");
	struct perf_event_attr counter = { .type = PERF_TYPE_SOFTWARE, .size = sizeof counter, .config = PERF_COUNT_SW_DUMMY };
	hold(syscall(SYS_perf_event_open, &counter, 0, -1, -1, 0), "performance counter");
	uint32_t map[32] = { 2, 4, 4, 1 }; // BPF_MAP_TYPE_ARRAY
	hold(syscall(SYS_bpf, 0, map, sizeof map), "BPF");
	hold(syscall(SYS_fsopen, "tmpfs", 0), "fsopen");
	uint64_t ruleset = 1;
	hold(syscall(SYS_landlock_create_ruleset, &ruleset, sizeof ruleset, 0), "landlock");
	hold(syscall(SYS_userfaultfd, 1), "userfaultfd");
	hold(syscall(SYS_memfd_secret, 0), "secret");
	hold(open("/proc/self/ns/net", O_RDONLY), "namespaces");
	hold(open("/dev/kmsg", O_RDONLY), "kernel log");
	hold(open("/dev/tty0", O_RDWR | O_NOCTTY), "terminals");
	hold(open("/dev/net/tun", O_RDWR), "tunnel");
	hold(open("/dev/fuse", O_RDWR), "FUSE");
	int kvm = open("/dev/kvm", O_RDWR);
	hold(kvm, "KVM");
	if (kvm >= 0)
		hold(ioctl(kvm, 0xae01, 0), "KVM virtual machines"); // KVM_CREATE_VM
	hold(open("/dev/hwrng", O_RDONLY), "random numbers");
	hold(open("/dev/loop-control", O_RDWR), "loop devices' control");
	hold(open("/dev/loop0", O_RDONLY), "block devices");
	hold(open("/dev/cpu_dma_latency", O_RDONLY), "character devices");
	hold(open("/dev/vsock", O_RDWR), "character devices");
	hold(open("/dev/userfaultfd", O_RDWR), "character devices");
}

// Supported kinds, in states that cannot be brought back.
static void put_number(const char *name, int number)
{
	char text[16];
	snprintf(text, sizeof text, "%d", number);
	put_file(name, text);
}

static void hold_odd(void)
{
	int inotify = must(inotify_init1(0));
	must(inotify_add_watch(inotify, ".", IN_CREATE));
	close(must(open("event", O_CREAT | O_WRONLY, 0600)));
	hold(inotify, "wait to be read");
	int gone = must(inotify_init1(0)), file = must(open("gone", O_CREAT | O_WRONLY, 0600));
	must(inotify_add_watch(gone, "gone", IN_MODIFY));
	must(unlink("gone"));
	hold(gone, "watch 1");
	(void)file;
	hold(must(syscall(SYS_pidfd_open, getppid(), 0)), "not part of the tree");
	char path[32];
	pid_t dead = must(fork());
	if (!dead)
		_exit(0);
	snprintf(path, sizeof path, "/proc/%d/stat", dead);
	hold(must(open(path, O_RDONLY)), "not part of the tree");
	must(waitpid(dead, NULL, 0));
	int owned = must(eventfd(0, 0));
	must(fcntl(owned, F_SETOWN, getppid()));
	hold(owned, "F_SETOWN");
	int epoll = must(epoll_create1(0)), ends[2];
	must(pipe(ends));
	struct epoll_event once = { EPOLLOUT | EPOLLONESHOT, { 0 } };
	must(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[1], &once));
	expect(epoll_wait(epoll, &once, 1, 0) == 1);
	char full[65536] = { 0 };
	must(fcntl(ends[1], F_SETFL, O_NONBLOCK));
	expect(write(ends[1], full, sizeof full) == sizeof full);
	hold(epoll, "EPOLLONESHOT");
	int group = must(fanotify_init(FAN_NONBLOCK, O_RDONLY)), marked = must(open("marked", O_CREAT | O_WRONLY, 0600));
	must(fanotify_mark(group, FAN_MARK_ADD, FAN_MODIFY, AT_FDCWD, "marked"));
	must(write(marked, "x", 1));
	hold(group, "wait to be read");
	int told = must(open(".", O_RDONLY | O_DIRECTORY));
	signal(SIGIO, SIG_IGN);
	if (!fcntl(told, F_NOTIFY, DN_RENAME | DN_MULTISHOT))
		hold(told, "dnotify");
	int pressure = open("/proc/pressure/memory", O_RDWR | O_NONBLOCK);
	if (pressure >= 0) // which may be switched off
		hold(pressure, "pressure");
	must(mkdir("covered", 0700));
	hold(must(open("covered/file", O_CREAT | O_RDWR, 0600)), "mounted over");
	must(mount("none", "covered", "tmpfs", 0, "size=1m"));
	must(link("marked", "other"));
	hold(must(open("other", O_RDONLY)), "other names");
	must(unlink("other"));
	int timer = must(timerfd_create(CLOCK_REALTIME, 0));
	struct itimerspec spec = { { 0, 1000000 }, { 1, 0 } };
	must(timerfd_settime(timer, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &spec, NULL));
	hold(timer, "ECANCELED");
}

// Sockets that are no pairs of the tree's own, or have more in them than bytes.
static void hold_sockets(void)
{
	hold(must(socket(AF_UNIX, SOCK_STREAM, 0)), "not connected");
	struct sockaddr_un name = { AF_UNIX, "" };
	int named = must(socket(AF_UNIX, SOCK_STREAM, 0)), pending = must(socket(AF_UNIX, SOCK_STREAM, 0));
	must(bind(named, (void *)&name, sizeof(sa_family_t)));
	must(listen(named, 1));
	socklen_t length = sizeof name;
	must(getsockname(named, (void *)&name, &length));
	must(connect(pending, (void *)&name, length));
	hold(named, "with a name");
	hold(pending, "connected to one with a name");
	int pair[2], one = 1;
	must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	struct {
		struct cmsghdr head;
		int fd;
	} rights = { { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS }, pair[0] };
	struct msghdr message = { .msg_iov = &(struct iovec){ "x", 1 }, .msg_iovlen = 1, .msg_control = &rights,
				  .msg_controllen = CMSG_SPACE(sizeof(int)) };
	must(sendmsg(pair[0], &message, 0));
	hold(pair[1], "SCM_RIGHTS");
	must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	must(setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
	must(write(pair[0], "x", 1));
	hold(pair[1], "SCM_CREDENTIALS");
	must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	if (send(pair[0], "x", 1, MSG_OOB) == 1)
		hold(pair[1], "MSG_OOB");
	must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
	struct sock_filter all = { BPF_RET | BPF_K, 0, 0, 100 };
	must(setsockopt(pair[1], SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 1, &all }, sizeof(struct sock_fprog)));
	hold(pair[1], "filter");
	// Made in our table by a process that is gone.
	int next = must(dup(0));
	must(close(next));
	pid_t maker = must(syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0));
	if (!maker)
		_exit(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	join_child(maker);
	hold(next, "is gone");
}

int main(void)
{
	begin();
	int event = must(eventfd(7, 0));
	int socket_ = must(socket(AF_INET, SOCK_STREAM, 0));
	hold(socket_, "sockets");
	hold_nameless();
	hold_odd();
	hold_sockets();
	put_file("expected", expected);
	pid_t child = must(fork());
	if (!child) {
		must(socket(AF_UNIX, SOCK_DGRAM, 0));
		set_breakpoint();
		pthread_t dispatcher;
		zero(pthread_create(&dispatcher, NULL, dispatch, NULL));
		while (!dispatches)
			nap(MS);
		put_number("dispatches", dispatches);
		wait_go();
		over = 1;
		zero(pthread_join(dispatcher, NULL));
		return 0;
	}
	siginfo_t end;
	pid_t aborted = must(fork());
	if (!aborted)
		abort();
	must(waitid(P_PID, aborted, &end, WEXITED | WNOWAIT));
	if (end.si_code == CLD_DUMPED)
		put_number("dumped_core", aborted);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + 1);
	zero(pthread_sigmask(SIG_BLOCK, &set, NULL));
	must(kill(getpid(), SIGUSR1));
	must(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = 9 }));
	int right = 0;
	pthread_t thread;
	zero(pthread_create(&thread, NULL, count, &right));
	while (!elsewhere)
		nap(MS);
	keyrings += syscall(SYS_keyctl, 0, -2 /* of the process */, 1) != -1;
	if (keyrings)
		put_file("keyrings", ""); // the kernel has them
	put_number("elsewhere", elsewhere);
	while (access("dispatches", F_OK))
		nap(MS);
	signal(SIGALRM, tick);
	must(setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 20000 }, { 0, 20000 } }, NULL));
	ready();
	wait_go();
	int before = ticks;
	nap(200 * MS);
	expect(ticks > before + 4, "%d ticks", ticks - before);
	over = 1;
	zero(pthread_join(thread, NULL));
	expect(right, "the sum is wrong");
	uint64_t value;
	expect(read(event, &value, 8) == 8 && value == 7);
	siginfo_t info;
	expect(sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGUSR1);
	expect(sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGRTMIN + 1 && info.si_value.sival_int == 9);
	close(socket_);
	must(umount2("covered", MNT_DETACH));
	join_child(child);
	must(waitpid(aborted, NULL, 0));
	return passed();
}
