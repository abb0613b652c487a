// Files that tell of events: eventfd, timerfd, signalfd, pidfd, epoll, inotify; and who gets signals about files.
#include "subject.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static uint64_t take(int fd)
{
	uint64_t value = 0;
	expect(read(fd, &value, 8) == 8, "%s", strerror(errno));
	return value;
}

static void give(int fd, uint64_t value) { expect(write(fd, &value, 8) == 8); }

static int is_ready_for(int fd, short events)
{
	struct pollfd polled = { fd, events, 0 };
	return must(poll(&polled, 1, 0)) ? polled.revents : 0;
}

static int counters(void)
{
	int plain = must(eventfd(0, 0)), large = must(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	int semaphore = must(eventfd(3, EFD_SEMAPHORE)), full = must(eventfd(0, EFD_NONBLOCK));
	give(large, 0xfedcba9876543210);
	give(full, UINT64_MAX - 1);
	must(fcntl(plain, F_SETFL, O_APPEND));
	int same = must(dup(semaphore));
	sigset_t some, none;
	sigemptyset(&none);
	sigemptyset(&some);
	sigaddset(&some, SIGUSR1);
	sigaddset(&some, SIGRTMAX);
	zero(pthread_sigmask(SIG_BLOCK, &some, NULL));
	int signals = must(signalfd(-1, &some, SFD_NONBLOCK)), no_signals = must(signalfd(-1, &none, SFD_CLOEXEC));
	must(kill(getpid(), SIGUSR1));
	pid_t child = must(fork());
	if (!child) {
		wait_go();
		expect(take(same) == 1);
		give(plain, 5);
		return 0;
	}
	ready();
	wait_go();
	join_child(child);
	expect(take(semaphore) == 1 && take(same) == 1 && !is_ready_for(semaphore, POLLIN));
	expect(take(plain) == 5);
	expect(fcntl(plain, F_GETFL) & O_APPEND);
	expect(take(large) == 0xfedcba9876543210);
	uint64_t one = 1;
	expect(write(full, &one, 8) == -1 && errno == EAGAIN);
	expect(read(large, &one, 8) == -1 && errno == EAGAIN);
	struct signalfd_siginfo info;
	expect(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1);
	expect(read(signals, &info, sizeof info) == -1 && errno == EAGAIN);
	must(sigqueue(getpid(), SIGRTMAX, (union sigval){ .sival_int = 77 }));
	expect(read(signals, &info, sizeof info) == sizeof info && info.ssi_int == 77);
	expect(!is_ready_for(no_signals, POLLIN) && fcntl(no_signals, F_GETFD) == FD_CLOEXEC);
	expect(!(fcntl(no_signals, F_GETFL) & O_NONBLOCK) && fcntl(signals, F_GETFL) & O_NONBLOCK);
	return passed();
}

static int timer(int clock, int flags, ns value, ns interval)
{
	int fd = must(timerfd_create(clock, TFD_NONBLOCK));
	struct itimerspec spec = { timespec(interval), timespec(value) };
	must(timerfd_settime(fd, flags, &spec, NULL));
	return fd;
}

static ns left(int fd)
{
	struct itimerspec spec;
	must(timerfd_gettime(fd, &spec));
	return spec.it_value.tv_sec * SECOND + spec.it_value.tv_nsec;
}

// Until it expires, and how often it has.
static uint64_t expired(int fd)
{
	struct pollfd polled = { fd, POLLIN, 0 };
	expect(must(poll(&polled, 1, 5000)) == 1, "it never expires");
	return take(fd);
}

static int timers(void)
{
	// Of the alarm clocks the time can only be read where there is a real time clock: that of the others is theirs.
	static const int kinds[] = { CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM };
	static const int clocks[] = { CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME, CLOCK_BOOTTIME };
	enum { N = COUNT(clocks) };
	const ns length = 900 * MS, far = 7200 * SECOND, period = 10 * MS;
	int relative[N], absolute[N], periodic[N], unread[N], past[N], off[N];
	ns start[N], deadline[N], end[N], first[N];
	for (int i = 0; i < N; i++) {
		int clock = clocks[i];
		relative[i] = timer(kinds[i], 0, length, 0);
		start[i] = now(CLOCK_MONOTONIC);
		deadline[i] = now(clock) + far;
		int cancel = clock == CLOCK_REALTIME ? TFD_TIMER_CANCEL_ON_SET : 0;
		absolute[i] = timer(kinds[i], TFD_TIMER_ABSTIME | cancel, deadline[i], 0);
		first[i] = now(clock) + period;
		periodic[i] = timer(kinds[i], TFD_TIMER_ABSTIME, first[i], period);
		unread[i] = timer(kinds[i], 0, 2 * MS, 3600 * SECOND);
		end[i] = now(clock) + 2 * MS;
		past[i] = timer(kinds[i], TFD_TIMER_ABSTIME, SECOND, 0);
		off[i] = timer(kinds[i], 0, 0, 5 * SECOND);
	}
	int one = timer(CLOCK_MONOTONIC, 0, MS, 0); // expires before the checkpoint, once
	uint64_t read_before[N];
	nap(30 * MS);
	for (int i = 0; i < N; i++)
		read_before[i] = expired(periodic[i]);
	nap(20 * MS);
	// A periodic one that has expired shows no time in /proc: the harness would see that change.
	for (int i = 0; i < N; i++)
		left(unread[i]);
	ready();
	wait_go();
	expect(take(one) == 1 && left(one) == 0);
	for (int i = 0; i < N; i++) {
		int clock = clocks[i];
		ns until = now(clock) + left(absolute[i]);
		ns moved = until - deadline[i];
		expect(moved > -20000 && moved < MS, "clock %d: an absolute deadline moved by %lld ns", clock, moved);
		// All that it has missed, and the phase.
		uint64_t count = read_before[i] + expired(periodic[i]);
		ns next = now(clock) + left(periodic[i]);
		ns phase = (next - first[i]) % period;
		uint64_t passed = (next - first[i] + period / 2) / period;
		expect(phase < MS || phase > period - MS, "clock %d: the phase moved by %lld ns", clock, phase);
		expect(count >= passed - 1 && count <= passed, "clock %d: %lld of %lld expirations", clock, (ns)count,
		       (ns)passed);
		expect(take(unread[i]) == 1, "clock %d", clock);
		ns shift = now(clock) + left(unread[i]) - end[i] - 3600 * SECOND;
		expect(shift > gap_min - MS && shift < gap_max + 5 * MS, "clock %d: the period moved by %lld (%lld %lld)",
		       clock, shift, gap_min, gap_max);
		expect(take(past[i]) == 1);
		expect(left(off[i]) == 0 && !is_ready_for(off[i], POLLIN));
		if (now(CLOCK_MONOTONIC) - start[i] < length)
			expect(left(relative[i]) > 0);
	}
	for (int i = 0; i < N; i++) {
		expect(expired(relative[i]) == 1);
		expect_relative(start[i], now(CLOCK_MONOTONIC), length);
	}
	return passed();
}

static int pidfd_open_(pid_t pid, unsigned flags) { return must(syscall(SYS_pidfd_open, pid, flags)); }

static void *wait_for_go(void *tid)
{
	*(_Atomic int *)tid = gettid();
	wait_go();
	nap(100 * MS);
	return NULL;
}

static ino_t inode(int fd)
{
	struct stat stat;
	must(fstat(fd, &stat));
	return stat.st_ino;
}

// Of a child, oneself, a thread, a zombie, the dead; and a child's of its parent.
// `dead_too`: also of so many processes that nobody can find any more, too.
static int pidfds_of(int dead_too)
{
	_Atomic int tid = 0;
	pthread_t thread;
	zero(pthread_create(&thread, NULL, wait_for_go, (void *)&tid));
	while (!tid)
		nap(MS);
	int self = pidfd_open_(getpid(), O_NONBLOCK), of_thread = pidfd_open_(tid, O_EXCL);
	int ends[2];
	must(pipe(ends));
	pid_t child = must(fork()), zombie, dead[2];
	if (!child) {
		int parent = pidfd_open_(getppid(), 0);
		char byte;
		must(write(ends[1], "x", 1));
		wait_go();
		close(ends[1]);
		expect(read(ends[0], &byte, 1) == 0);
		must(syscall(SYS_pidfd_send_signal, parent, 0, NULL, 0));
		return 7;
	}
	if (!(zombie = must(fork())))
		_exit(3);
	char byte;
	must(read(ends[0], &byte, 1));
	int of_child = pidfd_open_(child, 0), again = pidfd_open_(child, 0), of_zombie = pidfd_open_(zombie, 0);
	int of_dead[2], also[2];
	for (int i = 0; i < dead_too; i++) {
		if (!(dead[i] = must(fork()))) {
			if (i)
				pause();
			_exit(5);
		}
		of_dead[i] = pidfd_open_(dead[i], i ? O_EXCL : 0);
		also[i] = pidfd_open_(dead[i], O_NONBLOCK);
		if (i)
			must(kill(dead[i], SIGTERM));
		must(waitpid(dead[i], NULL, 0));
	}
	must(waitid(P_PID, zombie, &(siginfo_t){ 0 }, WEXITED | WNOWAIT));
	ready();
	wait_go();
	close(ends[1]);
	expect(inode(of_child) == inode(again) && inode(of_child) != inode(self));
	expect(!dead_too || (inode(of_dead[0]) == inode(also[0]) && inode(of_dead[0]) != inode(of_dead[1])));
	expect(fcntl(self, F_GETFL) & O_NONBLOCK && !(fcntl(of_child, F_GETFL) & O_NONBLOCK));
	expect(fcntl(of_thread, F_GETFL) & O_EXCL && (!dead_too || fcntl(of_dead[1], F_GETFL) & O_EXCL));
	must(syscall(SYS_pidfd_send_signal, self, 0, NULL, 0));
	expect(!is_ready_for(of_thread, POLLIN));
	zero(pthread_join(thread, NULL));
	// Its memory is told of its end a moment earlier.
	expect(must(poll(&(struct pollfd){ of_thread, POLLIN, 0 }, 1, 5000)) == 1);
	siginfo_t info;
	must(waitid(P_PIDFD, of_zombie, &info, WEXITED));
	expect(info.si_pid == zombie && info.si_status == 3);
	must(waitid(P_PIDFD, of_child, &info, WEXITED));
	expect(info.si_pid == child && info.si_status == 7, "%d", info.si_status);
	for (int i = 0; i < dead_too; i++) {
		expect(is_ready_for(of_dead[i], POLLIN) & POLLIN);
		expect(syscall(SYS_pidfd_send_signal, also[i], 0, NULL, 0) == -1 && errno == ESRCH);
		// struct pidfd_info, which is too new for the C library's headers; 8 is PIDFD_INFO_EXIT.
		struct { uint64_t mask, cgroup; uint32_t pid, tgid, ppid, users[8]; int32_t exit_code; } about = { .mask = 8 };
		if (!ioctl(of_dead[i], _IOWR(0xff, 11, about), &about) && about.mask & 8)
			expect(about.exit_code == (i ? SIGTERM : 5 << 8), "%#x", about.exit_code);
	}
	return passed();
}

static int pidfds(void) { return pidfds_of(2); }
static int pidfds_of_living(void) { return pidfds_of(0); }

static int epoll_fd;

static void watch(int epoll, int fd, uint32_t events, uint64_t data)
{
	must(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){ events, { .u64 = data } }));
}

