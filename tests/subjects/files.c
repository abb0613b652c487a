// Files of file systems: directories, O_PATH, odd names, /proc; files that were deleted; fifos.
#include "subject.h"
#include <dirent.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

static ns position(int fd) { return must(lseek(fd, 0, SEEK_CUR)); }

// The next entry of a directory, straight from the kernel.
static int next_entry(int fd, char *name)
{
	static char buffer[4096];
	// Room for one entry at a time.
	ssize_t got = must(syscall(SYS_getdents64, fd, buffer, 40));
	if (got)
		strcpy(name, buffer + 19);
	return got > 0;
}

static char *link_of(int fd)
{
	static char path[32], text[1024];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	text[must(readlink(path, text, sizeof text - 1))] = 0;
	return text;
}

static int flags_of(int fd) { return must(fcntl(fd, F_GETFL)); }

// Reading positions of directories, what O_PATH leads to, names of any bytes, virtual file systems.
static int paths(void)
{
	static const char odd[] = "a\n \\040\xff\xfe\t'\" (deleted)";
	must(mkdir("many", 0700));
	for (int i = 0; i < 20; i++) {
		char name[32];
		snprintf(name, sizeof name, "many/entry-%02d", i);
		close(must(open(name, O_CREAT | O_WRONLY, 0600)));
	}
	int directory = must(open("many", O_RDONLY | O_DIRECTORY)), whole = must(open("many", O_RDONLY));
	char name[256], rest[32][32], seen[32];
	int total = 0;
	for (int i = 0; i < 7; i++)
		expect(next_entry(directory, seen));
	// The rest of it, as another description sees it that has come as far.
	while (next_entry(whole, rest[total]))
		total++;
	expect(total == 22, "%d entries", total);
	must(lseek(whole, 0, SEEK_SET));

	must(symlink("many", "link"));
	must(mkfifo("fifo", 0600));
	int link = must(open("link", O_PATH | O_NOFOLLOW)), file = must(open("many/entry-03", O_PATH));
	int place = must(open("many", O_PATH | O_DIRECTORY)), fifo = must(open("fifo", O_PATH));
	int device = must(open("/dev/null", O_PATH)), strange = must(open(odd, O_RDWR | O_CREAT | O_NOFOLLOW, 0600));
	must(write(strange, "odd", 3));
	int direct = open("many/entry-04", O_RDWR | O_DIRECT);
	int sysfs = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY);
	int cgroup = open("/sys/fs/cgroup/cgroup.controllers", O_RDONLY);
	if (cgroup < 0)
		cgroup = open("/sys/fs/cgroup/unified/cgroup.controllers", O_RDONLY);
	int terminals = open("/dev/pts", O_RDONLY | O_DIRECTORY);
	char text[2][512];
	memset(text, 0, sizeof text);
	if (sysfs >= 0) {
		must(pread(sysfs, text[0], 511, 0));
		must(lseek(sysfs, 5, SEEK_SET));
	}
	int flags[] = { flags_of(directory), flags_of(link), flags_of(file), flags_of(place), flags_of(fifo), flags_of(strange) };
	ready();
	wait_go();
	for (int i = 7; i < total; i++) {
		expect(next_entry(directory, name) && !strcmp(name, rest[i]), "%s instead of %s", name, rest[i]);
	}
	expect(!next_entry(directory, name), "there is %s", name);
	expect(next_entry(whole, name) && !strcmp(name, rest[0]));
	expect(readlinkat(link, "", name, sizeof name) == 4 && !memcmp(name, "many", 4));
	struct stat is, should;
	must(fstat(file, &is));
	must(stat("many/entry-03", &should));
	expect(is.st_ino == should.st_ino);
	expect(read(file, name, 1) == -1 && errno == EBADF);
	must(faccessat(place, "entry-07", F_OK, 0));
	must(fstat(fifo, &is));
	expect(S_ISFIFO(is.st_mode));
	must(fstat(device, &is));
	expect(S_ISCHR(is.st_mode) && read(device, name, 1) == -1 && errno == EBADF);
	expect(position(strange) == 3 && pread(strange, name, 9, 0) == 3 && !memcmp(name, "odd", 3));
	expect(!strcmp(strrchr(link_of(strange), '/') + 1, odd), "%s", link_of(strange));
	int now_are[] = { flags_of(directory), flags_of(link), flags_of(file), flags_of(place), flags_of(fifo), flags_of(strange) };
	for (size_t i = 0; i < COUNT(flags); i++)
		expect(flags[i] == now_are[i], "%zu: %#o instead of %#o", i, now_are[i], flags[i]);
	expect(direct < 0 || flags_of(direct) & O_DIRECT);
	if (sysfs >= 0) {
		expect(position(sysfs) == 5);
		must(read(sysfs, text[1], 511));
		expect(!strcmp(text[0] + 5, text[1]), "%s: %s", text[0], text[1]);
	}
	expect(cgroup < 0 || (position(cgroup) == 0 && read(cgroup, name, 1) >= 0));
	expect(terminals < 0 || !faccessat(terminals, "ptmx", F_OK, 0));
	return passed();
}

