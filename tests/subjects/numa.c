// NUMA memory policies: every thread another one; or one of shared memory; or some of many mappings.
#include "subject.h"
#include <linux/mempolicy.h>

struct policy {
	int mode;
	unsigned long nodes[16];
};

static struct policy get(void *address)
{
	struct policy policy = { 0 };
	must(syscall(SYS_get_mempolicy, &policy.mode, policy.nodes, 1024, address, address ? MPOL_F_ADDR : 0));
	return policy;
}

static void set(int mode, unsigned long nodes)
{
	must(syscall(SYS_set_mempolicy, mode, nodes ? &nodes : NULL, nodes ? 65 : 0));
}

static void expect_policy(int mode, unsigned long nodes)
{
	struct policy policy = get(NULL);
	expect(policy.mode == mode && policy.nodes[0] == nodes, "mode %#x nodes %#lx", policy.mode, policy.nodes[0]);
}

static const struct { int mode; unsigned long nodes; } policies[] = {
	{ MPOL_PREFERRED, 1 },
	{ MPOL_INTERLEAVE, 1 },
	{ MPOL_BIND | MPOL_F_STATIC_NODES, 1 },
	// Nodes that are not there (yet): the mask is kept as it was given.
	{ MPOL_BIND | MPOL_F_RELATIVE_NODES, 5 },
	{ MPOL_LOCAL, 0 },
	{ MPOL_DEFAULT, 0 },
};

static _Atomic int set_up, go_on;

static void *member(void *number)
{
	size_t me = (size_t)number;
	set(policies[me].mode, policies[me].nodes);
	expect_policy(policies[me].mode, policies[me].nodes);
	set_up++;
	while (!go_on)
		nap(5 * MS);
	expect_policy(policies[me].mode, policies[me].nodes);
	return NULL;
}

static const struct { size_t page; int mode; } bound[] = {
	{ 0, MPOL_BIND }, { 2, MPOL_DEFAULT }, { 3000, MPOL_INTERLEAVE }, { 3002, MPOL_DEFAULT }, { 7998, MPOL_BIND },
};

static int some_of_many(void)
{
	unsigned long node = 1;
	char *area = must(mmap(NULL, 8000 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (size_t page = 1; page < 8000; page += 2)
		must(mprotect(area + page * 4096, 4096, PROT_READ));
	for (size_t i = 0; i < COUNT(bound); i++) {
		if (bound[i].mode != MPOL_DEFAULT)
			must(syscall(SYS_mbind, area + bound[i].page * 4096, 4096, bound[i].mode, &node, 65, 0));
		area[bound[i].page * 4096] = 1 + i;
	}
	ready();
	wait_go();
	for (size_t i = 0; i < COUNT(bound); i++) {
		struct policy policy = get(area + bound[i].page * 4096);
		expect(policy.mode == bound[i].mode, "page %zu: mode %#x", bound[i].page, policy.mode);
		expect(policy.nodes[0] == (bound[i].mode != MPOL_DEFAULT), "nodes %#lx", policy.nodes[0]);
		expect(area[bound[i].page * 4096] == (char)(1 + i));
	}
	return passed();
}

int main(int argc, char **argv)
{
	(void)argc;
	begin();
	int mode;
	if (syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 0) == -1 && errno == ENOSYS)
		skip("a kernel without NUMA");
	if (!strcmp(argv[1], "many"))
		return some_of_many();
	char *memory = must(mmap(NULL, 4096 * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	if (!strcmp(argv[1], "mapping")) {
		unsigned long node = 1;
		must(syscall(SYS_mbind, memory, 4096 * 4, MPOL_BIND, &node, 65, 0));
		ready();
		wait_go();
		expect(get(memory).mode == MPOL_BIND && get(memory).nodes[0] == 1);
		return passed();
	}
	pthread_t threads[COUNT(policies)];
	set(MPOL_INTERLEAVE | MPOL_F_STATIC_NODES, 1);
	for (size_t i = 0; i < COUNT(policies); i++)
		zero(pthread_create(&threads[i], NULL, member, (void *)i));
	while (set_up < (int)COUNT(policies))
		nap(MS);
	ready();
	wait_go();
	expect_policy(MPOL_INTERLEAVE | MPOL_F_STATIC_NODES, 1);
	expect(get(memory).mode == MPOL_DEFAULT);
	go_on = 1;
	for (size_t i = 0; i < COUNT(policies); i++)
		zero(pthread_join(threads[i], NULL));
	return passed();
}