// What it reports at once, as a set of small numbers.
static uint64_t reported(int epoll)
{
	struct epoll_event events[64];
	uint64_t set = 0;
	int count = must(epoll_wait(epoll, events, 64, 0));
	for (int i = 0; i < count; i++) {
		expect(!(set & 1ull << events[i].data.u64), "twice %lld", (ns)events[i].data.u64);
		set |= 1ull << events[i].data.u64;
	}
	return set;
}

#define SET(n) (1ull << (n))

static int epolls(void)
{
	int epoll = epoll_fd = must(epoll_create1(EPOLL_CLOEXEC));
	int set = must(eventfd(1, EFD_NONBLOCK)), unset = must(eventfd(0, EFD_NONBLOCK));
	watch(epoll, set, EPOLLIN, 1);
	watch(epoll, unset, EPOLLIN | EPOLLEXCLUSIVE, 2);
	// A file under a number that is closed by now, one under a number that is another's, and one twice.
	int closed = must(eventfd(1, EFD_NONBLOCK)), dup_of_closed = must(fcntl(closed, F_DUPFD, 40));
	watch(epoll, closed, EPOLLIN, 3);
	int reused = must(eventfd(1, EFD_NONBLOCK)), dup_of_reused = must(fcntl(reused, F_DUPFD, 50));
	watch(epoll, reused, EPOLLIN, 4);
	must(dup3(must(open("/dev/null", O_RDONLY)), reused, O_CLOEXEC));
	watch(epoll, dup_of_reused, EPOLLIN, 5);
	// Two files under one number.
	int second = must(eventfd(1, EFD_NONBLOCK)), dup_of_second = must(fcntl(second, F_DUPFD, 60));
	watch(epoll, second, EPOLLIN, 6);
	close(second);
	int third = must(eventfd(1, EFD_NONBLOCK));
	expect(third == second);
	watch(epoll, third, EPOLLIN, 7);
	// It goes away with its file.
	int gone = must(eventfd(1, 0));
	watch(epoll, gone, EPOLLIN, 8);
	close(gone);
	close(closed);
	// Reported once.
	int spent = must(eventfd(1, EFD_NONBLOCK)), broken[2], emptied[2], idle[2];
	must(pipe2(broken, O_NONBLOCK));
	must(pipe2(emptied, O_NONBLOCK));
	must(pipe2(idle, O_NONBLOCK));
	int once = must(epoll_create1(0));
	watch(once, spent, EPOLLIN | EPOLLONESHOT, 1);
	watch(once, broken[0], EPOLLIN | EPOLLONESHOT | EPOLLET, 2);
	watch(once, idle[1], EPOLLOUT | EPOLLONESHOT, 3);
	watch(once, idle[0], EPOLLIN | EPOLLONESHOT, 4);
	watch(once, emptied[0], EPOLLIN | EPOLLONESHOT, 6);
	must(write(broken[1], "x", 1));
	must(write(emptied[1], "x", 1));
	expect(reported(once) == (SET(1) | SET(2) | SET(3) | SET(6)));
	expect(read(emptied[0], &(char){ 0 }, 1) == 1);
	// One in another, in another.
	int inner = must(epoll_create1(0)), middle = must(epoll_create1(0)), outer = must(epoll_create1(0));
	watch(outer, middle, EPOLLIN, 1);
	watch(middle, inner, EPOLLIN | EPOLLET, 2);
	watch(inner, unset, EPOLLIN, 3);
	// Edges: seen, not seen, seen and writable all the time.
	int seen = must(epoll_create1(0)), unseen = must(epoll_create1(0)), edge = must(eventfd(1, EFD_NONBLOCK));
	watch(seen, edge, EPOLLIN | EPOLLOUT | EPOLLET, 1);
	watch(seen, idle[1], EPOLLOUT | EPOLLET, 2);
	expect(reported(seen) == (SET(1) | SET(2)) && reported(seen) == 0);
	watch(unseen, edge, EPOLLIN | EPOLLET, 1);
	// Signals of the process, through a signalfd.
	sigset_t usr1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	zero(pthread_sigmask(SIG_BLOCK, &usr1, NULL));
	int of_signals = must(epoll_create1(0)), signals = must(signalfd(-1, &usr1, SFD_NONBLOCK));
	watch(of_signals, signals, EPOLLIN, 1);
	must(kill(getpid(), SIGUSR1));
	int of_timer = must(epoll_create1(0)), soon = timer(CLOCK_MONOTONIC, 0, 2 * MS, 0), later = timer(CLOCK_MONOTONIC, 0, 3600 * SECOND, 0);
	watch(of_timer, soon, EPOLLIN | EPOLLWAKEUP, 1);
	watch(of_timer, later, EPOLLIN, 2);
	int none = must(epoll_create1(0));
	pid_t child = must(fork());
	if (!child) {
		close(unset);
		close(set);
		int own = must(epoll_create1(0)), mine = must(eventfd(0, 0));
		watch(own, mine, EPOLLIN, 9);
		wait_go();
		expect(reported(own) == 0);
		give(mine, 1);
		expect(reported(own) == SET(9) && !fcntl(reused, F_GETFD) == 0);
		return 0;
	}
	nap(10 * MS);
	ready();
	wait_go();
	const uint64_t all = SET(1) | SET(3) | SET(4) | SET(5) | SET(6) | SET(7);
	expect(reported(epoll) == all, "%llx", (ns)reported(epoll));
	take(set);
	take(dup_of_closed);
	expect(reported(epoll) == (all & ~(SET(1) | SET(3))));
	give(unset, 1);
	expect(reported(epoll) == ((all | SET(2)) & ~(SET(1) | SET(3))));
	// The same numbers name them.
	must(epoll_ctl(epoll, EPOLL_CTL_DEL, dup_of_reused, NULL));
	expect(epoll_ctl(epoll, EPOLL_CTL_DEL, reused, NULL) == -1 && errno == EPERM, "%s", strerror(errno));
	must(dup3(dup_of_reused, reused, 0));
	must(epoll_ctl(epoll, EPOLL_CTL_DEL, reused, NULL));
	join_child(child);
	must(dup3(dup_of_second, second, 0)); // closes the third
	expect(reported(epoll) == (SET(2) | SET(6)), "%llx", (ns)reported(epoll));
	must(epoll_ctl(epoll, EPOLL_CTL_DEL, second, NULL));
	// Still silent, whatever happens to their files; and only that.
	expect(reported(once) == 0);
	expect(read(emptied[0], &(char){ 0 }, 1) == -1 && errno == EAGAIN);
	close(broken[1]);
	close(emptied[1]);
	give(spent, 1);
	expect(reported(once) == 0, "a watch that is spent reports");
	must(write(idle[1], "x", 1));
	expect(reported(once) == SET(4));
	struct epoll_event again = { EPOLLIN, { .u64 = 5 } };
	must(epoll_ctl(once, EPOLL_CTL_MOD, broken[0], &again));
	expect(reported(once) == SET(5));
	expect(reported(outer) == SET(1) && reported(middle) == SET(2) && reported(middle) == 0 && reported(inner) == SET(3));
	expect(reported(seen) == 0, "an edge again");
	give(edge, 1);
	expect(reported(seen) == SET(1));
	expect(reported(unseen) == SET(1) && reported(unseen) == 0);
	expect(reported(of_signals) == SET(1) && reported(of_signals) == SET(1));
	struct signalfd_siginfo info;
	must(read(signals, &info, sizeof info));
	expect(reported(of_signals) == 0);
	must(kill(getpid(), SIGUSR1));
	expect(reported(of_signals) == SET(1));
	expect(reported(of_timer) == SET(1) && take(soon) == 1 && reported(of_timer) == 0);
	expect(reported(none) == 0);
	return passed();
}

