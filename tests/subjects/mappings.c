// Every kind of mapping that ordinary programs have, each with contents that are checked afterwards.
#include "subject.h"
#include <linux/mempolicy.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/shm.h>

static const size_t SIZE = 16 * PAGE;

static void *map(int prot, int flags, int fd, off_t offset)
{
	return must(mmap(NULL, SIZE, prot, flags, fd, offset));
}
static void *anonymous(int more)
{
	return map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | more, -1, 0);
}

static void expect_empty(const char *page)
{
	expect(!page[0] && !memcmp(page, page + 1, PAGE - 1), "it is not empty");
}

static int file_of(const char *name, uint64_t seed)
{
	static char contents[16 * PAGE];
	paint(contents, SIZE, seed);
	int fd = must(open(name, O_RDWR | O_CREAT, 0600));
	must(write(fd, contents, SIZE));
	return fd;
}

// Some frames deeper than the stack has ever been.
__attribute__((noinline)) static int deep(int frames)
{
	volatile char room[4096];
	room[0] = (char)frames;
	return frames ? deep(frames - 1) + (room[0] == (char)frames) : 0;
}

static int private(void)
{
	put_file("warm", ""); // so that the C library takes its part of the heap now
	char *plain = anonymous(0), *read_only = anonymous(0), *none = anonymous(0), *code = anonymous(0);
	char *write_only = anonymous(0), *untouched = anonymous(0), *holes = anonymous(0), *fixed = anonymous(MAP_NORESERVE);
	paint(plain, SIZE, 1);
	paint(read_only, SIZE, 2);
	must(mprotect(read_only, SIZE, PROT_READ));
	paint(none, SIZE, 3);
	must(mprotect(none, SIZE, PROT_NONE));
	memcpy(code, "\xb8\x2a\0\0\0\xc3", 6); // mov $42, %eax; ret
	must(mprotect(code, SIZE, PROT_READ | PROT_EXEC));
	paint(write_only, SIZE, 4);
	must(mprotect(write_only, SIZE, PROT_WRITE));
	for (int page = 0; page < 16; page += 3)
		paint(holes + page * PAGE, PAGE, page);
	// Its middle has another protection: three mappings out of one.
	paint(fixed, SIZE, 5);
	must(mprotect(fixed + 5 * PAGE, 3 * PAGE, PROT_READ));
	// Pages that held something once, and hold nothing now.
	char *given_back = anonymous(0);
	paint(given_back, SIZE, 6);
	must(madvise(given_back, SIZE, MADV_DONTNEED));
	char *down = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
	paint(down, SIZE, 7);
	char *large = must(mmap(NULL, 1L << 36, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	paint(large + (1L << 35), PAGE, 8);
	char *heap = sbrk(0);
	must((long)sbrk(SIZE));
	paint(heap, SIZE, 9);
	ready();
	wait_go();
	expect_painted(plain, SIZE, 1);
	expect_painted(read_only, SIZE, 2);
	must(mprotect(none, SIZE, PROT_READ | PROT_WRITE));
	expect_painted(none, SIZE, 3);
	expect(((int (*)(void))code)() == 42);
	must(mprotect(write_only, SIZE, PROT_READ));
	expect_painted(write_only, SIZE, 4);
	for (size_t i = 0; i < SIZE; i++)
		expect(!untouched[i] && !given_back[i]);
	for (int page = 0; page < 16; page++) {
		if (page % 3 == 0)
			expect_painted(holes + page * PAGE, PAGE, page);
		else
			expect(!holes[page * PAGE]);
	}
	expect_painted(fixed, SIZE, 5);
	expect_painted(down, SIZE, 7);
	expect_painted(large + (1L << 35), PAGE, 8);
	expect_painted(heap, SIZE, 9);
	expect((char *)sbrk(0) == heap + SIZE, "brk has moved");
	// And all of it can still grow.
	must((long)sbrk(SIZE));
	paint(heap, 2 * SIZE, 10);
	expect_painted(heap, 2 * SIZE, 10);
	expect(deep(1000) == 1000);
	free(memset(malloc(1 << 20), 1, 1 << 20));
	return passed();
}

// Can the kernel write to this memory in the name of this thread, and read it?
static int kernel_writes(char *memory)
{
	static int zero = -1;
	if (zero < 0)
		zero = must(open("/dev/zero", O_RDONLY));
	int can = read(zero, memory, 1) == 1;
	expect(can || errno == EFAULT);
	return can;
}
static int kernel_reads(char *memory)
{
	int fds[2];
	must(pipe(fds));
	int can = write(fds[1], memory, 1) == 1;
	expect(can || errno == EFAULT);
	close(fds[0]);
	close(fds[1]);
	return can;
}

static int files(void)
{
	int one = file_of("private", 1), two = file_of("shared", 2), three = file_of("short", 3);
	int rw = PROT_READ | PROT_WRITE;
	must(ftruncate(three, 5 * PAGE + 100));
	char *private = map(rw, MAP_PRIVATE, one, 0), *read_only = map(PROT_READ, MAP_PRIVATE, one, 0);
	char *shared = map(rw, MAP_SHARED, two, 0), *reader = map(PROT_READ, MAP_SHARED, two, 0);
	char *part = must(mmap(NULL, 3 * PAGE, rw, MAP_PRIVATE, one, 4 * PAGE));
	char *partial = map(PROT_READ, MAP_PRIVATE, three, 0), *beyond = map(rw, MAP_SHARED, three, 0);
	char name[64];
	snprintf(name, sizeof name, "/cryosleep-test-%lld", now(CLOCK_REALTIME));
	int named = must(shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600));
	must(ftruncate(named, SIZE));
	char *posix = map(rw, MAP_SHARED, named, 0);
	paint(posix, SIZE, 16);
	paint(private + 3 * PAGE, PAGE, 11); // its own copy of one page
	memset(private + 6 * PAGE, 0, PAGE); // which hides what the file has there
	paint(part, PAGE, 12);
	paint(shared + PAGE, PAGE, 13);
	close(one);
	close(two);
	close(three);
	ready();
	wait_go();
	expect_painted(private, 3 * PAGE, 1);
	expect_painted(private + 3 * PAGE, PAGE, 11);
	expect_empty(private + 6 * PAGE);
	expect_painted(read_only, SIZE, 1);
	expect_painted(part, PAGE, 12);
	expect(!memcmp(part + PAGE, read_only + 5 * PAGE, PAGE));
	expect_painted(shared + PAGE, PAGE, 13);
	static char page[PAGE];
	expect_painted(partial, 5 * PAGE, 3);
	expect(partial[5 * PAGE + 200] == 0, "beyond the end of the file");
	expect(!kernel_reads(partial + 6 * PAGE) && !kernel_reads(beyond + 6 * PAGE), "pages beyond the end of the file");
	expect_painted(beyond, 5 * PAGE, 3);
	expect_painted(posix, SIZE, 16);
	paint(posix, PAGE, 17);
	must(pread(named, page, PAGE, 0));
	expect_painted(page, PAGE, 17);
	must(shm_unlink(name));
	// What is shared goes to the file and to the other mapping, what is private does not.
	paint(shared + 2 * PAGE, PAGE, 14);
	paint(private + 4 * PAGE, PAGE, 15);
	expect_painted(reader + 2 * PAGE, PAGE, 14);
	int fd = must(open("shared", O_RDONLY));
	must(pread(fd, page, PAGE, 2 * PAGE));
	expect_painted(page, PAGE, 14);
	expect_painted(read_only, SIZE, 1);
	return passed();
}

// Relatives see what the others write, wherever they have it.
static int shared(void)
{
	char *all = map(PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *again = must(mremap(all + 4 * PAGE, 0, 4 * PAGE, MREMAP_MAYMOVE));
	char *sparse = must(mmap(NULL, 1 << 30, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	paint(all, SIZE, 1);
	paint(sparse + (1 << 29), PAGE, 2);
	pid_t child = must(fork());
	if (!child) {
		must(munmap(all, 2 * PAGE)); // the rest is another mapping of the same object
		must(mprotect(all + 2 * PAGE, PAGE, PROT_READ));
		wait_go();
		while (!atomic_load((_Atomic char *)again))
			nap(MS);
		expect_painted(all + 5 * PAGE, PAGE, 3);
		expect_painted(sparse + (1 << 29), PAGE, 2);
		paint(all + 6 * PAGE, PAGE, 4);
		return 0;
	}
	again[0] = 0;
	ready();
	wait_go();
	expect_painted(all, 4 * PAGE, 1);
	expect_painted(sparse + (1 << 29), PAGE, 2);
	paint(all + 5 * PAGE, PAGE, 3);
	atomic_store((_Atomic char *)all + 4 * PAGE, 1);
	join_child(child);
	expect_painted(again + 2 * PAGE, PAGE, 4);
	return passed();
}

// The test sees the flags; here is whether the memory is still good.
static int advice(void)
{
	static const int kinds[] = { MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_MERGEABLE, MADV_HUGEPAGE,
				     MADV_NOHUGEPAGE, MADV_SEQUENTIAL, MADV_RANDOM };
	char *memory[COUNT(kinds) + 4];
	for (size_t i = 0; i < COUNT(memory); i++) {
		memory[i] = must(mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		if (i < COUNT(kinds) && madvise(memory[i], 4 << 20, kinds[i]))
			expect(errno == EINVAL, "advice %d: %s", kinds[i], strerror(errno)); // not in this kernel
		// Guard pages keep them from being merged.
		must(mprotect(memory[i], PAGE, PROT_NONE));
	}
	must(mlock(memory[COUNT(kinds)] + PAGE, SIZE));
	must(mlock2(memory[COUNT(kinds) + 1] + PAGE, SIZE, MLOCK_ONFAULT));
	if (prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, memory[COUNT(kinds) + 2] + PAGE, SIZE, "a name"))
		expect(errno == EINVAL);
	for (size_t i = 0; i < COUNT(memory); i++)
		paint(memory[i] + PAGE, SIZE, i);
	// It leaves no mark, but on pages.
	must(madvise(memory[COUNT(kinds) + 3] + PAGE, SIZE, MADV_COLD));
	ready();
	wait_go();
	for (size_t i = 0; i < COUNT(memory); i++)
		expect_painted(memory[i] + PAGE, SIZE, i);
	return passed();
}

// Guard regions (Linux 6.13) are not visible as mappings of their own.
static int guards(void)
{
	const int install = 102;
	char *memory = anonymous(0);
	paint(memory, SIZE, 1);
	if (madvise(memory + 4 * PAGE, PAGE, install))
		skip("no guard regions in this kernel");
	ready();
	wait_go();
	expect_painted(memory, 4 * PAGE, 1);
	int null = must(open("/dev/zero", O_RDONLY));
	expect(read(null, memory + 4 * PAGE, 1) == -1 && errno == EFAULT, "the guard page is gone");
	return passed();
}

#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif

// Does the mapping at this address have this flag in /proc/self/smaps?
static int has_flag(void *memory, const char *flag)
{
	char line[512];
	int inside = 0, found = -1;
	FILE *smaps = must(fopen("/proc/self/smaps", "r"));
	while (found < 0 && fgets(line, sizeof line, smaps)) {
		unsigned long start, end;
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = (unsigned long)memory >= start && (unsigned long)memory < end;
		else if (inside && !strncmp(line, "VmFlags:", 8))
			found = strstr(line, flag) != NULL;
	}
	fclose(smaps);
	expect(found >= 0, "no mapping at %p", memory);
	return found;
}

// What mlockall() has said of memory to come; memory that cannot be touched is locked too.
static void locks(int flags, const char *newest, const char *without)
{
	char *before = anonymous(0), *none = anonymous(0), *file = map(PROT_READ, MAP_PRIVATE, file_of("locked", 1), 0);
	must(mlock(none, SIZE));
	must(mprotect(none, SIZE, PROT_NONE));
	must(truncate("locked", PAGE)); // the rest is beyond its end
	// Under MCL_CURRENT it fails after it has locked what it could not touch.
	must(mlockall(flags));
	char *after = anonymous(0);
	int current = (flags & MCL_CURRENT) != 0;
	expect(has_flag(before, " lo") == current && has_flag(file, " lo") == current && has_flag(none, " lo"));
	expect(has_flag(after, newest) && (!without || !has_flag(after, without)));
	put_file(flags & MCL_ONFAULT ? "locked_on_fault" : "locked_at_once", "");
	wait_go();
	char *last = anonymous(0);
	unsigned char resident = 2;
	must(mincore(last, PAGE, &resident));
	expect(has_flag(last, newest) && (!without || !has_flag(last, without)), "later mappings are not locked as before");
	expect(resident == !(flags & MCL_ONFAULT));
	must(munlockall());
	expect(!has_flag(anonymous(0), " lo"));
}

struct keys { int denied, freed, last; char *read_only, *hidden, *left, *code; };

static int keys(struct keys *keys)
{
	keys->code = anonymous(0);
	memcpy(keys->code, "\xb8\x2a\0\0\0\xc3", 6); // mov $42, %eax; ret
	keys->denied = pkey_alloc(0, PKEY_DISABLE_WRITE);
	if (keys->denied < 0)
		return 0;
	keys->freed = must(pkey_alloc(0, 0));
	must(mprotect(keys->code, SIZE, PROT_EXEC)); // takes a key of its own
	keys->last = must(pkey_alloc(0, PKEY_DISABLE_ACCESS));
	keys->read_only = anonymous(0), keys->hidden = anonymous(0), keys->left = anonymous(0);
	paint(keys->read_only, SIZE, 20);
	paint(keys->hidden, SIZE, 21);
	must(pkey_mprotect(keys->read_only, SIZE, PROT_READ | PROT_WRITE, keys->denied));
	must(pkey_mprotect(keys->hidden, SIZE, PROT_READ | PROT_WRITE, keys->last));
	must(pkey_mprotect(keys->left, SIZE, PROT_READ | PROT_WRITE, keys->freed));
	must(pkey_free(keys->freed));
	return 1;
}

static void check_keys(struct keys *keys)
{
	expect(pkey_get(keys->denied) == PKEY_DISABLE_WRITE && pkey_get(keys->last) == PKEY_DISABLE_ACCESS);
	expect(kernel_reads(keys->read_only) && !kernel_writes(keys->read_only));
	expect(!kernel_reads(keys->hidden) && !kernel_reads(keys->code));
	expect(((int (*)(void))keys->code)() == 42);
	expect(pkey_set(keys->last, 0) == 0);
	expect_painted(keys->read_only, SIZE, 20);
	expect_painted(keys->hidden, SIZE, 21);
	// The one that was freed is the next, then the first that has never been used.
	expect(pkey_alloc(0, 0) == keys->freed, "a key that was freed is allocated");
	expect(pkey_alloc(0, 0) == keys->last + 1);
	expect(pkey_free(keys->denied) == 0 && pkey_free(keys->denied) == -1);
}

static void set_policy(void *memory, int mode, unsigned long nodes)
{
	if (syscall(SYS_mbind, memory, SIZE, mode, &nodes, 65, 0))
		expect(errno == ENOSYS, "%s", strerror(errno));
}

static void expect_policy(void *memory, int mode, unsigned long nodes)
{
	int now;
	unsigned long mask[16] = { 0 };
	if (syscall(SYS_get_mempolicy, &now, mask, 1024, memory, MPOL_F_ADDR))
		expect(errno == ENOSYS, "%s", strerror(errno));
	else
		expect(now == mode && mask[0] == nodes, "mode %#x nodes %#lx", now, mask[0]);
}

static struct shmid_ds status_of(int id)
{
	struct shmid_ds status;
	must(shmctl(id, IPC_STAT, &status));
	return status;
}

static void expect_same(struct shmid_ds before, int id)
{
	struct shmid_ds now = status_of(id);
	struct ipc_perm *a = &before.shm_perm, *b = &now.shm_perm;
	expect(a->__key == b->__key && a->mode == b->mode, "key %x mode %o", b->__key, b->mode);
	expect(a->uid == b->uid && a->gid == b->gid, "%d:%d", b->uid, b->gid);
	expect(a->cuid == b->cuid && a->cgid == b->cgid, "made by %d:%d", b->cuid, b->cgid);
	expect(before.shm_segsz == now.shm_segsz);
	// In another pid namespace one that has stayed in the system was made by nobody, and one that was lost by process 1.
	expect(before.shm_cpid == now.shm_cpid || (now.shm_cpid < 2 && !proc_is_ours()), "made by %d", now.shm_cpid);
	expect(before.shm_nattch == now.shm_nattch, "%ld instead of %ld", now.shm_nattch, before.shm_nattch);
}

// System V: one segment with a key that stays, one that was removed, one that somebody else has made.
static int sysv(void)
{
	int lasting = must(shmget(0x5eed, SIZE - 100, IPC_CREAT | IPC_EXCL | 0640));
	struct shmid_ds owner = status_of(lasting);
	owner.shm_perm.uid = 1234, owner.shm_perm.gid = 5678, owner.shm_perm.mode = 0604;
	must(shmctl(lasting, IPC_SET, &owner));
	must(shmctl(lasting, SHM_LOCK, NULL));
	must(setegid(77));
	must(seteuid(1234));
	int removed = must(shmget(0x5eee, SIZE, IPC_CREAT | IPC_EXCL | 0600));
	must(seteuid(0));
	must(setegid(0));
	char *one = must(shmat(lasting, NULL, 0)), *two = must(shmat(removed, NULL, 0));
	char *again = must(shmat(lasting, NULL, SHM_RDONLY)), *code = must(shmat(removed, NULL, SHM_EXEC));
	must(shmctl(removed, IPC_RMID, NULL));
	int loose = must(shmget(0x5eef, SIZE, IPC_CREAT | IPC_EXCL | 0600));
	char *three = must(shmat(loose, NULL, 0));
	paint(three, SIZE, 6);
	must(shmdt(three));
	paint(one, SIZE - PAGE, 1);
	paint(two, SIZE, 2);
	pid_t child = must(fork());
	if (!child) {
		must(munmap(two, 3 * PAGE));
		must(mprotect(one, PAGE, PROT_READ));
		must(shmdt(code));
		put_file("attached", "");
		wait_go();
		expect_painted(two + 3 * PAGE, PAGE, 3);
		paint(two + 4 * PAGE, PAGE, 4);
		return 0;
	}
	while (access("attached", F_OK))
		nap(MS);
	struct shmid_ds first = status_of(lasting), second = status_of(removed);
	expect(first.shm_nattch == 5 && second.shm_nattch == 3); // mappings, not calls
	paint(two + 3 * PAGE, PAGE, 3);
	ready();
	wait_go();
	expect_painted(one, SIZE - PAGE, 1);
	expect_painted(again, SIZE - PAGE, 1);
	join_child(child);
	expect_painted(code, PAGE, 2);
	expect_painted(code + 4 * PAGE, PAGE, 4);
	struct shmid_ds unattached = status_of(loose);
	expect(unattached.shm_nattch == 0 && unattached.shm_segsz == SIZE);
	three = must(shmat(loose, NULL, 0));
	expect_painted(three, SIZE, 6);
	must(shmdt(three));
	must(shmctl(loose, IPC_RMID, NULL));
	first.shm_nattch -= 3, second.shm_nattch -= 1;
	expect_same(first, lasting);
	expect_same(second, removed);
	expect(mprotect(again, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES);
	paint(one, PAGE, 5);
	expect_painted(again, PAGE, 5);
	must(shmdt(two));
	must(shmdt(code));
	expect(shmctl(removed, IPC_STAT, &first) == -1, "it does not go with its last user");
	must(shmdt(one));
	must(shmdt(again));
	must(shmctl(lasting, IPC_RMID, NULL));
	return passed();
}

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8
#define F_SEAL_EXEC 0x20
#endif

static int memfd(const char *name, unsigned flags, uint64_t seed)
{
	static char contents[16 * PAGE];
	int fd = must(memfd_create(name, flags));
	paint(contents, SIZE, seed);
	must(write(fd, contents, SIZE));
	return fd;
}

// Pages of memory that was painted as a whole.
static void expect_part(char *memory, int first, int count, uint64_t seed)
{
	static char whole[16 * PAGE];
	paint(whole, SIZE, seed);
	expect(!memcmp(memory + first * PAGE, whole + first * PAGE, count * PAGE), "seed %d", (int)seed);
}

static void *map_fd(int prot, int flags, int fd) { return map(prot, flags, fd, 0); }
static int seals(int fd) { return must(fcntl(fd, F_GET_SEALS)); }
static int is_mappable(int prot, int fd)
{
	void *memory = mmap(NULL, PAGE, prot, MAP_SHARED, fd, 0);
	return memory != MAP_FAILED && !munmap(memory, PAGE);
}

// Open and mapped, by one and by several, with every kind of seal.
static int memfds(void)
{
	int rw = PROT_READ | PROT_WRITE, r = PROT_READ;
	int plain = memfd("plain", 0, 1), written = memfd("written", MFD_ALLOW_SEALING, 2);
	int future = memfd("future", MFD_ALLOW_SEALING, 3), only = memfd("a b\n/c (deleted)", MFD_CLOEXEC, 4);
	int sparse = must(memfd_create("sparse", MFD_ALLOW_SEALING)), late = memfd("late", MFD_ALLOW_SEALING, 9);
	int never = memfd_create("never", MFD_NOEXEC_SEAL);
	char *shared = map_fd(rw, MAP_SHARED, plain), *private = map_fd(rw, MAP_PRIVATE, plain);
	must(ftruncate(plain, 5 * PAGE + 100));
	paint(private + PAGE, PAGE, 5);
	must(lseek(plain, 77, SEEK_SET));
	char way[64];
	snprintf(way, sizeof way, "/proc/self/fd/%d", plain);
	int reader = must(open(way, O_RDONLY)), appender = must(open(way, O_WRONLY | O_APPEND));
	must(fchmod(plain, 0640));
	must(fchown(plain, 1234, 5678));
	char *before = map_fd(r, MAP_PRIVATE, written);
	must(fcntl(written, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SEAL));
	char *after = map_fd(r, MAP_SHARED, written);
	char *writable = map_fd(rw, MAP_SHARED, future);
	must(fcntl(future, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK));
	must(fcntl(late, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL));
	char *read_only = map_fd(r, MAP_SHARED, late);
	char *nowhere = map_fd(rw, MAP_SHARED, only), *code = map_fd(r | PROT_EXEC, MAP_PRIVATE, only);
	close(only);
	must(ftruncate(sparse, 1L << 40));
	must(pwrite(sparse, "in the middle", 14, 1L << 39));
	struct stat stats[2];
	pid_t child = must(fork());
	if (!child) {
		wait_go();
		while (!atomic_load((_Atomic char *)shared))
			nap(MS);
		expect_painted(shared + PAGE, PAGE, 6);
		paint(nowhere + 2 * PAGE, PAGE, 7);
		expect(lseek(plain, 0, SEEK_CUR) == 78);
		return 0;
	}
	shared[0] = 0;
	must(fstat(plain, &stats[0]));
	ready();
	wait_go();
	must(fstat(plain, &stats[1]));
	expect(stats[1].st_size == 5 * PAGE + 100 && stats[1].st_mode == stats[0].st_mode);
	expect(stats[1].st_uid == 1234 && stats[1].st_gid == 5678);
	expect(stats[1].st_mtim.tv_sec == stats[0].st_mtim.tv_sec && stats[1].st_mtim.tv_nsec == stats[0].st_mtim.tv_nsec);
	static char page[PAGE];
	must(read(plain, page, 1));
	expect_painted(private + PAGE, PAGE, 5);
	expect_part(shared, 1, 4, 1);
	paint(shared + PAGE, PAGE, 6);
	must(pread(reader, page, PAGE, PAGE));
	expect_painted(page, PAGE, 6);
	expect_painted(private + PAGE, PAGE, 5);
	expect(write(reader, page, 1) == -1 && errno == EBADF);
	must(write(appender, "end", 3));
	expect(lseek(plain, 0, SEEK_END) == 5 * PAGE + 103);
	must(lseek(plain, 78, SEEK_SET));
	expect(seals(plain) == F_SEAL_SEAL);
	atomic_store((_Atomic char *)shared, 1);
	join_child(child);
	expect_painted(before, SIZE, 2);
	expect_painted(after, SIZE, 2);
	expect(seals(written) == (F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SEAL));
	expect(write(written, "x", 1) == -1 && errno == EPERM);
	expect(mprotect(after, PAGE, rw) == -1 && errno == EACCES);
	expect_painted(writable, SIZE, 3);
	paint(writable, PAGE, 8);
	must(pread(future, page, PAGE, 0));
	expect_painted(page, PAGE, 8);
	expect(seals(future) == (F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK));
	expect(!is_mappable(rw, future) && is_mappable(r, future));
	expect_painted(read_only, SIZE, 9);
	expect(mprotect(read_only, PAGE, rw) == -1 && errno == EACCES);
	expect_painted(nowhere + 2 * PAGE, PAGE, 7);
	expect_painted(code + 2 * PAGE, PAGE, 7);
	must(pread(sparse, page, 14, 1L << 39));
	expect(!strcmp(page, "in the middle"));
	must(fstat(sparse, &stats[0]));
	expect(stats[0].st_size == 1L << 40 && stats[0].st_blocks <= 16, "%ld blocks", (long)stats[0].st_blocks);
	expect(seals(sparse) == 0);
	if (never >= 0) {
		expect(seals(never) == F_SEAL_EXEC, "%#x", seals(never));
		expect(fchmod(never, 0777) == -1 && errno == EPERM);
	}
	return passed();
}

// Mapped files that have been deleted or replaced, and the program itself.
static int deleted(void)
{
	int rw = PROT_READ | PROT_WRITE;
	char program[256];
	ssize_t length = must(readlink("/proc/self/exe", program, sizeof program - 1));
	program[length] = 0;
	if (strcmp(program, in_base("program"))) {
		char command[640];
		snprintf(command, sizeof command, "cp %s program", program);
		expect(system(command) == 0);
		must(execl("./program", "program", "deleted", NULL));
	}
	must(unlink("program"));
	int one = file_of("one", 1), two = file_of("two", 2);
	char *shared = map_fd(rw, MAP_SHARED, one), *again = map_fd(PROT_READ, MAP_SHARED, one);
	char *private = map_fd(rw, MAP_PRIVATE, two);
	close(one);
	const size_t large = 3 << 20; // in memory, so there is no limit
	int shm = must(open("shm", O_RDWR | O_CREAT | O_EXCL, 0600));
	must(ftruncate(shm, large));
	char *memory = must(mmap(NULL, large, rw, MAP_SHARED, shm, 0));
	paint(memory, large, 3);
	paint(private + PAGE, PAGE, 4);
	must(unlink("one"));
	must(unlink("shm"));
	file_of("three", 5);
	must(rename("three", "two"));
	pid_t child = must(fork());
	if (!child) {
		wait_go();
		while (!atomic_load((_Atomic char *)shared))
			nap(MS);
		expect_painted(memory + PAGE, PAGE, 6);
		paint(shared + PAGE, PAGE, 7);
		return 0;
	}
	shared[0] = 0;
	ready();
	wait_go();
	expect_part(again, 1, 15, 1);
	expect_painted(memory, large, 3);
	expect_painted(private, PAGE, 2);
	expect_painted(private + PAGE, PAGE, 4);
	expect_part(private, 2, 14, 2);
	paint(memory + PAGE, PAGE, 6);
	atomic_store((_Atomic char *)shared, 1);
	join_child(child);
	expect_painted(again + PAGE, PAGE, 7);
	static char page[PAGE];
	must(pread(two, page, PAGE, 0));
	expect_painted(page, PAGE, 2);
	must(pread(must(open("two", O_RDONLY)), page, PAGE, 0));
	expect_painted(page, PAGE, 5);
	return passed();
}

// Three generations, of which each has changed a little of what it got from the one before.
static int cow(void)
{
	const size_t large = 16 << 20, kept = 15 << 20;
	int rw = PROT_READ | PROT_WRITE;
	char *area = must(mmap(NULL, large, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	must(madvise(area, large, MADV_NOHUGEPAGE));
	paint(area, large, 1);
	char *file = map_fd(rw, MAP_PRIVATE, file_of("private", 2)), *heap = sbrk(0);
	paint(file, SIZE, 3);
	must((long)sbrk(SIZE));
	paint(heap, SIZE, 4);
	char *wiped = anonymous(0), *later = anonymous(0), *locked = anonymous(0);
	paint(wiped, SIZE, 5);
	paint(later, SIZE, 6);
	paint(locked, SIZE, 7);
	// Zeroes that are there for being locked, and memory that nobody inherits.
	const size_t many = 5 << 20;
	char *pinned = must(mmap(NULL, many, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	char *own = must(mmap(NULL, many, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	paint(pinned, PAGE, 8);
	must(mlock(pinned, many));
	pid_t *pids = map_fd(rw, MAP_SHARED | MAP_ANONYMOUS, -1);
	pid_t first = must(fork());
	if (!first) {
		paint(pinned + PAGE, many - PAGE, 9);
		paint(area + 5 * PAGE, PAGE, 15);
		must(madvise(area + 7 * PAGE, PAGE, MADV_DONTNEED));
		must(munmap(area + kept, large - kept));
		must(mprotect(later, SIZE, PROT_READ));
		must(madvise(wiped, SIZE, MADV_WIPEONFORK)); // it is too late for what it has
		memset(area + 9 * PAGE, 0, PAGE);
		pid_t child = must(fork());
		if (!child) {
			paint(area + 9 * PAGE, 1 << 20, 19);
			must((long)sbrk(-4 * PAGE));
			must(mlock(locked, SIZE));
			must(chdir("/"));
			put_file("grown", "");
		} else {
			pids[2] = child;
		}
		wait_go();
		while (access(in_base("compared"), F_OK))
			nap(MS);
		char *page = must(mmap(NULL, PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		paint(page, PAGE, 1);
		expect(!memcmp(area, page, PAGE));
		expect_painted(area + 5 * PAGE, PAGE, 15);
		expect(!area[7 * PAGE] && area[8 * PAGE]);
		expect_painted(file, SIZE, 3);
		expect_painted(heap, child ? SIZE : 12 * PAGE, 4);
		expect_painted(later, SIZE, 6);
		expect_painted(locked, SIZE, 7);
		expect_painted(pinned, PAGE, 8);
		expect_painted(pinned + PAGE, many - PAGE, 9);
		expect(!own[0] && !memcmp(own, own + 1, many - 1));
		if (!child) {
			expect_painted(wiped, 0, 5);
			expect(!wiped[0]);
			expect_painted(area + 9 * PAGE, 1 << 20, 19);
			return 0;
		}
		expect_painted(wiped, SIZE, 5);
		expect(!area[9 * PAGE]);
		// What one writes the others do not see.
		paint(area, PAGE, 20);
		paint(file, PAGE, 20);
		put_file("written", "");
		join_child(child);
		return 0;
	}
	paint(area + 11 * PAGE, PAGE, 21);
	paint(own, many, 22);
	while (access("grown", F_OK) || !pids[2])
		nap(MS);
	pids[0] = getpid(), pids[1] = first;
	int common[2][8];
	for (int round = 0; round < 2; round++) {
		for (int i = 0, *to = common[round]; i < 2; i++) {
			*to++ = in_common(pids[i], pids[i + 1], area, kept);
			*to++ = in_common(pids[i], pids[i + 1], file, SIZE);
			*to++ = in_common(pids[i], pids[i + 1], heap, 12 * PAGE);
			*to++ = in_common(pids[i], pids[i + 1], locked, SIZE);
		}
		if (round == 0) {
			ready();
			wait_go();
		}
	}
	int *was = common[0], *is = common[1];
	expect(!was[0] || (was[0] == (int)(kept / PAGE) - 4 && was[1] == 16 && was[2] == 12), "%d %d %d", was[0], was[1], was[2]);
	for (int i = 0; i < 8; i++)
		expect(is[i] == was[i], "%d: %d of %d pages are still shared", i, is[i], was[i]);
	put_file("compared", "");
	expect_painted(area + 11 * PAGE, PAGE, 21);
	expect_painted(heap, SIZE, 4);
	expect_painted(own, many, 22);
	expect_painted(pinned, PAGE, 8);
	expect(!pinned[PAGE] && !memcmp(pinned + PAGE, pinned + PAGE + 1, many - PAGE - 1));
	while (access("written", F_OK))
		nap(MS);
	char *page = anonymous(0);
	paint(page, PAGE, 1);
	expect(!memcmp(area, page, PAGE));
	expect_painted(file, SIZE, 3);
	join_child(pids[1]);
	return passed();
}

// Many processes, each with memory of its own beside what it has from the first.
static int crowd(void)
{
	enum { CHILDREN = 7, SPARSE = 3, COMMON = 1280 };
	int rw = PROT_READ | PROT_WRITE;
	char *common = must(mmap(NULL, COMMON * PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (int page = 0; page < COMMON; page++)
		paint(common + page * PAGE, PAGE, 1000 + page);
	int fd = must(open("large", O_RDWR | O_CREAT, 0600));
	must(ftruncate(fd, COMMON * PAGE));
	must(pwrite(fd, common, PAGE, 5 * PAGE));
	char *hiding = must(mmap(NULL, COMMON * PAGE, rw, MAP_PRIVATE, fd, 0));
	memcpy(hiding, common, COMMON * PAGE);
	memset(hiding + 5 * PAGE, 0, PAGE);
	_Atomic int *done = must(mmap(NULL, PAGE, rw, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t children[CHILDREN];
	for (int i = 0; i < CHILDREN; i++) {
		children[i] = must(fork());
		if (children[i])
			continue;
		size_t pages = (i ? 4 + 2 * (i % 4) : 40) * 256 + 1; // the first is the last to be done
		char *own = must(mmap(NULL, pages * PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		for (size_t page = 0; page < pages; page++)
			if (i == SPARSE && page % 2)
				own[page * PAGE] = 0;
			else
				paint(own + page * PAGE, PAGE, 10000 * (i + 1) + page);
		paint(common + i * PAGE, PAGE, i);
		++*done;
		wait_go();
		for (size_t page = 0; page < pages; page++)
			if (i == SPARSE && page % 2)
				expect_empty(own + page * PAGE);
			else
				expect_painted(own + page * PAGE, PAGE, 10000 * (i + 1) + page);
		for (int page = 0; page < COMMON; page++)
			expect_painted(common + page * PAGE, PAGE, page == i ? page : 1000 + page);
		return 0;
	}
	while (*done < CHILDREN)
		nap(MS);
	ready();
	wait_go();
	for (int page = 0; page < COMMON; page++)
		expect_painted(common + page * PAGE, PAGE, 1000 + page);
	expect(!memcmp(hiding, common, 5 * PAGE) && !memcmp(hiding + 6 * PAGE, common + 6 * PAGE, (COMMON - 6) * PAGE));
	expect_empty(hiding + 5 * PAGE);
	for (int i = 0; i < CHILDREN; i++)
		join_child(children[i]);
	return passed();
}

// Transparent huge pages: three that are full, and one of which there is a part.
static int thp(void)
{
	const size_t huge = 2 << 20;
	char *area = must(mmap(NULL, 5 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	area += -(uintptr_t)area % huge;
	must(madvise(area, 4 * huge, MADV_HUGEPAGE));
	paint(area, 3 * huge, 1);
	paint(area + 3 * huge, PAGE, 2);
	char *plain = must(mmap(NULL, 3 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	must(madvise(plain, 3 * huge, MADV_NOHUGEPAGE));
	paint(plain, 3 * huge, 3);
	ready();
	wait_go();
	expect_painted(plain, 3 * huge, 3);
	expect_painted(area, 3 * huge, 1);
	expect_painted(area + 3 * huge, PAGE, 2);
	expect_empty(area + 3 * huge + PAGE);
	return passed();
}

// What a mapping can be, beyond advice; the test sees the flags.
static int properties(void)
{
	pid_t later = must(fork());
	if (!later) {
		locks(MCL_FUTURE, " lo", " lf");
		return 0;
	}
	pid_t now = must(fork());
	if (!now) {
		locks(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT, " lf", NULL);
		return 0;
	}
	struct keys allocated = { 0 };
	int has_keys = keys(&allocated);
	char *sealed = anonymous(0), *sealed_code = anonymous(0);
	paint(sealed, SIZE, 1);
	must(mprotect(sealed_code, SIZE, PROT_READ | PROT_EXEC));
	int seals = !syscall(SYS_mseal, sealed, 4 * PAGE, 0) && !syscall(SYS_mseal, sealed_code, SIZE, 0);
	expect(seals || errno == ENOSYS);
	int rw = PROT_READ | PROT_WRITE;
	char *droppable = mmap(NULL, 8 << 20, rw, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
	if (droppable != MAP_FAILED)
		paint(droppable, 8 << 20, 2); // enough for the fastest way of filling memory
	char *bound = anonymous(0), *interleaved = anonymous(0), *plain = anonymous(0);
	set_policy(bound, MPOL_BIND | MPOL_F_STATIC_NODES, 1);
	set_policy(interleaved, MPOL_INTERLEAVE, 1);
	paint(bound, SIZE, 3);
	int fd = file_of("guarded", 4);
	char *shared = map(rw, MAP_SHARED, fd, 0), *private = map(rw, MAP_PRIVATE, fd, 0);
	const int install = 102;
	// Of files since Linux 6.15.
	int guards = !madvise(shared + 2 * PAGE, PAGE, install) && !madvise(private + 3 * PAGE, PAGE, install);
	expect(guards || errno == EINVAL);
	while (access("locked_on_fault", F_OK) || access("locked_at_once", F_OK))
		nap(MS);
	ready();
	wait_go();
	if (has_keys)
		check_keys(&allocated);
	expect_painted(sealed, SIZE, 1);
	if (seals) {
		expect(munmap(sealed, PAGE) == -1 && errno == EPERM, "the seal is gone");
		expect(mprotect(sealed_code, SIZE, rw) == -1 && errno == EPERM);
		must(munmap(sealed + 4 * PAGE, SIZE - 4 * PAGE));
	}
	if (droppable != MAP_FAILED)
		expect_painted(droppable, 8 << 20, 2);
	expect_policy(bound, MPOL_BIND | MPOL_F_STATIC_NODES, 1);
	expect_policy(interleaved, MPOL_INTERLEAVE, 1);
	expect_policy(plain, MPOL_DEFAULT, 0);
	expect_painted(bound, SIZE, 3);
	if (guards) {
		expect(!kernel_writes(shared + 2 * PAGE) && kernel_writes(shared + 4 * PAGE), "a guard page is gone");
		expect(!kernel_writes(private + 3 * PAGE) && kernel_writes(private + 4 * PAGE));
	}
	join_child(later);
	join_child(now);
	return passed();
}

static long clock_of(int by_vdso)
{
	struct timespec time;
	must(by_vdso ? clock_gettime(CLOCK_MONOTONIC, &time) : syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &time));
	return time.tv_sec * SECOND + time.tv_nsec;
}

// All functions of the vdso, which a program finds when it starts.
static void use_vdso(void)
{
	for (int i = 0; i < 1000; i++) {
		long before = clock_of(0), between = clock_of(1), after = clock_of(0);
		expect(before <= between && between <= after, "%ld %ld %ld", before, between, after);
	}
	struct timeval day;
	struct timespec step;
	must(gettimeofday(&day, NULL));
	must(clock_getres(CLOCK_MONOTONIC, &step));
	unsigned cpu = 1000000, node;
	must(getcpu(&cpu, &node));
	expect(labs(time(NULL) - day.tv_sec) <= 1 && step.tv_sec == 0 && step.tv_nsec > 0 && cpu < 100000);
}

// The test makes the vdso of both another one while they wait.
static int vdso(void)
{
	char *common = anonymous(0);
	paint(common, SIZE, 1);
	use_vdso();
	pid_t child = must(fork());
	ready();
	wait_go();
	use_vdso();
	expect_painted(common, SIZE, 1);
	char *heap = sbrk(0);
	must((long)sbrk(64 << 20));
	paint(heap, 64 << 20, 2);
	expect(deep(1000) == 1000);
	if (!child)
		return 0;
	join_child(child);
	return passed();
}

static char expected[1024];

// Memory that must be named in these words, if this machine has such.
static void hold(void *memory, const char *words)
{
	if (memory != MAP_FAILED)
		snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%lx %s\n", (long)memory, words);
}

static void watch(void)
{
	int uffd = syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY);
	struct uffdio_api api = { .api = UFFD_API };
	char *watched = anonymous(0);
	struct uffdio_register range = { { (unsigned long)watched, SIZE }, UFFDIO_REGISTER_MODE_MISSING, 0 };
	if (uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &range))
		hold(watched, "userfaultfd");
}

static void odd_memory(void)
{
	char room[512] = { 0 };
	int ring = syscall(SYS_io_uring_setup, 4, room);
	hold(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, ring, 0), "io_uring");
	struct perf_event_attr counter = { .type = PERF_TYPE_SOFTWARE, .size = sizeof counter, .config = PERF_COUNT_SW_DUMMY };
	int event = syscall(SYS_perf_event_open, &counter, 0, -1, -1, 0);
	hold(mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, event, 0), "memory of");
	int secret = syscall(SYS_memfd_secret, 0);
	if (secret >= 0 && !ftruncate(secret, PAGE))
		hold(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, secret, 0), "memory of");
	// The memory of a device, which nobody looks at.
	hold(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, open("/dev/mem", O_RDONLY), 0xa0000), "memory of a device");
	hold(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, open("/dev/kvm", O_RDWR), 0), "memory of");
}

// What cannot be restored, and must not suffer from that.
static int refused(void)
{
	unsigned long context = 0;
	must(syscall(SYS_io_setup, 4, &context));
	watch();
	odd_memory();
	put_file("expected", expected);
	int rw = PROT_READ | PROT_WRITE, fd = memfd("twice", MFD_ALLOW_SEALING, 1);
	char *before = map_fd(rw, MAP_SHARED, fd);
	must(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	char *after = map_fd(PROT_READ, MAP_SHARED, fd);
	ready();
	wait_go();
	paint(before, SIZE, 2);
	expect_painted(after, SIZE, 2);
	must(syscall(SYS_io_destroy, context));
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	static const struct { const char *name; int (*run)(void); } parts[] = {
		{ "private", private }, { "files", files }, { "shared", shared }, { "advice", advice }, { "guards", guards },
		{ "properties", properties }, { "sysv", sysv },
		{ "memfds", memfds }, { "deleted", deleted }, { "cow", cow }, { "crowd", crowd }, { "thp", thp }, { "refused", refused }, { "vdso", vdso },
	};
	for (size_t i = 0; i < COUNT(parts); i++)
		if (argc == 2 && !strcmp(parts[i].name, argv[1]))
			return parts[i].run();
	fail("usage");
}
