// Families whose elders have gone: orphans at a subreaper, sessions and groups without their leaders.
#include "subject.h"

struct member {
	pid_t pid, parent, group, session;
};

static struct {
	_Atomic int settled;
	_Atomic pid_t pids[16]; // by role
	_Atomic int go_on[16];
} *shared;

static struct member self(void)
{
	return (struct member){ getpid(), getppid(), getpgrp(), getsid(0) };
}

// Waits until it has this parent, and then for the test; checks that it is who it was.
static void settle(pid_t parent)
{
	while (getppid() != parent)
		nap(MS);
	struct member before = self();
	shared->settled++;
	wait_go();
	struct member after = self();
	expect(!memcmp(&before, &after, sizeof before), "pid %d->%d parent %d->%d group %d->%d session %d->%d",
	       before.pid, after.pid, before.parent, after.parent, before.group, after.group, before.session, after.session);
}

static void await(_Atomic int *what)
{
	while (!*what)
		nap(MS);
}

// The body is the child's, which exits with 0 after it.
#define child(...)                                                                                 \
	({                                                                                         \
		pid_t pid_ = must(fork());                                                         \
		if (!pid_) {                                                                       \
			__VA_ARGS__;                                                                      \
			_exit(0);                                                                  \
		}                                                                                  \
		pid_;                                                                              \
	})

static void reap(pid_t pid)
{
	join_child(pid);
}

static void no_child_signal(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	while (sigtimedwait(&set, NULL, &(struct timespec){ 0 }) > 0)
		;
}

