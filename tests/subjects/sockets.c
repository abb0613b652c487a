// Pairs of unix sockets: what is in them, how they are shut down, what they are set to, who has made them.
#include "subject.h"
#include <grp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

// A struct ucred, by another name than the one that needs _GNU_SOURCE first.
struct who {
	int pid;
	unsigned user, group;
};

static struct who peer(int socket_)
{
	struct who who;
	must(getsockopt(socket_, SOL_SOCKET, SO_PEERCRED, &who, &(socklen_t){ sizeof who }));
	return who;
}

struct pair {
	int a, b;
};

static struct pair pair(int type)
{
	int made[2];
	must(socketpair(AF_UNIX, type, 0, made));
	return (struct pair){ made[0], made[1] };
}

static char large[150000];

// Both directions of a stream, full of what was written in pieces and read in part.
static struct pair streams;

static void make_streams(void)
{
	paint(large, sizeof large, 1);
	streams = pair(SOCK_STREAM | SOCK_NONBLOCK);
	char byte[100];
	must(send(streams.a, "first ", 6, 0));
	expect(send(streams.a, large, sizeof large, 0) == sizeof large);
	expect(recv(streams.b, byte, 4, 0) == 4);
	must(write(streams.b, "back", 4));
}

static void expect_bytes(int socket_, const char *bytes, size_t length)
{
	char got[4096];
	for (size_t done = 0; done < length;) {
		ssize_t some = must(recv(socket_, got, length - done < sizeof got ? length - done : sizeof got, 0));
		expect(some > 0 && !memcmp(got, bytes + done, some), "at %zu of %zu: %zd", done, length, some);
		done += some;
	}
}

static void expect_end(int socket_, ssize_t result, int error)
{
	char byte;
	ssize_t got = recv(socket_, &byte, 1, MSG_DONTWAIT);
	expect(got == result && (got >= 0 || errno == error), "%zd %s", got, got < 0 ? strerror(errno) : "");
}

static void check_streams(void)
{
	expect_bytes(streams.b, "t ", 2);
	expect_bytes(streams.b, large, sizeof large);
	expect_end(streams.b, -1, EAGAIN);
	expect_bytes(streams.a, "back", 4);
	expect_end(streams.a, -1, EAGAIN);
	must(write(streams.a, "on", 2));
	expect_bytes(streams.b, "on", 2);
}

// Messages keep their bounds.
static struct pair packets[2];
static const int KINDS[] = { SOCK_DGRAM, SOCK_SEQPACKET };

static void make_packets(void)
{
	for (int i = 0; i < 2; i++) {
		packets[i] = pair(KINDS[i]);
		must(send(packets[i].a, "one", 3, 0));
		must(send(packets[i].a, large, 70000, 0));
		must(send(packets[i].a, "three", 5, 0));
		must(send(packets[i].b, "other", 5, 0));
	}
}

static void check_packets(void)
{
	static char got[100000];
	for (int i = 0; i < 2; i++) {
		expect(recv(packets[i].b, got, sizeof got, 0) == 3 && !memcmp(got, "one", 3));
		expect(recv(packets[i].b, got, sizeof got, 0) == 70000 && !memcmp(got, large, 70000));
		expect(recv(packets[i].b, got, 2, MSG_TRUNC) == 5 && !memcmp(got, "th", 2));
		expect(recv(packets[i].a, got, sizeof got, 0) == 5 && !memcmp(got, "other", 5));
		expect_end(packets[i].a, -1, EAGAIN);
		expect_end(packets[i].b, -1, EAGAIN);
		must(send(packets[i].b, "on", 2, 0));
		expect(recv(packets[i].a, got, sizeof got, 0) == 2);
	}
}

// Every way of being half dead.
static struct pair half[3], lonely[3], halfway_datagram;

static void make_shut(void)
{
	for (int how = 0; how < 3; how++) {
		half[how] = pair(how == 1 ? SOCK_SEQPACKET : SOCK_STREAM);
		must(send(half[how].a, "before", 6, 0));
		must(shutdown(half[how].a, how));
	}
	for (int i = 0; i < 3; i++) {
		lonely[i] = pair(i < 2 ? SOCK_STREAM : SOCK_DGRAM);
		must(send(lonely[i].b, "last", 4, 0));
		// The second hears that what it said was not read.
		if (i == 1)
			must(send(lonely[i].a, "unread", 6, 0));
		must(close(lonely[i].b));
	}
	halfway_datagram = pair(SOCK_DGRAM);
	must(shutdown(halfway_datagram.a, SHUT_RD));
}