static int event(int fd, uint32_t mask, int number, const char *name)
{
	static char room[4096] __attribute__((aligned(8)));
	static ssize_t length, at;
	if (at == length) {
		length = read(fd, room, sizeof room);
		at = 0;
		if (length <= 0)
			return length = 0;
	}
	struct inotify_event *got = (void *)(room + at);
	at += sizeof *got + got->len;
	expect(got->mask == mask && got->wd == number && !strcmp(got->len ? got->name : "", name),
	       "wd %d mask %#x %s, not wd %d mask %#x %s", got->wd, got->mask, got->len ? got->name : "", number, mask, name);
	return 1;
}

static void create(const char *name) { close(must(open(name, O_CREAT | O_WRONLY | O_EXCL, 0600))); }

static int inotify(void)
{
	must(mkdir("watched", 0700));
	must(mkdir("other", 0700));
	put_file("text", "text");
	must(rename("text", "watched/old"));
	create("other/kept");
	int fd = must(inotify_init1(IN_NONBLOCK)), none = must(inotify_init1(IN_CLOEXEC));
	int held = must(open("watched/old", O_RDONLY)), inside = must(open("watched", O_RDONLY | O_DIRECTORY));
	int gone[3], all;
	for (int i = 0; i < 3; i++) {
		gone[i] = must(inotify_add_watch(fd, "other", IN_OPEN));
		must(inotify_rm_watch(fd, gone[i]));
		expect(event(fd, IN_IGNORED, gone[i], ""));
	}
	all = must(inotify_add_watch(fd, "watched", IN_ALL_EVENTS | IN_EXCL_UNLINK));
	int file = must(inotify_add_watch(fd, "other/kept", IN_MODIFY | IN_ATTRIB));
	int dropped = must(inotify_add_watch(fd, "/dev/null", IN_OPEN));
	must(inotify_rm_watch(fd, dropped));
	expect(event(fd, IN_IGNORED, dropped, ""));
	int once = must(inotify_add_watch(fd, "other", IN_CREATE | IN_ONESHOT));
	must(symlink("nowhere", "link"));
	int link = must(inotify_add_watch(fd, "link", IN_DELETE_SELF | IN_DONT_FOLLOW));
	// The same file again is the same watch.
	expect(inotify_add_watch(fd, "other/kept", IN_ATTRIB | IN_MASK_ADD) == file);
	expect(!event(fd, 0, 0, ""));
	ready();
	wait_go();
	expect(!event(fd, 0, 0, ""), "something was in it");
	expect(!is_ready_for(none, POLLIN));
	expect(inotify_add_watch(fd, "other/kept", IN_ATTRIB | IN_MASK_ADD) == file, "another watch of the same file");
	must(chmod("other/kept", 0640));
	expect(event(fd, IN_ATTRIB, file, ""));
	create("watched/new");
	expect(event(fd, IN_CREATE, all, "new") && event(fd, IN_OPEN, all, "new") && event(fd, IN_CLOSE_WRITE, all, "new"));
	create("other/new");
	expect(event(fd, IN_CREATE, once, "new") && event(fd, IN_IGNORED, once, ""));
	create("other/newer");
	char byte;
	expect(read(held, &byte, 1) == 1 && event(fd, IN_ACCESS, all, "old"));
	must(unlink("watched/old"));
	expect(event(fd, IN_DELETE, all, "old"));
	expect(read(held, &byte, 1) == 1 && !event(fd, 0, 0, ""), "IN_EXCL_UNLINK");
	must(unlink("link"));
	expect(event(fd, IN_DELETE_SELF, link, "") && event(fd, IN_IGNORED, link, ""));
	expect(inotify_add_watch(fd, "/dev/zero", IN_OPEN) == link + 1, "the next number");
	close(inside);
	return passed();
}

