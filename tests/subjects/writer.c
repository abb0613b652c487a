// Changes its memory at random, one step for each number that it finds in the file "step": by all ways in which memory
// changes. After a step the file "at.PID" has the number, and which areas are to be what they were.
#include "subject.h"
#include <sys/personality.h>

#define PAGE 4096L
#define HUGE (2L << 20)

enum kind { PRIVATE, SHARED, OF_FILE, HEAP, STACK, LARGE };

// Pages that were given to MADV_FREE may be zero, or what they were.
static struct area {
	char *at;
	long pages;
	enum kind kind;
	int loose, readonly;
} areas[24];
static int count;
static pid_t children[3];
static uint64_t state;
static long last;
static int root;

static uint64_t roll(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static void fill(char *at, long pages)
{
	for (uint64_t *word = (uint64_t *)at; word < (uint64_t *)(at + pages * PAGE); word++)
		*word = roll(UINT64_MAX);
}

static void *map(void *at, long pages, enum kind kind)
{
	int flags = kind == SHARED ? MAP_SHARED | MAP_ANONYMOUS : MAP_PRIVATE | MAP_ANONYMOUS;
	int fd = -1;
	if (kind == OF_FILE) {
		flags = MAP_PRIVATE;
		fd = must(open(in_base("file"), O_RDWR));
	}
	char *got = must(mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, flags | (at ? MAP_FIXED : 0), fd, 0));
	if (fd >= 0)
		close(fd);
	return got;
}

static void add(char *at, long pages, enum kind kind)
{
	if (count < (int)COUNT(areas))
		areas[count++] = (struct area){ at, pages, kind, 0, 0 };
}

static void drop(int index)
{
	areas[index] = areas[--count];
}

static void report(void)
{
	char name[32], text[4096];
	int length = snprintf(text, sizeof text, "%ld\n", last);
	for (struct area *area = areas; area < areas + count; area++)
		length += snprintf(text + length, sizeof text - length, "%p %ld %d\n", area->at, area->pages * PAGE,
				   area->loose);
	snprintf(name, sizeof name, "at.%d", getpid());
	put_file(name, text);
}

static void start_areas(void)
{
	add(map(NULL, 64, PRIVATE), 64, PRIVATE);
	add(map(NULL, 16, PRIVATE), 16, PRIVATE);
	add(map(NULL, 16, SHARED), 16, SHARED);
	add(map(NULL, 8, OF_FILE), 8, OF_FILE);
	add((char *)(((uintptr_t)must(sbrk(9 * PAGE)) + PAGE - 1) & -PAGE), 8, HEAP);
	for (int i = 0; i < count; i++)
		fill(areas[i].at, areas[i].pages / 2);
}

static void fork_one(void)
{
	pid_t *slot = &children[roll(COUNT(children))];
	if (*slot) {
		kill(*slot, SIGKILL);
		must(waitpid(*slot, NULL, 0));
		*slot = 0;
		return;
	}
	fflush(NULL);
	pid_t parent = getpid(), child = must(fork());
	if (child) {
		*slot = child;
		return;
	}
	must(prctl(PR_SET_PDEATHSIG, SIGKILL));
	expect(getppid() == parent);
	root = 0;
	for (int i = 0; i < count; i++)
		if (areas[i].kind == LARGE)
			drop(i);
	state ^= getpid() * 0x9e3779b97f4a7c15;
}

static void execute(void)
{
	char number[32], seed[32];
	snprintf(number, sizeof number, "%ld", last);
	snprintf(seed, sizeof seed, "%lu", state);
	execl("/proc/self/exe", "writer", number, seed, NULL);
	fail("exec: %s", strerror(errno));
}

static void deep(long depth)
{
	volatile char frame[PAGE];
	frame[0] = depth;
	if (depth)
		deep(depth - 1);
	frame[1] = frame[0];
}

// A part of an area.
static char *part(struct area *area, long *pages)
{
	long first = roll(area->pages);
	*pages = 1 + roll(area->pages - first < 8 ? area->pages - first : 8);
	return area->at + first * PAGE;
}

// What is not one mapping any more (mlock, mprotect) cannot be moved or made larger.
static void remap(struct area *area, long pages, int flags, void *to)
{
	char *got = mremap(area->at, area->pages * PAGE, pages * PAGE, flags, to);
	if (got == MAP_FAILED) {
		expect(errno == EFAULT, "%s", strerror(errno));
		return;
	}
	area->at = got;
	area->pages = pages;
}

