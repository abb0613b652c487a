// Memory of huge pages: anonymous, private and shared, memfds. The argument is the size of a page as its binary
// logarithm; the test has seen to it that there are enough.
#include "subject.h"

static int shift;
static size_t HUGE, PART = 16 * PAGE;
static const int RW = PROT_READ | PROT_WRITE;

static char *map(int pages, int prot, int flags)
{
	return must(mmap(NULL, pages * HUGE, prot, flags | MAP_ANONYMOUS | MAP_HUGETLB | shift << MAP_HUGE_SHIFT, -1, 0));
}

// The first pages of a huge one, and its last.
static void paint_huge(char *memory, uint64_t seed)
{
	paint(memory, PART, seed);
	paint(memory + HUGE - PAGE, PAGE, seed + 1);
}
#define expect_huge(memory, seed) (expect_painted(memory, PART, seed), expect_painted((memory) + HUGE - PAGE, PAGE, (seed) + 1))

static int memfd(const char *name)
{
	return must(memfd_create(name, MFD_ALLOW_SEALING | MFD_HUGETLB | shift << MAP_HUGE_SHIFT));
}

// One of everything in one page each, for pages of which there are few.
static int one(void)
{
	char *private = map(1, RW, MAP_PRIVATE);
	paint_huge(private, 1);
	ready();
	wait_go();
	expect_huge(private, 1);
	return passed();
}

int main(int argc, char **argv)
{
	expect(argc == 3);
	begin();
	shift = atoi(argv[2]), HUGE = 1ul << shift;
	if (!strcmp(argv[1], "one"))
		return one();
	// Its second page has another protection, its third is gone, its fourth was never touched, its last has none.
	char *private = map(6, RW, MAP_PRIVATE);
	for (int page = 0; page < 6; page++)
		if (page != 3)
			paint_huge(private + page * HUGE, 10 * page);
	must(mprotect(private + HUGE, HUGE, PROT_READ));
	must(munmap(private + 2 * HUGE, HUGE));
	must(mprotect(private + 5 * HUGE, HUGE, PROT_NONE));
	// Many more than there are.
	char *endless = map(1 << 10, RW, MAP_PRIVATE | MAP_NORESERVE);
	paint_huge(endless + 700 * HUGE, 100);
	must(madvise(endless, HUGE << 10, MADV_DONTDUMP));
	char *shared = map(3, RW, MAP_SHARED), *reserved = map(2, PROT_READ, MAP_SHARED);
	paint_huge(shared + HUGE, 110);
	char *sealed_code = map(1, PROT_READ | PROT_EXEC, MAP_PRIVATE);
	int plain = memfd("plain"), sealed = memfd("sealed"), gone = memfd("gone");
	must(ftruncate(plain, 2 * HUGE));
	must(ftruncate(sealed, HUGE));
	must(ftruncate(gone, HUGE));
	char *of_plain = must(mmap(NULL, 2 * HUGE, RW, MAP_SHARED, plain, 0));
	char *own = must(mmap(NULL, 2 * HUGE, RW, MAP_PRIVATE, plain, 0));
	char *of_gone = must(mmap(NULL, HUGE, RW, MAP_SHARED, gone, 0));
	char *before = must(mmap(NULL, HUGE, RW, MAP_SHARED, sealed, 0));
	paint_huge(of_plain, 120);
	paint_huge(own + HUGE, 130);
	paint_huge(of_gone, 140);
	paint_huge(before, 150);
	must(munmap(before, HUGE));
	must(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK));
	char *of_sealed = must(mmap(NULL, HUGE, PROT_READ, MAP_SHARED, sealed, 0));
	close(gone);
	must(lseek(plain, 77, SEEK_SET));
	pid_t child = must(fork());
	if (!child) {
		// Pages of its own where it writes, its parent's elsewhere.
		paint_huge(private + 4 * HUGE, 200);
		must(munmap(endless, HUGE << 10));
		put_file("written", "");
		wait_go();
		while (!atomic_load((_Atomic char *)shared))
			nap(MS);
		expect_huge(private, 0);
		expect_huge(private + HUGE, 10);
		expect_huge(private + 4 * HUGE, 200);
		expect_huge(shared + HUGE, 111);
		expect_huge(own + HUGE, 130);
		paint_huge(of_gone, 141);
		return 0;
	}
	while (access("written", F_OK))
		nap(MS);
	const int all = HUGE / PAGE;
	int first = in_common(getpid(), child, private, HUGE), read_only = in_common(getpid(), child, private + HUGE, HUGE);
	int common[] = { first, read_only, 0, in_common(getpid(), child, own + HUGE, HUGE) };
	expect(!first || (first == all && read_only == all && common[3] == all), "%d %d", first, read_only);
	shared[0] = 0;
	ready();
	wait_go();
	int pages[] = { in_common(getpid(), child, private, HUGE), in_common(getpid(), child, private + HUGE, HUGE),
			in_common(getpid(), child, private + 4 * HUGE, HUGE), in_common(getpid(), child, own + HUGE, HUGE) };
	for (size_t i = 0; i < COUNT(pages); i++)
		expect(pages[i] == common[i], "%zu: %d of %d pages are still shared", i, pages[i], common[i]);
	expect_huge(private, 0);
	expect_huge(private + HUGE, 10);
	expect(!private[3 * HUGE] && !private[3 * HUGE + PAGE]);
	expect_huge(private + 4 * HUGE, 40);
	must(mprotect(private + 5 * HUGE, HUGE, PROT_READ));
	expect_huge(private + 5 * HUGE, 50);
	expect_huge(endless + 700 * HUGE, 100);
	expect_huge(shared + HUGE, 110);
	expect(!reserved[0] && !sealed_code[0]);
	expect_huge(of_plain, 120);
	expect_huge(own, 120);
	expect_huge(own + HUGE, 130);
	expect(!of_plain[HUGE]);
	expect(lseek(plain, 0, SEEK_CUR) == 77 && lseek(plain, 0, SEEK_END) == (off_t)(2 * HUGE));
	expect_huge(of_gone, 140);
	expect_huge(of_sealed, 150);
	expect(fcntl(sealed, F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_SHRINK));
	expect(mprotect(of_sealed, HUGE, RW) == -1 && errno == EACCES);
	paint_huge(shared + HUGE, 111);
	atomic_store((_Atomic char *)shared, 1);
	join_child(child);
	expect_huge(of_gone, 141);
	return passed();
}
