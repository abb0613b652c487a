// Open files: positions, flags, sharing, devices, numbers; and where a process stands in the file system.
#include "subject.h"
#include <sys/resource.h>
#include <sys/socket.h>

static ns position(int fd) { return must(lseek(fd, 0, SEEK_CUR)); }

static int regular(void)
{
	int fd = must(open("file", O_RDWR | O_CREAT | O_TRUNC, 0640));
	must(write(fd, "0123456789", 10));
	must(lseek(fd, 3, SEEK_SET));
	int append = must(open("file", O_WRONLY | O_APPEND | O_CLOEXEC));
	int reader = must(open("file", O_RDONLY | O_NONBLOCK | O_NOATIME));
	int same = must(dup(fd));
	int high = must(fcntl(fd, F_DUPFD_CLOEXEC, 900));
	int other = must(open("file", O_RDWR));
	int directory = must(open(".", O_RDONLY | O_DIRECTORY));
	int path = must(open("file", O_PATH));
	int sync = must(open("file", O_RDWR | O_DSYNC));
	must(lseek(reader, 7, SEEK_SET));
	pid_t child = must(fork());
	if (!child) {
		wait_go();
		while (position(fd) != 5)
			nap(MS);
		must(lseek(high, 8, SEEK_SET)); // the parent sees that in its own
		return 0;
	}
	ready();
	wait_go();
	expect(position(fd) == 3 && position(same) == 3 && position(high) == 3 && position(other) == 0);
	must(lseek(same, 5, SEEK_SET));
	expect(position(fd) == 5 && position(other) == 0);
	join_child(child);
	expect(position(fd) == 8, "the child has moved it to %lld", position(fd));
	expect(position(reader) == 7);
	must(write(append, "x", 1));
	struct stat now_is;
	must(fstat(path, &now_is));
	expect(now_is.st_size == 11, "O_APPEND: the size is %lld", (ns)now_is.st_size);
	expect(fcntl(append, F_GETFD) == FD_CLOEXEC && fcntl(high, F_GETFD) == FD_CLOEXEC);
	expect(fcntl(fd, F_GETFD) == 0 && fcntl(same, F_GETFD) == 0);
	expect(fcntl(append, F_GETFL) & O_APPEND);
	expect((fcntl(reader, F_GETFL) & (O_ACCMODE | O_NONBLOCK | O_NOATIME)) == (O_RDONLY | O_NONBLOCK | O_NOATIME));
	expect(fcntl(path, F_GETFL) & O_PATH);
	expect((fcntl(sync, F_GETFL) & O_SYNC) == O_DSYNC);
	expect(high == 900);
	int inside = must(openat(directory, "file", O_RDONLY));
	char text[12];
	expect(read(inside, text, sizeof text) == 11 && !memcmp(text, "0123456789x", 11));
	// A number that was free is the next one.
	expect(must(dup(fd)) == inside + 1);
	return passed();
}

// The same in a process that may not have many files open.
static int limited(void)
{
	must(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 950, 1000 }));
	return regular();
}

