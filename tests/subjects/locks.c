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
		expect(holder("inherited", F_RDLCK, 3, 1) == -1 && holder("inherited", F_RDLCK, 4, 1) == 0, "the heir has set it");
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

static volatile int told, plainly;
static void lease_ends(int signal, siginfo_t *info, void *context)
{
	(void)context;
	if (signal == SIGIO)
		plainly = 1;
	else
		told = info->si_fd;
}

// Leases, of which signals tell when somebody opens the file.
static int leases(void)
{
	int writing = file("writing"), unused = file("unused"), reading = must(open("reading", O_RDONLY | O_CREAT, 0600));
	(void)unused;
	struct sigaction action = { .sa_sigaction = lease_ends, .sa_flags = SA_SIGINFO };
	must(sigaction(SIGRTMIN, &action, NULL));
	must(sigaction(SIGIO, &action, NULL));
	must(fcntl(writing, F_SETLEASE, F_WRLCK));
	must(fcntl(writing, F_SETSIG, SIGRTMIN));
	must(fcntl(reading, F_SETLEASE, F_RDLCK));
	int flags = must(fcntl(writing, F_GETFL));
	pid_t child = must(fork());
	if (!child) {
		close(writing);
		close(reading);
		wait_go();
		close(must(open("reading", O_RDONLY)));
		expect(open("reading", O_WRONLY | O_NONBLOCK) == -1 && errno == EWOULDBLOCK);
		int fd = open("writing", O_RDONLY | O_NONBLOCK);
		expect(fd == -1 && errno == EWOULDBLOCK, "%d", fd);
		must(open("writing", O_RDONLY)); // waits for the lease to be given up
		return 0;
	}
	ready();
	wait_go();
	expect(fcntl(reading, F_GETLEASE) == F_RDLCK || plainly);
	for (int i = 0; i < 1000 && !(told && plainly); i++)
		nap(5 * MS);
	expect(told == writing && plainly, "%d %d", told, plainly);
	expect(fcntl(writing, F_GETFL) == flags && fcntl(writing, F_GETSIG) == SIGRTMIN && fcntl(writing, F_GETOWN) == getpid());
	must(fcntl(writing, F_SETLEASE, F_UNLCK));
	must(fcntl(reading, F_SETLEASE, F_UNLCK));
	join_child(child);
	return passed();
}

static int deleted_lease(void)
{
	int fd = file("deleted");
	must(fcntl(fd, F_SETLEASE, F_WRLCK));
	must(unlink("deleted"));
	ready();
	wait_go();
	expect(fcntl(fd, F_GETLEASE) == F_WRLCK);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	if (argc == 2 && !strcmp(argv[1], "deleted_lease"))
		return deleted_lease();
	return argc == 2 && !strcmp(argv[1], "leases") ? leases() : locks();
}