// What /proc shows of the machine, of itself, of relatives.
static int proc(void)
{
	pid_t child = must(fork());
	if (!child) {
		int of_parent = -1;
		char path[64], text[4096];
		snprintf(path, sizeof path, "/proc/%d/stat", getppid());
		of_parent = must(open(path, O_RDONLY));
		wait_go();
		text[must(read(of_parent, text, sizeof text - 1))] = 0;
		expect(atoi(text) == getppid(), "%s", text);
		return 0;
	}
	char path[64], text[8192], again[8192];
	snprintf(path, sizeof path, "/proc/%d/comm", child);
	int machine = must(open("/proc/version", O_RDONLY)), own = must(open("/proc/self/stat", O_RDONLY));
	int comm = must(open(path, O_RDWR)), fds = must(open("/proc/self/fd", O_RDONLY | O_DIRECTORY));
	int memory = must(open("/proc/self/mem", O_RDWR)), at = must(open("/proc/self", O_PATH));
	int mounts = must(open("/proc/self/mountinfo", O_RDONLY)), maps = must(open("/proc/self/maps", O_RDONLY));
	text[must(pread(machine, text, 99, 0))] = 0;
	must(lseek(machine, 6, SEEK_SET));
	must(lseek(memory, (long)text, SEEK_SET));
	must(read(mounts, again, 10));
	ready();
	wait_go();
	again[must(read(machine, again, 93))] = 0;
	expect(!strncmp(text + 6, again, 90), "%s: %s", text, again);
	again[must(read(own, again, sizeof again - 1))] = 0;
	expect(atoi(again) == getpid());
	expect(read(comm, again, 64) == 6 && !memcmp(again, "files\n", 6));
	strcpy(text, "written to myself");
	expect(read(memory, again, 17) == 17 && !memcmp(again, "written to myself", 17));
	snprintf(path, sizeof path, "%d", own);
	must(faccessat(fds, path, F_OK, AT_SYMLINK_NOFOLLOW));
	must(faccessat(at, "status", F_OK, 0));
	expect(position(mounts) == 10);
	must(read(mounts, again, 10));
	must(read(maps, again, 100));
	expect(strtoul(again, NULL, 16) > 0);
	join_child(child);
	return passed();
}

static struct stat times(int fd)
{
	struct stat now_is;
	must(fstat(fd, &now_is));
	return now_is;
}

static void expect_like(int fd, struct stat before, int line)
{
	struct stat is = times(fd);
	expect(is.st_mode == before.st_mode && is.st_uid == before.st_uid && is.st_gid == before.st_gid, "line %d", line);
	expect(is.st_size == before.st_size && is.st_nlink == 0 && is.st_blocks == before.st_blocks,
	       "line %d: %lld bytes, %lld blocks instead of %lld", line, (ns)is.st_size, (ns)is.st_blocks, (ns)before.st_blocks);
	expect(is.st_atim.tv_sec == before.st_atim.tv_sec && is.st_atim.tv_nsec == before.st_atim.tv_nsec, "line %d", line);
	expect(is.st_mtim.tv_sec == before.st_mtim.tv_sec && is.st_mtim.tv_nsec == before.st_mtim.tv_nsec, "line %d", line);
}
#define expect_like(fd, before) expect_like(fd, before, __LINE__)