// The next event of a group: what has happened, and to the file of which name. 0: there is none.
static int told(int group, uint64_t mask, const char *name)
{
	char room[4096] __attribute__((aligned(8))), link[600] = "", *named = link;
	// One event at a time: the larger ones come with names.
	ssize_t length = read(group, room, FAN_EVENT_METADATA_LEN + 8);
	if (length == -1 && errno == EINVAL)
		length = read(group, room, sizeof room);
	if (length == -1 && errno == EAGAIN)
		return 0;
	struct fanotify_event_metadata *event_ = (void *)room;
	expect(length == event_->event_len, "%zd", length);
	if (event_->fd >= 0) {
		char way[64];
		snprintf(way, sizeof way, "/proc/self/fd/%d", event_->fd);
		must(readlink(way, link, sizeof link - 1));
		named = strrchr(link, '/') + 1;
		close(event_->fd);
	} else {
		struct fanotify_event_info_fid *info = (void *)(event_ + 1);
		expect(info->hdr.info_type == FAN_EVENT_INFO_TYPE_DFID_NAME);
		struct file_handle *handle = (void *)info->handle;
		named = (char *)handle->f_handle + handle->handle_bytes;
	}
	expect(event_->mask == mask && !strcmp(named, name), "%#llx of %s, not %#llx of %s", (ns)event_->mask, named, (ns)mask, name);
	return 1;
}

