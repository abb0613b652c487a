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
#define child(body)                                                                                \
	({                                                                                         \
		pid_t pid_ = must(fork());                                                         \
		if (!pid_) {                                                                       \
			body;                                                                      \
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

int main(int argc, char **argv)
{
	begin();
	expect(argc == 2);
	shared = must(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	if (!strcmp(argv[1], "orphans"))
		return orphans(1);
	if (!strcmp(argv[1], "left"))
		return orphans(0);
	fail("usage");
}
