// Locks on files, looked at by processes that do not hold them.
#include "subject.h"

static int file(const char *name) { return must(open(name, O_RDWR | O_CREAT, 0600)); }

static int set(int fd, int command, short type, off_t start, off_t length)
{
	struct flock lock = { .l_type = type, .l_start = start, .l_len = length };
	return fcntl(fd, command, &lock);
}

// Who keeps others from this range: its pid, -1 for a description, 0 for nobody.
static pid_t holder(const char *name, short type, off_t start, off_t length)
{
	int fd = file(name);
	struct flock lock = { .l_type = type, .l_start = start, .l_len = length };
	must(fcntl(fd, F_OFD_GETLK, &lock)); // closing it would drop our own locks
	return lock.l_type == F_UNLCK ? 0 : lock.l_pid;
}

static int flockable(const char *name, int how)
{
	int fd = file(name), done = flock(fd, how | LOCK_NB);
	close(fd);
	return !done;
}

static int locks(void)
{
	pid_t self = getpid();
	int posix = file("posix"), again = must(dup(posix)), ofd = file("ofd"), whole = file("whole"), shared = file("shared");
	must(set(posix, F_SETLK, F_WRLCK, 10, 20));
	must(set(again, F_SETLK, F_RDLCK, 40, 1));
	must(set(posix, F_SETLK, F_WRLCK, 100, 0));
	must(set(ofd, F_OFD_SETLK, F_WRLCK, 0, 5));
	must(set(ofd, F_OFD_SETLK, F_RDLCK, 7, 0));
	must(flock(whole, LOCK_EX));
	must(flock(shared, LOCK_SH));
	// The same file by a second description; locked like SQLite's index, then mapped.
	int other = must(open("posix", O_RDONLY)), index = file("index");
	must(ftruncate(index, 4096));
	char *mapped = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, index, 0));
	must(set(index, F_SETLK, F_RDLCK, 120, 8));
	int gone = file("gone");
	must(set(gone, F_SETLK, F_WRLCK, 1, 1));
	must(flock(gone, LOCK_EX));
	must(unlink("gone"));
	int inherited = file("inherited");
	must(flock(inherited, LOCK_EX));
	int ask[2], answer[2];
	must(pipe(ask));
	must(pipe(answer));
	pid_t waiter = must(fork());
	if (!waiter) {
		int fd = file("posix");
		close(posix);
		must(set(fd, F_SETLKW, F_WRLCK, 15, 1)); // until it is allowed to
		expect(!access(in_base("go"), F_OK), "it got the lock at once");
		return 0;
	}
	pid_t sleeper = must(fork());
	if (!sleeper) {
		int fd = file("whole");
		close(whole);
		must(flock(fd, LOCK_EX));
		expect(!access(in_base("go"), F_OK), "it got the lock at once");
		return 0;
	}
	pid_t heir = must(fork());
	if (!heir) {
		close(inherited + 0 * must(set(inherited, F_OFD_SETLK, F_WRLCK, 3, 1)));
		wait_go();
		return 0;
	}
	pid_t keeper = must(fork());
	if (!keeper) {
		wait_go();
		expect(!flockable("inherited", LOCK_SH));
		must(flock(inherited, LOCK_UN));
		expect(flockable("inherited", LOCK_SH));
		expect(set(file("posix"), F_SETLK, F_WRLCK, 29, 1) == -1 && errno == EAGAIN);
		must(set(file("posix"), F_SETLK, F_WRLCK, 30, 1));
		return 0;
	}
	close(inherited);
	ready();
	wait_go();
	expect(holder("posix", F_RDLCK, 0, 40) == self && holder("posix", F_RDLCK, 0, 10) == 0 && holder("posix", F_RDLCK, 41, 59) == 0);
	expect(holder("posix", F_WRLCK, 40, 1) == self && holder("posix", F_RDLCK, 40, 1) == 0);
	expect(holder("posix", F_RDLCK, 1 << 30, 1) == self);
	expect(holder("ofd", F_RDLCK, 4, 1) == -1 && holder("ofd", F_RDLCK, 5, 9) == 0 && holder("ofd", F_WRLCK, 1 << 20, 1) == -1);
	expect(!flockable("whole", LOCK_SH) && flockable("shared", LOCK_SH) && !flockable("shared", LOCK_EX));
	expect(holder("index", F_WRLCK, 120, 8) == self && holder("index", F_RDLCK, 120, 8) == 0 && !mapped[0]);
	char way[32];
	snprintf(way, sizeof way, "/proc/self/fd/%d", gone);
	int gone_again = must(open(way, O_RDWR));
	struct flock lock = { .l_type = F_WRLCK };
	must(fcntl(gone_again, F_OFD_GETLK, &lock));
	expect(lock.l_pid == self && lock.l_start == 1 && lock.l_len == 1);
	expect(flock(gone_again, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK);
	join_child(keeper);
	join_child(heir);
	// They belong to the process: closing any of its descriptors drops them all.
	expect(holder("posix", F_WRLCK, 100, 0) == self);
	close(other);
	expect(holder("posix", F_WRLCK, 100, 0) == 0);
	must(flock(whole, LOCK_UN));
	join_child(waiter);
	join_child(sleeper);
	return passed();
}

int main(void)
{
	begin();
	return locks();
}
