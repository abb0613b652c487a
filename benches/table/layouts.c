/* Memory in other shapes than one area: `layouts KIND BYTES COUNT`.
   mappings: COUNT mappings of BYTES together. sparse: BYTES, of which COUNT pages have been touched. huge: transparent
   huge pages. processes: COUNT of them, each with BYTES of its own. forked: COUNT of them, which share BYTES but for
   the last MiB. Contents are as benches/table/subject.rs fills them. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul

static uint64_t *area;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void fill(uint64_t first, uint64_t end)
{
	for (uint64_t place = first / 8; place < end / 8; place++) {
		uint64_t mixed = (place + 1) * 0x9e3779b97f4a7c15u;
		area[place] = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u ^ mixed >> 29;
	}
}

static void have_children(long count)
{
	for (long child = 1; child < count; child++) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (pid == 0)
			return;
	}
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	const char *kind = argv[1];
	uint64_t bytes = strtoul(argv[2], NULL, 10), count = strtoul(argv[3], NULL, 10);
	setsid();
	close_range(3, ~0u, 0);
	area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("mmap");
	int huge = !strcmp(kind, "huge");
	if (madvise(area, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		die("madvise");
	printf("%lu\n", (unsigned long)area);
	fflush(stdout);
	if (!strcmp(kind, "mappings")) {
		uint64_t each = bytes / count / PAGE * PAGE;
		fill(0, bytes);
		for (uint64_t index = 0; index < count; index += 2)
			if (mprotect((char *)area + index * each, each, PROT_READ))
				die("mprotect");
	} else if (!strcmp(kind, "sparse")) {
		uint64_t stride = bytes / count / PAGE * PAGE;
		for (uint64_t index = 0; index < count; index++)
			fill(index * stride, index * stride + PAGE);
	} else if (!strcmp(kind, "processes")) {
		have_children(count);
		fill(0, bytes);
	} else if (!strcmp(kind, "forked")) {
		pid_t root = getpid();
		fill(0, bytes);
		have_children(count);
		if (getpid() != root)
			memset((char *)area + bytes - (1 << 20), 1, 1 << 20);
	} else {
		fill(0, bytes);
	}
	dup2(0, 1);
	for (;;)
		pause();
}