// Deleted files: several descriptions of one, holes, owner, times, attributes; names that are taken again.
static int ghosts(void)
{
	int file = must(open("gone", O_RDWR | O_CREAT | O_NOFOLLOW, 0600)), reader = must(open("gone", O_RDONLY | O_NONBLOCK));
	int append = must(open("gone", O_WRONLY | O_APPEND | O_CLOEXEC)), path = must(open("gone", O_PATH));
	static char block[8192], got[65536];
	paint(block, sizeof block, 5);
	must(pwrite(file, block, sizeof block, 0));
	must(pwrite(file, "in the middle", 13, 1 << 20));
	must(pwrite(file, got, 4096, 1 << 21)); // zeroes that are no hole
	must(ftruncate(file, (4 << 20) + 123));
	must(fchown(file, 12, 34));
	must(fchmod(file, 04751));
	must(lseek(file, 5, SEEK_SET));
	must(lseek(reader, 1 << 20, SEEK_SET));
	int attributes = !fsetxattr(file, "user.colour", "green\0blue", 10, 0) && !fsetxattr(file, "user.empty", "", 0, 0);
	struct timespec when[] = { { 1000000001, 123456789 }, { 1000000002, 987654321 } };
	must(futimens(file, when));
	struct stat before;
	must(unlink("gone"));
	before = times(file);

	// Its name has been taken by another; a second file of that name has gone too.
	int replaced = must(open("replaced", O_RDWR | O_CREAT, 0600));
	must(write(replaced, "old", 3));
	must(unlink("replaced"));
	int second = must(open("replaced", O_RDWR | O_CREAT, 0640));
	must(write(second, "second", 6));
	must(unlink("replaced"));
	int heir = must(open("replaced", O_RDWR | O_CREAT, 0600));
	must(write(heir, "new", 3));

	// Files that never had a name, one of them by a second description only.
	int unnamed = must(open(".", O_TMPFILE | O_RDWR | O_APPEND, 0600)), other = must(open(".", O_TMPFILE | O_WRONLY, 0600));
	must(write(unnamed, "unnamed", 7));
	must(write(other, "other", 5));
	char way[32];
	snprintf(way, sizeof way, "/proc/self/fd/%d", other);
	int left = must(open(way, O_RDONLY));
	close(other);
	int empty = must(open("empty", O_RDWR | O_CREAT, 0));
	must(unlink("empty"));
	// One file by two names, which have both gone.
	int twins[2] = { must(open("twin", O_RDWR | O_CREAT, 0600)) };
	must(link("twin", "other twin"));
	twins[1] = must(open("other twin", O_RDONLY));
	must(write(twins[0], "twins", 5));
	must(unlink("twin"));
	must(unlink("other twin"));

	pid_t child = must(fork());
	if (!child) {
		wait_go();
		while (position(file) != 6)
			nap(MS);
		must(pwrite(file, "Y", 1, 1));
		must(lseek(file, 7, SEEK_SET));
		return 0;
	}
	int flags[] = { flags_of(file), flags_of(reader), flags_of(append), flags_of(path), flags_of(unnamed), flags_of(left) };
	char name[1024];
	strcpy(name, link_of(file));
	ready();
	wait_go();
	expect(!strcmp(name, link_of(file)), "%s", link_of(file));
	expect_like(file, before);
	expect_like(path, before);
	int now_are[] = { flags_of(file), flags_of(reader), flags_of(append), flags_of(path), flags_of(unnamed), flags_of(left) };
	for (size_t i = 0; i < COUNT(flags); i++)
		expect(flags[i] == now_are[i], "%zu: %#o instead of %#o", i, now_are[i], flags[i]);
	expect(fcntl(append, F_GETFD) == FD_CLOEXEC && fcntl(file, F_GETFD) == 0);
	expect(position(file) == 5 && position(reader) == 1 << 20);
	expect(lseek(file, 3 << 20, SEEK_DATA) == -1 && errno == ENXIO);
	expect(lseek(reader, 1 << 19, SEEK_DATA) == 1 << 20 && lseek(reader, 0, SEEK_HOLE) == 8192);
	expect(pread(reader, got, 8192, 0) == 8192);
	expect_painted(got, 8192, 5);
	expect(pread(reader, got, 64, 1 << 20) == 64 && !memcmp(got, "in the middle\0", 14));
	if (attributes) {
		expect(fgetxattr(file, "user.colour", got, 64) == 10 && !memcmp(got, "green\0blue", 10));
		expect(fgetxattr(file, "user.empty", got, 64) == 0);
	}
	// It is one file, and all that shares it still does.
	must(write(append, "end", 3));
	struct stat now_is = times(reader);
	expect(now_is.st_size == before.st_size + 3);
	must(lseek(file, 6, SEEK_SET));
	join_child(child);
	expect(position(file) == 7 && pread(reader, got, 1, 1) == 1 && *got == 'Y');
	must(snprintf(way, sizeof way, "/proc/self/fd/%d", file));
	expect(linkat(AT_FDCWD, way, AT_FDCWD, "again", AT_SYMLINK_FOLLOW) == -1 && errno == ENOENT);

	expect(pread(replaced, got, 9, 0) == 3 && !memcmp(got, "old", 3));
	expect(pread(second, got, 9, 0) == 6 && !memcmp(got, "second", 6) && (times(second).st_mode & 0777) == 0640);
	expect(pread(heir, got, 9, 0) == 3 && !memcmp(got, "new", 3) && times(heir).st_nlink == 1);
	must(stat("replaced", &now_is));
	expect(now_is.st_ino == times(heir).st_ino);
	expect(pread(unnamed, got, 9, 0) == 7 && !memcmp(got, "unnamed", 7) && position(unnamed) == 7);
	expect(pread(left, got, 9, 0) == 5 && !memcmp(got, "other", 5));
	expect(times(twins[0]).st_ino == times(twins[1]).st_ino && read(twins[1], got, 9) == 5 && !memcmp(got, "twins", 5));
	expect(strstr(link_of(twins[0]), "/twin (deleted)") && strstr(link_of(twins[1]), "/other twin (deleted)"), "%s", link_of(twins[1]));
	expect(times(empty).st_size == 0 && (times(empty).st_mode & 0777) == 0);
	// A file that never had a name can still get one.
	snprintf(way, sizeof way, "/proc/self/fd/%d", unnamed);
	must(linkat(AT_FDCWD, way, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
	expect(times(unnamed).st_nlink == 1);
	// Nothing of the restore is left.
	DIR *here = opendir(".");
	for (struct dirent *entry; (entry = readdir(here));)
		expect(!strstr(entry->d_name, "cryosleep") && strcmp(entry->d_name, "gone"), "%s", entry->d_name);
	closedir(here);
	return passed();
}

// Deleted directories: open, and as the place where a process is.
static int directories(void)
{
	must(mkdir("gone", 0700));
	must(mkdir("here", 0700));
	int directory = must(open("gone", O_RDONLY | O_DIRECTORY)), path = must(open("gone", O_PATH | O_NOFOLLOW));
	must(chdir("here"));
	int here = must(open(".", O_RDONLY));
	must(fchmod(directory, 0751));
	must(fchown(directory, 12, 34));
	struct timespec when[] = { { 1000000001, 123456789 }, { 1000000002, 987654321 } };
	must(rmdir("../gone"));
	must(rmdir("../here"));
	must(futimens(directory, when));
	struct stat before = times(directory);
	char name[1024];
	strcpy(name, link_of(directory));
	int flags[] = { flags_of(directory), flags_of(path) };
	ready();
	wait_go();
	expect(!strcmp(name, link_of(directory)), "%s", link_of(directory));
	expect_like(directory, before);
	expect_like(path, before);
	expect(flags[0] == flags_of(directory) && flags[1] == flags_of(path));
	expect(openat(directory, "new", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT);
	expect(open("new", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT);
	expect(!getcwd(name, sizeof name) && errno == ENOENT);
	struct stat is = times(here), place;
	must(stat(".", &place));
	expect(is.st_ino == place.st_ino && is.st_nlink == 0);
	must(fchdir(directory));
	expect(access(in_base("gone"), F_OK) == -1 && access(in_base("here"), F_OK) == -1);
	return passed();
}

static short polled(int fd)
{
	struct pollfd poll_ = { fd, POLLIN | POLLOUT, 0 };
	must(poll(&poll_, 1, 0));
	return poll_.revents;
}

static int in_fifo(const char *name, int flags)
{
	if (mkfifo(name, 0600) && errno != EEXIST)
		fail("mkfifo: %s", strerror(errno));
	return must(open(name, flags));
}

// Both ends in relatives and in one description, ends that have gone or never been, contents, a deleted fifo.
static int fifos(void)
{
	char got[65536];
	int both = in_fifo("both", O_RDWR);
	must(fcntl(both, F_SETPIPE_SZ, 1 << 17));
	must(write(both, "first words", 11));
	int reader = in_fifo("both", O_RDONLY | O_NOFOLLOW), writer = in_fifo("both", O_WRONLY | O_APPEND);
	// Nobody has written to it yet: no end of file for poll(2).
	int lonely = in_fifo("lonely", O_RDONLY | O_NONBLOCK);
	must(fcntl(lonely, F_SETFL, 0));
	int left = in_fifo("left", O_RDONLY | O_NONBLOCK), leaving = in_fifo("left", O_WRONLY);
	must(write(leaving, "last words", 10));
	close(leaving);
	int heard = in_fifo("unheard", O_RDONLY | O_NONBLOCK), unheard = in_fifo("unheard", O_WRONLY);
	must(write(unheard, "unheard", 7));
	close(heard);
	int gone = in_fifo("gone", O_RDWR | O_NONBLOCK), same = in_fifo("gone", O_RDONLY);
	must(unlink("gone"));
	must(write(gone, "gone", 4));
	int packets = in_fifo("packets", O_RDWR);
	must(fcntl(packets, F_SETFL, O_DIRECT));
	must(write(packets, "one", 3));
	must(write(packets, "2", 1));
	must(write(packets, "three", 5));
	must(write(packets, "4", 1));
	signal(SIGPIPE, SIG_IGN);
	int fds[] = { both, reader, writer, lonely, left, unheard, gone, same, packets }, flags[COUNT(fds)];
	for (size_t i = 0; i < COUNT(fds); i++)
		flags[i] = flags_of(fds[i]);
	expect(polled(lonely) == 0 && polled(left) == (POLLIN | POLLHUP) && polled(unheard) & POLLERR);
	pid_t child = must(fork());
	if (!child) {
		close(both);
		close(reader);
		wait_go();
		must(write(writer, " and more", 9));
		return 0;
	}
	ready();
	wait_go();
	for (size_t i = 0; i < COUNT(fds); i++)
		expect(flags[i] == flags_of(fds[i]), "%zu: %#o instead of %#o", i, flags_of(fds[i]), flags[i]);
	join_child(child);
	expect(fcntl(both, F_GETPIPE_SZ) == 1 << 17);
	expect(read(reader, got, 100) == 20 && !memcmp(got, "first words and more", 20));
	expect(polled(lonely) == 0, "%#x", polled(lonely));
	expect(read(lonely, got, 1) == 0);
	int now_heard = must(open("lonely", O_WRONLY | O_NONBLOCK));
	must(write(now_heard, "hello", 5));
	close(now_heard);
	expect(polled(lonely) == (POLLIN | POLLHUP) && read(lonely, got, 9) == 5 && !memcmp(got, "hello", 5));
	expect(polled(left) == (POLLIN | POLLHUP) && read(left, got, 100) == 10 && !memcmp(got, "last words", 10));
	expect(read(left, got, 100) == 0);
	expect(polled(unheard) & POLLERR && write(unheard, "x", 1) == -1 && errno == EPIPE);
	heard = must(open("unheard", O_RDONLY | O_NONBLOCK));
	expect(read(heard, got, 100) == 7 && !memcmp(got, "unheard", 7));
	must(write(gone, "!", 1));
	expect(read(same, got, 100) == 5 && !memcmp(got, "gone!", 5) && times(gone).st_nlink == 0);
	must(write(packets, "5th", 3));
	static const char *sent[] = { "one", "2", "three", "4", "5th" };
	for (size_t i = 0; i < COUNT(sent); i++)
		expect(read(packets, got, sizeof got) == (ssize_t)strlen(sent[i]) && !memcmp(got, sent[i], strlen(sent[i])), "%zu", i);
	return passed();
}

// Packets of every kind of boundary, and streams that look like them.
static int packets(void)
{
	static char block[12288], got[65536];
	paint(block, sizeof block, 9);
	static const int sizes[][6] = { { 1 }, { 4096, 1 }, { 1, 1, 1 }, { 2, 4096, 4096, 3 }, { 5 }, { 4096 } };
	enum { FORMS = COUNT(sizes) };
	int ends[FORMS][2], streams[3][2];
	for (int i = 0; i < FORMS; i++) {
		must(pipe2(ends[i], O_DIRECT | O_NONBLOCK));
		for (int j = 0; sizes[i][j]; j++)
			must(write(ends[i][1], block, sizes[i][j]));
	}
	// No longer in packet mode, but with packets in it.
	must(fcntl(ends[3][1], F_SETFL, O_NONBLOCK));
	for (int i = 0; i < 3; i++) {
		must(pipe2(streams[i], O_NONBLOCK));
		must(write(streams[i][1], block, 1 + i * 4096));
		must(fcntl(streams[i][1], F_SETFL, O_NONBLOCK | O_DIRECT));
	}
	ready();
	wait_go();
	for (int i = 0; i < FORMS; i++) {
		expect(!(flags_of(ends[i][1]) & O_DIRECT) == (i == 3));
		must(fcntl(ends[i][1], F_SETFL, O_NONBLOCK));
		must(write(ends[i][1], "end", 3));
		for (int j = 0; sizes[i][j]; j++)
			expect(read(ends[i][0], got, sizeof got) == sizes[i][j] && !memcmp(got, block, sizes[i][j]), "%d %d", i, j);
		expect(read(ends[i][0], got, sizeof got) == 3);
	}
	for (int i = 0; i < 3; i++) {
		must(fcntl(streams[i][1], F_SETFL, O_NONBLOCK));
		must(write(streams[i][1], "end", 3));
		ssize_t size = read(streams[i][0], got, sizeof got);
		expect(size == 4 + i * 4096, "%zd", size);
	}
	return passed();
}

// Writes to the pipe of this name, which is somebody else's.
static int piped(const char *way)
{
	int pipe = must(open(way, O_WRONLY)), second = must(open(way, O_WRONLY | O_NONBLOCK));
	must(write(pipe, "before", 6));
	ready();
	wait_go();
	expect(!(flags_of(pipe) & O_NONBLOCK) && flags_of(second) & O_NONBLOCK);
	must(write(pipe, "after, ", 7));
	must(write(second, "by the second", 13));
	return passed();
}

// Sockets, a device and files, all of which somebody else supplies.
static int outer(void)
{
	int ends[2], zero = must(open("/dev/zero", O_RDONLY)), again = must(open("/dev/zero", O_RDONLY | O_NONBLOCK));
	must(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	int same = must(dup(ends[1])), one = must(open("one", O_RDWR | O_CREAT, 0600)), two = must(open("two", O_RDWR | O_CREAT, 0600));
	char text[64], got[64] = "";
	int place = must(open("one", O_PATH));
	snprintf(text, sizeof text, "%d %d %d %d", ends[0], ends[1], one, two);
	put_file("numbers", text);
	ready();
	wait_go();
	must(write(ends[0], "through", 7));
	expect(read(same, got, 9) == 7 && !memcmp(got, "through", 7));
	expect(read(zero, got, 9) == 4 && !memcmp(got, "zero", 4), "%s", got);
	expect(read(again, got, 9) == 4 && !memcmp(got, "zero", 4) && flags_of(again) & O_NONBLOCK);
	expect(flags_of(place) & O_PATH && read(place, got, 1) == -1 && errno == EBADF);
	expect(read(one, got, 9) == 3 && !memcmp(got, "one", 3) && read(two, got, 9) == 3 && !memcmp(got, "two", 3));
	return passed();
}

// Files with other names than the one that they were opened by.
static int linked(void)
{
	int file = must(open("first", O_RDWR | O_CREAT, 0640)), reader = must(open("first", O_RDONLY | O_NOFOLLOW));
	must(write(file, "contents", 8));
	must(link("first", "second"));
	must(unlink("first"));
	must(mkfifo("fifo", 0600));
	int fifo = must(open("fifo", O_RDWR));
	must(link("fifo", "other"));
	must(rename("other", "first"));
	must(unlink("fifo"));
	char name[1024], got[16];
	strcpy(name, link_of(reader));
	ino_t inode = times(file).st_ino;
	ready();
	wait_go();
	expect(!strcmp(name, link_of(reader)) || strstr(link_of(reader), "/.cryosleep"), "%s", link_of(reader));
	expect(flags_of(reader) & O_NOFOLLOW && position(file) == 8 && position(reader) == 0);
	struct stat second;
	must(stat("second", &second));
	expect(times(file).st_ino == inode && times(reader).st_ino == inode && second.st_ino == inode);
	must(write(file, " and more", 9));
	expect(read(reader, got, 8) == 8 && !memcmp(got, "contents", 8));
	must(stat("first", &second));
	expect(times(fifo).st_ino == second.st_ino && S_ISFIFO(second.st_mode));
	return passed();
}

// A device whose file is gone.
static int device(void)
{
	must(mknod("sink", S_IFCHR | 0600, makedev(1, 3)));
	int sink = must(open("sink", O_RDWR));
	must(unlink("sink"));
	ready();
	wait_go();
	expect(write(sink, "x", 1) == 1 && read(sink, base, 1) == 0);
	expect(!strcmp(link_of(sink), "/dev/null"), "%s", link_of(sink));
	return passed();
}

// A program that is open and mapped.
static int elf(void)
{
	int from = must(open("/proc/self/exe", O_RDONLY)), to = must(open("program", O_RDWR | O_CREAT, 0700));
	static char bytes[1 << 20];
	ssize_t length = must(read(from, bytes, sizeof bytes));
	must(write(to, bytes, length));
	close(to);
	close(from);
	int file = must(open("program", O_RDONLY));
	char *mapped = must(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0));
	ready();
	wait_go();
	expect(!memcmp(mapped, bytes, 4096));
	return passed();
}

// Files of the lower and of the upper layer, one that was copied up, one that was deleted.
static int overlay(void)
{
	static const char *directories[] = { "low", "up", "work", "over" };
	for (size_t i = 0; i < COUNT(directories); i++)
		must(mkdir(directories[i], 0700));
	static const char *files[] = { "lower", "copied", "gone" };
	for (size_t i = 0; i < COUNT(files); i++) {
		char name[32];
		snprintf(name, sizeof name, "low/%s", files[i]);
		int file = must(open(name, O_CREAT | O_WRONLY, 0600));
		must(write(file, files[i], strlen(files[i])));
		close(file);
	}
	char options[2048];
	snprintf(options, sizeof options, "lowerdir=%s/low,upperdir=%s/up,workdir=%s/work", base, base, base);
	if (mount("none", "over", "overlay", 0, options))
		skip("no overlayfs here");
	int lower = must(open("over/lower", O_RDONLY)), copied = must(open("over/copied", O_RDWR));
	int upper = must(open("over/upper", O_RDWR | O_CREAT, 0600)), gone = must(open("over/gone", O_RDWR));
	must(write(copied, "COP", 3));
	must(write(upper, "upper", 5));
	must(write(gone, "G", 1));
	must(unlink("over/gone"));
	char *mapped = must(mmap(NULL, 4096, PROT_READ, MAP_SHARED, lower, 0)), got[16];
	must(lseek(lower, 2, SEEK_SET));
	ready();
	wait_go();
	expect(read(lower, got, 9) == 3 && !memcmp(got, "wer", 3) && !memcmp(mapped, "lower", 5));
	expect(read(copied, got, 9) == 3 && !memcmp(got, "ied", 3) && position(upper) == 5);
	must(write(upper, "!", 1));
	expect(pread(upper, got, 9, 0) == 6 && !memcmp(got, "upper!", 6));
	expect(pread(gone, got, 9, 0) == 4 && !memcmp(got, "Gone", 4) && times(gone).st_nlink == 0);
	close(lower);
	must(umount2("over", MNT_DETACH));
	return passed();
}

static int appended(void)
{
	int output = must(open("output", O_WRONLY | O_CREAT | O_APPEND, 0600)), same = must(dup(output));
	must(write(output, "before", 6));
	ready();
	wait_go();
	must(write(same, "after", 5));
	expect(position(output) == position(same));
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "paths", paths }, { "proc", proc }, { "ghosts", ghosts }, { "directories", directories }, { "fifos", fifos }, { "packets", packets }, { "appended", appended },
		{ "outer", outer }, { "linked", linked }, { "device", device }, { "elf", elf }, { "overlay", overlay },
	};
	if (argc == 3)
		return piped(argv[2]);
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