static void check_shut(void)
{
	for (int how = 0; how < 3; how++) {
		int can_send = how == SHUT_RD, can_receive = how == SHUT_WR;
		expect_bytes(half[how].b, "before", 6);
		expect_end(half[how].b, can_send ? -1 : 0, EAGAIN);
		expect_end(half[how].a, can_receive ? -1 : 0, EAGAIN);
		expect((send(half[how].a, "x", 1, MSG_NOSIGNAL) == 1) == can_send, "%d", how);
		expect((send(half[how].b, "x", 1, MSG_NOSIGNAL) == 1) == can_receive, "%d", how);
	}
	for (int i = 0; i < 3; i++) {
		expect_bytes(lonely[i].a, "last", 4);
		if (i == 1)
			expect_end(lonely[i].a, -1, ECONNRESET);
		expect_end(lonely[i].a, i == 2 ? -1 : 0, EAGAIN);
		ssize_t sent = send(lonely[i].a, "x", 1, MSG_NOSIGNAL);
		expect(sent == -1 && errno == (i == 2 ? ECONNREFUSED : EPIPE), "%d: %s", i, strerror(errno));
	}
	expect(send(halfway_datagram.b, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	must(send(halfway_datagram.a, "x", 1, MSG_NOSIGNAL));
	expect_bytes(halfway_datagram.b, "x", 1);
}

// Options, by what getsockopt says of both ends.
static struct pair set;
static const int OPTIONS[] = { SO_SNDBUF, SO_RCVBUF, SO_RCVTIMEO, SO_SNDTIMEO, SO_LINGER, SO_PRIORITY, SO_MARK, SO_KEEPALIVE,
			       SO_RCVLOWAT, SO_PEEK_OFF, SO_PASSCRED, SO_PASSSEC, SO_TIMESTAMP, 72 /* SO_BUF_LOCK */, SO_TYPE, SO_ERROR };
static struct value {
	char bytes[16];
	socklen_t length;
} values[2][COUNT(OPTIONS)];

static void get_options(struct value (*into)[COUNT(OPTIONS)])
{
	for (int end = 0; end < 2; end++)
		for (size_t i = 0; i < COUNT(OPTIONS); i++) {
			into[end][i].length = 16;
			must(getsockopt(end ? set.b : set.a, SOL_SOCKET, OPTIONS[i], into[end][i].bytes, &into[end][i].length));
		}
}

static void put_option(int socket_, int option, int value)
{
	must(setsockopt(socket_, SOL_SOCKET, option, &value, sizeof value));
}

static void make_options(void)
{
	set = pair(SOCK_STREAM);
	must(send(set.b, "abcdef", 6, 0));
	put_option(set.a, SO_SNDBUF, 9000);
	put_option(set.a, SO_RCVBUF, 700000);
	put_option(set.b, SO_SNDBUFFORCE, 30 << 20);
	put_option(set.a, SO_PRIORITY, 5);
	put_option(set.b, SO_MARK, 77);
	put_option(set.a, SO_KEEPALIVE, 1);
	put_option(set.b, SO_RCVLOWAT, 3);
	put_option(set.b, SO_PASSCRED, 1);
	put_option(set.a, SO_PASSSEC, 1);
	put_option(set.b, SO_TIMESTAMP, 1);
	put_option(set.a, SO_PEEK_OFF, 2);
	must(setsockopt(set.a, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ 3, 500000 }, sizeof(struct timeval)));
	must(setsockopt(set.b, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){ 100, 0 }, sizeof(struct timeval)));
	must(setsockopt(set.b, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 9 }, sizeof(struct linger)));
	get_options(values);
}

static void check_options(void)
{
	static struct value now_[2][COUNT(OPTIONS)];
	get_options(now_);
	for (int end = 0; end < 2; end++)
		for (size_t i = 0; i < COUNT(OPTIONS); i++)
			expect(!memcmp(&now_[end][i], &values[end][i], sizeof(struct value)), "option %d of end %d: %d", OPTIONS[i],
			       end, *(int *)now_[end][i].bytes);
	char got[8];
	expect(recv(set.a, got, 3, MSG_PEEK) == 3 && !memcmp(got, "cde", 3), "%.3s", got);
}

// A message with a descriptor, which the sender has no more.
union rights {
	struct cmsghdr head;
	char bytes[CMSG_SPACE(sizeof(int))];
};
#define MESSAGE(rights) \
	{ .msg_iov = &(struct iovec){ (char[1]){ 0 }, 1 }, .msg_iovlen = 1, .msg_control = rights, .msg_controllen = sizeof *rights }