// Groups of both kinds; inodes, mounts and file systems that are marked or ignored.
static int fanotify(void)
{
	must(mkdir("fan", 0700));
	must(mkdir("place", 0700));
	must(mount("none", "place", "tmpfs", 0, "size=1m"));
	must(mkdir("place/ignored", 0700));
	create("fan/quiet");
	create("fan/old");
	int files = must(fanotify_init(FAN_CLASS_CONTENT | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE, O_RDONLY | O_CLOEXEC));
	int names = must(fanotify_init(FAN_REPORT_DFID_NAME | FAN_REPORT_TID | FAN_NONBLOCK | FAN_CLOEXEC, O_RDWR));
	int none = must(fanotify_init(FAN_CLASS_NOTIF, O_RDWR | O_APPEND));
	must(fanotify_mark(files, FAN_MARK_ADD, FAN_OPEN | FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD, AT_FDCWD, "fan"));
	must(fanotify_mark(files, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, FAN_OPEN, AT_FDCWD, "fan/quiet"));
	must(fanotify_mark(files, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_MODIFY, AT_FDCWD, "place"));
	must(fanotify_mark(names, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_CREATE | FAN_DELETE, AT_FDCWD, "place"));
	must(fanotify_mark(names, FAN_MARK_ADD | FAN_MARK_IGNORE_SURV, FAN_CREATE | FAN_EVENT_ON_CHILD, AT_FDCWD, "place/ignored"));
	must(fanotify_mark(names, FAN_MARK_ADD | FAN_MARK_EVICTABLE, FAN_CREATE | FAN_ONDIR, AT_FDCWD, "fan"));
	must(rename("fan/old", "fan/moved"));
	must(fanotify_mark(files, FAN_MARK_ADD, FAN_ACCESS, AT_FDCWD, "fan/moved"));
	expect(!told(files, 0, "") && !told(names, 0, ""));
	ready();
	wait_go();
	expect(!told(files, 0, "") && !told(names, 0, "") && !is_ready_for(none, POLLIN));
	int file = must(open("fan/file", O_CREAT | O_WRONLY, 0600));
	expect(told(files, FAN_OPEN, "file") && told(names, FAN_CREATE, "file"));
	close(file);
	expect(told(files, FAN_CLOSE_WRITE, "file"));
	close(must(open("fan/quiet", O_RDONLY)));
	expect(!told(files, 0, ""), "what is ignored");
	close(must(open("fan/quiet", O_WRONLY)));
	expect(told(files, FAN_CLOSE_WRITE, "quiet") && !told(files, 0, ""));
	must(mkdir("fan/inside", 0700));
	expect(told(names, FAN_CREATE | FAN_ONDIR, "inside"));
	char byte;
	file = must(open("fan/moved", O_RDWR));
	expect(told(files, FAN_OPEN, "moved") && write(file, "x", 1) == 1 && pread(file, &byte, 1, 0) == 1);
	expect(told(files, FAN_ACCESS, "moved"));
	file = must(open("place/new", O_CREAT | O_WRONLY, 0600));
	expect(told(names, FAN_CREATE, "new") && write(file, "x", 1) == 1);
	expect(told(files, FAN_MODIFY, "new"));
	create("place/ignored/new");
	expect(!told(names, 0, ""), "what is ignored");
	must(unlink("place/new"));
	expect(told(names, FAN_DELETE, "new"));
	must(umount2("place", MNT_DETACH));
	return passed();
}