// A description that was passed on by a message, with its lock, when both were there already.
static int handed(void)
{
	int ends[2];
	must(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
	char room[CMSG_SPACE(sizeof(int))] = { 0 }, byte;
	struct iovec vector = { &byte, 1 };
	struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room };
	pid_t child = must(fork());
	if (!child) {
		must(recvmsg(ends[1], &message, 0));
		int file = *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
		close(ends[0]);
		close(ends[1]);
		ready();
		wait_go();
		expect(position(file) == 6);
		must(lseek(file, 3, SEEK_SET));
		while (position(file) != 4)
			nap(MS);
		int other = must(open("file", O_RDONLY));
		expect(flock(other, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK);
		must(flock(file, LOCK_UN));
		must(flock(other, LOCK_SH | LOCK_NB));
		return 0;
	}
	int file = must(open("file", O_RDWR | O_CREAT, 0600));
	must(write(file, "passed", 6));
	must(flock(file, LOCK_EX));
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	*rights = (struct cmsghdr){ CMSG_LEN(sizeof file), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(rights), &file, sizeof file);
	must(sendmsg(ends[0], &message, 0));
	close(ends[0]);
	close(ends[1]);
	wait_go();
	while (position(file) != 3)
		nap(MS);
	must(lseek(file, 4, SEEK_SET));
	join_child(child);
	return passed();
}

// A request that is a device's, and that only a handler knows how to make again.
static int latency(void)
{
	int device = open("/dev/cpu_dma_latency", O_RDWR), asked = 7;
	if (device < 0)
		skip("no /dev/cpu_dma_latency");
	must(write(device, &asked, sizeof asked));
	int same = must(dup(device));
	ready();
	wait_go();
	int now_is = 0;
	expect(read(device, &now_is, sizeof now_is) == sizeof now_is && now_is == 7, "%d", now_is);
	close(device);
	expect(pread(same, &now_is, sizeof now_is, 0) == sizeof now_is && now_is == 7, "%d", now_is);
	close(same);
	return passed();
}

static int devices(void)
{
	static const char *names[] = { "null", "zero", "full", "random", "urandom" };
	int fds[COUNT(names)];
	for (size_t i = 0; i < COUNT(names); i++) {
		char path[32];
		snprintf(path, sizeof path, "/dev/%s", names[i]);
		fds[i] = must(open(path, i % 2 ? O_RDWR : O_RDWR | O_NONBLOCK));
	}
	int log = open("/dev/kmsg", O_WRONLY | O_CLOEXEC); // not for writing here: it is the machine's
	ready();
	wait_go();
	expect(log < 0 || (fcntl(log, F_GETFL) & O_ACCMODE) == O_WRONLY);
	char bytes[16] = "not zero", more[16] = { 0 };
	expect(read(fds[0], bytes, 16) == 0);
	expect(read(fds[1], bytes, 16) == 16 && !memcmp(bytes, more, 16));
	expect(write(fds[2], bytes, 1) == -1 && errno == ENOSPC);
	for (int i = 3; i < 5; i++)
		expect(read(fds[i], bytes, 16) == 16 && memcmp(bytes, more, 16), "%s", names[i]);
	expect(fcntl(fds[2], F_GETFL) & O_NONBLOCK);
	return passed();
}

// Both ends in one process and in relatives, full and empty, packets, an end that nobody has, other sizes.
static int pipes(void)
{
	int full[2], empty[2], packets[2], no_writer[2], no_reader[2], large[2];
	must(pipe2(full, O_NONBLOCK));
	must(pipe2(empty, O_NONBLOCK | O_CLOEXEC));
	must(pipe(no_writer));
	must(pipe(no_reader));
	must(pipe(large));
	(void)packets;
	static char block[4096], got[300000];
	long filled = 0, size;
	for (paint(block, sizeof block, 1); (size = write(full[1], block, sizeof block)) > 0; filled += size)
		;
	must(write(no_writer[1], "last words", 10));
	close(no_writer[1]);
	close(no_reader[0]);
	must(fcntl(large[1], F_SETPIPE_SZ, 1 << 18));
	must(write(large[1], got, 200000));
	signal(SIGPIPE, SIG_IGN);
	int again = must(dup(full[0]));
	must(fchown(full[1], 1234, 5678));
	must(fchmod(full[0], 0640));
	struct stat before, after;
	must(fstat(full[1], &before));
	pid_t child = must(fork());
	if (!child) {
		close(empty[0]);
		wait_go();
		must(write(empty[1], "from the child", 14));
		return 0;
	}
	ready();
	wait_go();
	join_child(child);
	must(fstat(full[0], &after));
	expect(after.st_uid == 1234 && after.st_gid == 5678 && (after.st_mode & 07777) == 0640, "%o", after.st_mode);
	expect(!memcmp(&before.st_mtim, &after.st_mtim, sizeof before.st_mtim));
	must(fstat(large[0], &after));
	expect(after.st_uid == getuid() && (after.st_mode & 07777) == 0600, "%o", after.st_mode);
	expect(read(again, got, sizeof got) == filled, "of %ld", filled);
	for (long at = 0; at < filled; at += sizeof block)
		expect_painted(got + at, sizeof block, 1);
	expect(read(full[0], got, 1) == -1 && errno == EAGAIN);
	expect(read(empty[0], got, 100) == 14 && !memcmp(got, "from the child", 14));
	expect(read(no_writer[0], got, 100) == 10 && !memcmp(got, "last words", 10));
	expect(read(no_writer[0], got, 100) == 0, "end of file");
	expect(write(no_reader[1], got, 1) == -1 && errno == EPIPE);
	expect(fcntl(large[0], F_GETPIPE_SZ) == 1 << 18);
	expect(read(large[0], got, sizeof got) == 200000);
	return passed();
}

static int places(void)
{
	must(mkdir("inside", 0700));
	must(chdir("inside"));
	umask(0137);
	ready();
	wait_go();
	char now_in[600];
	must((long)getcwd(now_in, sizeof now_in));
	expect(!strncmp(now_in, base, strlen(base)) && !strcmp(now_in + strlen(base), "/inside"), "%s", now_in);
	close(must(open("new", O_CREAT | O_WRONLY, 0777)));
	struct stat made;
	must(stat(in_base("inside/new"), &made));
	expect((made.st_mode & 0777) == 0640, "%o", made.st_mode);
	return passed();
}

static int chrooted(void)
{
	must(mkdir("deeper", 0700));
	must(chroot("."));
	base[0] = 0;
	must(chdir("/deeper"));
	ready();
	wait_go();
	expect(access("/usr", F_OK) == -1 && access("/deeper", F_OK) == 0);
	char now_in[600];
	must((long)getcwd(now_in, sizeof now_in));
	expect(!strcmp(now_in, "/deeper"), "%s", now_in);
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "regular", regular }, { "limited", limited }, { "handed", handed }, { "latency", latency }, { "devices", devices }, { "pipes", pipes }, { "places", places }, { "chroot", chrooted },
	};
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