static void lend(int by, int what)
{
	union rights rights = { { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	memcpy(CMSG_DATA(&rights.head), &what, sizeof what);
	struct msghdr message = MESSAGE(&rights);
	must(sendmsg(by, &message, 0));
	must(close(what));
}

static int borrow(int from)
{
	union rights rights;
	struct msghdr message = MESSAGE(&rights);
	must(recvmsg(from, &message, 0));
	int what;
	memcpy(&what, CMSG_DATA(&rights.head), sizeof what);
	return what;
}

// Made by a child and lent to its parent, made by another user, held by several.
static struct pair of_user, inherited;
static int lent;
static struct who creator, other_user = { 0, 65534, 12345 };
static pid_t child;

static void make_owned(void)
{
	creator = (struct who){ getpid(), getuid(), getgid() };
	other_user.pid = getpid();
	gid_t groups[] = { 7, 8 }, before[64];
	int count = must(getgroups(COUNT(before), before));
	must(setgroups(2, groups));
	must(setresgid(-1, other_user.group, -1));
	must(setresuid(-1, other_user.user, -1));
	of_user = pair(SOCK_STREAM);
	must(setresuid(-1, creator.user, -1));
	must(setresgid(-1, creator.group, -1));
	must(setgroups(count, before));
	inherited = pair(SOCK_STREAM);
	child = must(fork());
	if (!child) {
		struct pair own = pair(SOCK_SEQPACKET);
		must(close(inherited.a));
		lend(inherited.b, own.a);
		char byte;
		// It sleeps in this call all the time.
		expect(recv(inherited.b, &byte, 1, 0) == 1 && byte == 'x', "%s", strerror(errno));
		struct who who = peer(inherited.b), mine = peer(own.b);
		expect(who.pid == getppid(), "%d", who.pid);
		expect(mine.pid == getpid() && mine.user == creator.user, "%d %d", mine.pid, mine.user);
		must(send(inherited.b, "y", 1, 0));
		must(send(own.b, "lent", 4, 0));
		_exit(0);
	}
	must(close(inherited.b));
	lent = borrow(inherited.a);
}

static void check_owned(void)
{
	struct who one = peer(streams.a), other = peer(of_user.b);
	expect(!memcmp(&one, &creator, sizeof one), "%d %d %d", one.pid, one.user, one.group);
	expect(!memcmp(&other, &other_user, sizeof other), "%d %d %d", other.pid, other.user, other.group);
	gid_t groups[64];
	socklen_t length = sizeof groups;
	must(getsockopt(of_user.a, SOL_SOCKET, 59 /* SO_PEERGROUPS */, groups, &length));
	expect(length == 2 * sizeof *groups && groups[0] == 7 && groups[1] == 8, "%d", length);
	struct stat stat_;
	must(fstat(of_user.a, &stat_));
	expect(stat_.st_uid == other_user.user && stat_.st_gid == other_user.group);
	must(send(inherited.a, "x", 1, 0));
	expect_bytes(inherited.a, "y", 1);
	struct who maker = peer(lent);
	expect(maker.pid == child, "%d", maker.pid);
	expect_bytes(lent, "lent", 4);
	join_child(child);
	expect_end(lent, 0, 0);
	expect_end(inherited.a, 0, 0);
}

// Watched, duplicated, with flags.
static int epoll, duplicate;

static void make_watched(void)
{
	epoll = must(epoll_create1(0));
	struct epoll_event event = { EPOLLIN | EPOLLOUT, { .u64 = 5 } };
	must(epoll_ctl(epoll, EPOLL_CTL_ADD, half[2].b, &event));
	duplicate = must(fcntl(streams.a, F_DUPFD_CLOEXEC, 500));
	must(fcntl(streams.b, F_SETOWN, getpid()));
}

static void check_watched(void)
{
	struct epoll_event event;
	expect(epoll_wait(epoll, &event, 1, 0) == 1 && event.data.u64 == 5, "nothing to report");
	expect(event.events == (EPOLLIN | EPOLLOUT | EPOLLHUP), "%#x", event.events);
	expect(fcntl(duplicate, F_GETFD) == FD_CLOEXEC && fcntl(streams.a, F_GETFD) == 0);
	expect(fcntl(streams.b, F_GETOWN) == getpid());
	must(fcntl(duplicate, F_SETFL, O_RDWR));
	expect(!(fcntl(streams.a, F_GETFL) & O_NONBLOCK) && fcntl(streams.b, F_GETFL) & O_NONBLOCK);
}

// A thread that waits with a time limit of the socket's own: none has seen an EINTR.
static struct pair slow;

static void *wait_slowly(void *got)
{
	char byte;
	*(ssize_t *)got = read(slow.a, &byte, 1) == 1 ? byte : -errno;
	return NULL;
}

int main(void)
{
	begin();
	make_streams();
	make_packets();
	make_shut();
	make_options();
	make_owned();
	make_watched();
	slow = pair(SOCK_STREAM);
	must(setsockopt(slow.a, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ 60, 0 }, sizeof(struct timeval)));
	ssize_t got = 0;
	pthread_t thread;
	zero(pthread_create(&thread, NULL, wait_slowly, &got));
	ready();
	wait_go();
	check_watched();
	check_owned();
	check_options();
	check_shut();
	check_packets();
	check_streams();
	must(send(slow.b, "z", 1, 0));
	zero(pthread_join(thread, NULL));
	expect(got == 'z', "%zd", got);
	return passed();
}