static int orphans(int stays_subreaper)
{
	pid_t root = getpid();
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	must(sigprocmask(SIG_BLOCK, &set, NULL)); // one too many would be seen as pending
	must(prctl(PR_SET_CHILD_SUBREAPER, 1));
	int members = 0;

	// A session whose leader has gone: two of its children, one in a group of its own, and a grandchild.
	reap(child({
		must(setsid());
		child({
			pid_t own = getpid();
			pid_t deeper = child(settle(own));
			settle(root);
			join_child(deeper);
		});
		child({
			must(setpgid(0, 0));
			settle(root);
		});
	}));
	members += 3;

	// A session whose leader lives: a grandchild of his has come to us.
	child({
		must(setsid());
		reap(child(child(settle(root))));
		settle(root);
	});
	members += 2;

	// A group in our session whose leader has gone.
	pid_t leader = child({
		must(setpgid(0, 0));
		await(&shared->go_on[0]);
	});
	while (getpgid(leader) != leader)
		nap(MS);
	for (int i = 0; i < 2; i++)
		child({
			must(setpgid(0, leader));
			settle(root);
		});
	members += 2;

	// A group whose leader has left it.
	pid_t left = child({
		must(setpgid(0, 0));
		await(&shared->go_on[1]);
		must(setpgid(0, getpgid(root)));
		settle(root);
	});
	while (getpgid(left) != left)
		nap(MS);
	child({
		must(setpgid(0, left));
		shared->go_on[1] = 1;
		settle(root);
	});
	members += 2;

	// One of a lost session that has ended itself, and stays a zombie.
	reap(child({
		must(setsid());
		shared->pids[0] = child({
			while (getppid() != root)
				nap(MS);
			_exit(9);
		});
	}));

	// A session whose leader is a zombie.
	pid_t dead = shared->pids[1] = child({
		must(setsid());
		child(settle(root));
		_exit(11);
	});
	members++;

	// The orphans of one lost session, at two ancestors.
	pid_t reaper = child({
		pid_t own = getpid();
		must(prctl(PR_SET_CHILD_SUBREAPER, 1));
		reap(child({
			must(setsid());
			child(settle(own));
			shared->pids[2] = child({
				while (getppid() != own)
					nap(MS);
				child(settle(root));
				await(&shared->go_on[2]);
			});
		}));
		must(prctl(PR_SET_CHILD_SUBREAPER, 0));
		shared->go_on[2] = 1;
		reap(shared->pids[2]);
		settle(root);
		expect(must(wait(NULL)) > 0);
	});
	(void)reaper;
	members += 3;

	shared->go_on[0] = 1;
	while (shared->settled < members)
		nap(MS);
	reap(leader);
	must(waitid(P_PID, shared->pids[0], NULL, WEXITED | WNOWAIT));
	must(waitid(P_PID, dead, NULL, WEXITED | WNOWAIT));
	no_child_signal();
	if (!stays_subreaper)
		must(prctl(PR_SET_CHILD_SUBREAPER, 0));
	ready();
	wait_go();
	int subreaper, status;
	must(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
	expect(subreaper == stays_subreaper);
	expect(must(waitpid(shared->pids[0], &status, WNOHANG)) == shared->pids[0] && status == 9 << 8);
	expect(must(waitpid(dead, &status, WNOHANG)) == dead && status == 11 << 8);
	pid_t got;
	while ((got = wait(&status)) > 0)
		expect(status == 0, "%d ended by %#x", got, status);
	return passed();
}

// Children in job-control stops: one that we have seen, one that we have not, one with threads.
static void *endless(void *unused)
{
	for (;; nap(MS))
		shared->settled++;
	return unused;
}

static void *sleeper(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static int stops(void)
{
	static const int signals[] = { SIGSTOP, SIGTSTP, SIGTTIN, SIGSTOP, SIGTTOU };
	static const int seen[] = { 1, 0, 1, 0, 1 };
	pid_t pids[COUNT(signals)];
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	must(sigprocmask(SIG_BLOCK, &set, NULL));
	for (size_t i = 0; i < COUNT(signals); i++) {
		pids[i] = child({
			must(setpgid(0, 0));
			pthread_t threads[3];
			for (size_t j = 0; j < COUNT(threads); j++)
				zero(pthread_create(&threads[j], NULL, endless, NULL));
			shared->go_on[i] = 1;
			for (;; nap(MS))
				if (!access(in_base("enough"), F_OK))
					_exit(i + 40);
		});
		await(&shared->go_on[i]);
		must(kill(pids[i], signals[i]));
		siginfo_t info;
		must(waitid(P_PID, pids[i], &info, WSTOPPED | (seen[i] ? 0 : WNOWAIT)));
		expect(info.si_status == signals[i]);
	}
	// Two that have been continued since, of which we have seen one.
	pid_t continued[2];
	for (int i = 0; i < 2; i++) {
		continued[i] = child({
			pthread_t thread;
			zero(pthread_create(&thread, NULL, sleeper, NULL));
			for (;; nap(MS))
				if (!access(in_base("enough"), F_OK))
					_exit(i + 60);
		});
		must(kill(continued[i], SIGSTOP));
		must(waitid(P_PID, continued[i], NULL, WSTOPPED));
		must(kill(continued[i], SIGCONT));
		must(waitid(P_PID, continued[i], NULL, WCONTINUED | (i ? 0 : WNOWAIT)));
	}
	nap(5 * MS); // the signal comes after what can be waited for
	no_child_signal();
	int before = shared->settled;
	ready();
	wait_go();
	expect(shared->settled == before, "they run");
	expect(sigtimedwait(&set, NULL, &(struct timespec){ 0 }) == -1, "one SIGCHLD too many");
	for (size_t i = 0; i < COUNT(signals); i++) {
		siginfo_t info = { 0 };
		must(waitid(P_PID, pids[i], &info, WSTOPPED | WNOHANG));
		expect(info.si_pid == (seen[i] ? 0 : pids[i]), "child %zu", i);
		expect(seen[i] || info.si_status == signals[i], "%d instead of %d", info.si_status, signals[i]);
	}
	for (int i = 0; i < 2; i++)
		for (int again = 0; again < 2; again++) {
			siginfo_t info = { 0 };
			must(waitid(P_PID, continued[i], &info, WCONTINUED | WSTOPPED | WNOHANG));
			expect(info.si_pid == (i || again ? 0 : continued[i]), "continued child %d", i);
			expect(!info.si_pid || (info.si_code == CLD_CONTINUED && info.si_status == SIGCONT), "code %d", info.si_code);
		}
	put_file("enough", "");
	for (int i = 0; i < 2; i++) {
		int status;
		expect(must(waitpid(continued[i], &status, 0)) == continued[i] && status == (i + 60) << 8, "%#x", status);
	}
	for (size_t i = 0; i < COUNT(signals); i++) {
		int status;
		must(kill(pids[i], SIGCONT));
		expect(must(waitpid(pids[i], &status, 0)) == pids[i] && status == (int)(i + 40) << 8, "%#x", status);
	}
	expect(sigtimedwait(&set, NULL, &(struct timespec){ 0 }) == SIGCHLD);
	return passed();
}

// Leaders that have ended while their threads live on: that of the root, and that of a child.
static pid_t child_without_leader;

static void *of_child(void *number)
{
	pid_t pid = getpid(), parent = getppid();
	shared->settled++;
	wait_go();
	expect(getpid() == pid && getppid() == parent);
	expect(must(open("/dev/null", O_RDONLY)) > 2);
	syscall(SYS_exit, 7); // the last one's is that of the process, since Linux 5.17
	return number;
}

static void *of_root(void *memory)
{
	char state = 0;
	while (state != 'Z') {
		FILE *stat = fopen("/proc/self/stat", "r");
		expect(stat && fscanf(stat, "%*d (%*[^)]) %c", &state) == 1);
		fclose(stat);
		nap(MS);
	}
	while (shared->settled < 3)
		nap(MS);
	nap(20 * MS);
	pid_t pid = getpid(), tid = gettid();
	ready();
	wait_go();
	expect(getpid() == pid && gettid() == tid && pid != tid);
	expect_painted(memory, 6 << 20, 7);
	int status;
	expect(must(waitpid(child_without_leader, &status, 0)) == child_without_leader && status == 7 << 8, "%#x", status);
	exit(passed());
}

static int leaderless(void)
{
	child_without_leader = child({
		pthread_t threads[3];
		for (long i = 0; i < 3; i++)
			zero(pthread_create(&threads[i], NULL, of_child, (void *)i));
		must(prctl(PR_SET_NAME, "the late"));
		syscall(SYS_exit, 5);
	});
	void *memory = must(mmap(NULL, 6 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	paint(memory, 6 << 20, 7);
	pthread_t thread;
	zero(pthread_create(&thread, NULL, of_root, memory));
	syscall(SYS_exit, 3);
	return 0;
}

int main(int argc, char **argv)
{
	begin();
	expect(argc == 2);
	shared = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	if (!strcmp(argv[1], "orphans"))
		return orphans(1);
	if (!strcmp(argv[1], "left"))
		return orphans(0);
	if (!strcmp(argv[1], "stops"))
		return stops();
	if (!strcmp(argv[1], "leaderless"))
		return leaderless();
	fail("usage");
}