// A group that is asked for permission, so that whoever opens a certain file has to wait for an answer; and that file.
static int asker(void)
{
	must(mkdir("place", 0700));
	must(mount("none", "place", "tmpfs", 0, "size=1m"));
	int deleted = must(open("place/deleted", O_RDWR | O_CREAT, 0600));
	must(unlink("place/deleted"));
	int group = must(fanotify_init(FAN_CLASS_CONTENT | FAN_NONBLOCK, O_RDONLY));
	must(fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN_PERM, AT_FDCWD, "place"));
	ready();
	wait_go();
	expect(!is_ready_for(group, POLLIN));
	close(group);
	close(deleted);
	must(umount2("place", MNT_DETACH));
	return passed();
}

static volatile int got_signal, got_fd;
static void note(int signal, siginfo_t *info, void *context)
{
	(void)context;
	got_signal = signal;
	got_fd = info->si_fd;
}

static void expect_signal(int signal, int fd)
{
	for (int i = 0; i < 2000 && got_signal != signal; i++)
		nap(MS);
	expect(got_signal == signal && (fd == -1 || got_fd == fd), "signal %d of fd %d, not %d of %d", got_signal, got_fd, signal, fd);
	got_signal = 0;
}

static int owners(void)
{
	int ends[2], to_group[2], silent = must(eventfd(0, 0));
	must(pipe2(ends, O_NONBLOCK));
	must(pipe2(to_group, O_NONBLOCK));
	struct sigaction action = { .sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_RESTART };
	must(sigaction(SIGIO, &action, NULL));
	must(sigaction(SIGRTMIN + 2, &action, NULL));
	must(fcntl(silent, F_SETOWN, getpid()));
	pid_t child = must(fork());
	if (!child) {
		ready();
		wait_go();
		struct f_owner_ex owner;
		must(fcntl(ends[0], F_GETOWN_EX, &owner));
		expect(owner.pid == getpid() && owner.type == F_OWNER_TID);
		must(write(ends[1], "x", 1));
		expect_signal(SIGRTMIN + 2, ends[0]);
		must(write(to_group[1], "x", 1));
		expect_signal(SIGIO, -1);
		return 0;
	}
	must(fcntl(ends[0], F_SETOWN_EX, &(struct f_owner_ex){ F_OWNER_TID, child }));
	must(fcntl(ends[0], F_SETSIG, SIGRTMIN + 2));
	must(fcntl(ends[0], F_SETFL, O_NONBLOCK | O_ASYNC));
	must(fcntl(to_group[0], F_SETOWN, -getpgrp()));
	must(fcntl(to_group[0], F_SETFL, O_NONBLOCK | O_ASYNC));
	wait_go();
	struct f_owner_ex owner;
	must(fcntl(to_group[0], F_GETOWN_EX, &owner));
	expect(owner.pid == getpgrp() && owner.type == F_OWNER_PGRP);
	expect_signal(SIGIO, -1);
	join_child(child);
	expect(fcntl(silent, F_GETOWN) == getpid() && fcntl(silent, F_GETSIG) == 0);
	expect(!(fcntl(silent, F_GETFL) & O_ASYNC) && fcntl(ends[0], F_GETFL) & O_ASYNC);
	expect(fcntl(ends[0], F_GETSIG) == SIGRTMIN + 2 && fcntl(ends[1], F_GETOWN) == 0);
	return passed();
}