static void change_mapping(int index)
{
	struct area *area = &areas[index];
	switch (roll(6)) {
	case 0: { // to another place
		char *to = must(mmap(NULL, area->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		remap(area, area->pages, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		break;
	}
	case 1: // larger
		if (area->pages < 80)
			remap(area, area->pages + 3, MREMAP_MAYMOVE, NULL);
		break;
	case 2: // smaller
		if (area->pages < 4)
			break;
		must(munmap(area->at + (area->pages - 1) * PAGE, PAGE));
		area->pages--;
		break;
	case 3: // another one in its place
		map(area->at, area->pages, PRIVATE);
		fill(area->at, roll(area->pages + 1));
		break;
	case 4: // with a hole
		if (area->pages < 8 || count == (int)COUNT(areas))
			break;
		must(munmap(area->at + 4 * PAGE, PAGE));
		add(area->at + 5 * PAGE, area->pages - 5, PRIVATE);
		area->pages = 4;
		break;
	default: // none at all, or a new one
		if (count > 12) {
			must(munmap(area->at, area->pages * PAGE));
			drop(index);
		} else {
			char *at = map(NULL, 12, PRIVATE);
			fill(at, roll(13));
			add(at, 12, PRIVATE);
		}
	}
}

static void change(void)
{
	int index = roll(count);
	struct area *area = &areas[index];
	long pages;
	char *at = part(area, &pages);
	if (area->readonly || area->loose) {
		must(mprotect(area->at, area->pages * PAGE, PROT_READ | PROT_WRITE));
		if (area->loose)
			fill(area->at, area->pages);
		area->readonly = area->loose = 0;
	}
	int plain = area->kind == PRIVATE || area->kind == LARGE;
	switch (roll(20)) {
	case 0 ... 4: // a few words here and there
		for (int i = 0; i < 3; i++)
			*(uint64_t *)(area->at + roll(area->pages) * PAGE + roll(500) * 8) = roll(UINT64_MAX);
		return;
	case 5:
		fill(at, pages);
		return;
	case 6:
		memset(at, 0, pages * PAGE);
		return;
	case 7: // what was there already
		memmove(at, at, pages * PAGE);
		*(volatile char *)at = *(volatile char *)at;
		return;
	case 8: { // two pages change places
		char other[PAGE], *with = area->at + roll(area->pages) * PAGE;
		memcpy(other, with, PAGE);
		memcpy(with, at, PAGE);
		memcpy(at, other, PAGE);
		return;
	}
	case 9: { // the kernel writes
		int fd = must(open(in_base("file"), O_RDONLY));
		must(pread(fd, at, pages * PAGE - 100, roll(4000)));
		close(fd);
		return;
	}
	case 10:
	case 11:
		if (area->kind != STACK && area->kind != SHARED && madvise(at, pages * PAGE, MADV_DONTNEED))
			expect(errno == EINVAL); // it is locked
		return;
	case 12:
		if (plain && !madvise(at, pages * PAGE, MADV_FREE))
			area->loose = 1;
		return;
	case 13:
		if (area->kind != STACK)
			(roll(2) ? mlock : munlock)(at, pages * PAGE);
		return;
	case 14:
		if (area->kind != STACK) {
			must(mprotect(area->at, area->pages * PAGE, PROT_READ));
			area->readonly = roll(2);
			if (!area->readonly)
				must(mprotect(area->at, area->pages * PAGE, PROT_READ | PROT_WRITE));
		}
		return;
	case 15:
		if (area->kind == HEAP && area->pages < 60 && sbrk(0) >= (void *)(area->at + area->pages * PAGE)) {
			char *more = (char *)(((uintptr_t)must(sbrk(4 * PAGE)) + PAGE - 1) & -PAGE);
			add(more, 3, HEAP);
			fill(more, 2);
		}
		return;
	case 16:
		deep(roll(100));
		return;
	case 17:
		if (root)
			fork_one();
		else if (!roll(3))
			execute();
		return;
	default:
		if (area->kind == PRIVATE && !area->loose)
			change_mapping(index);
	}
}

static long wanted(void)
{
	char text[64];
	return get_file("step", text, sizeof text) ? atol(text) : 0;
}

int main(int argc, char **argv)
{
	// A program that is executed anew gets the same addresses.
	if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) {
		must(personality(ADDR_NO_RANDOMIZE));
		execv("/proc/self/exe", argv);
	}
	begin();
	root = argc < 3;
	last = root ? 0 : atol(argv[1]);
	state = 0x1234567 + (argc > 1 ? strtoul(argv[argc - 1], NULL, 10) : 0);
	char frame[6 * PAGE];
	if (root) {
		int fd = must(open(in_base("file"), O_RDWR | O_CREAT | O_TRUNC, 0600));
		char bytes[10 * PAGE];
		fill(bytes, 10);
		must(write(fd, bytes, sizeof bytes));
		close(fd);
	}
	start_areas();
	add((char *)(((uintptr_t)frame + PAGE - 1) & -PAGE), 5, STACK);
	fill(areas[count - 1].at, 5);
	if (root) {
		char *at = must(mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		at = (char *)(((uintptr_t)at + HUGE - 1) & -HUGE);
		must(madvise(at, HUGE, MADV_HUGEPAGE));
		must(madvise(at, HUGE, MADV_DONTFORK)); // one of them is enough
		fill(at, 4);
		add(at, HUGE / PAGE, LARGE);
	}
	report();
	if (root)
		ready();
	while (!root || !gone_yet()) {
		if (wanted() > last) {
			last = wanted();
			for (int changes = 1 + roll(12); changes; changes--)
				change();
			report();
		} else {
			nap(MS);
		}
	}
	for (size_t i = 0; i < COUNT(children); i++)
		if (children[i]) {
			kill(children[i], SIGKILL);
			must(waitpid(children[i], NULL, 0));
		}
	return passed();
}