static int many(void)
{
	enum { DESCRIPTIONS = 2000, FDS = 5000 };
	struct rlimit limit;
	must(getrlimit(RLIMIT_NOFILE, &limit));
	if (limit.rlim_max < FDS + 100)
		skip("RLIMIT_NOFILE");
	limit.rlim_cur = limit.rlim_max;
	must(setrlimit(RLIMIT_NOFILE, &limit));
	int epoll = must(epoll_create1(0)), first = -1, last = -1;
	for (int i = 0; i < DESCRIPTIONS; i++) {
		last = must(eventfd(i % 7 ? 0 : i + 1, EFD_NONBLOCK));
		first = first < 0 ? last : first;
		watch(epoll, last, EPOLLIN | (i % 2 ? EPOLLET : 0), i);
	}
	for (int i = 0; last < FDS; i++)
		last = must(dup(first + i % DESCRIPTIONS));
	ready();
	wait_go();
	static struct epoll_event events[DESCRIPTIONS];
	int count = must(epoll_wait(epoll, events, DESCRIPTIONS, 0));
	expect(count == (DESCRIPTIONS + 6) / 7, "%d", count);
	for (int i = 0; i < count; i++)
		expect(take(first + events[i].data.u64) == events[i].data.u64 + 1);
	give(last, 3);
	expect(must(epoll_wait(epoll, events, DESCRIPTIONS, 0)) == 1);
	expect(take(first + events[0].data.u64) == 3);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "counters", counters }, { "timers", timers }, { "pidfds", pidfds }, { "pidfds_of_living", pidfds_of_living }, { "epolls", epolls },
		{ "inotify", inotify }, { "fanotify", fanotify }, { "asker", asker }, { "owners", owners }, { "many", many },
	};
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
