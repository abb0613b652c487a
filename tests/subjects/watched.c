// Watches memory of its own by a userfaultfd, once there is a file "watch": in the end it knows of each access.
#include "subject.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#define PAGE 4096L
#define PAGES 8
#define FILLED 4

static int uffd;
static char *area, *single;
static char source[PAGE] __attribute__((aligned(4096)));
static atomic_int missing, protected;

static void *map(long pages)
{
	return must(mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

static void put(long page, long mode)
{
	paint(source, PAGE, page);
	struct uffdio_copy copy = { (long)area + page * PAGE, (long)source, PAGE, mode, 0 };
	must(ioctl(uffd, UFFDIO_COPY, &copy));
}

static void protect(char *at, long pages, long mode)
{
	struct uffdio_writeprotect range = { { (long)at, pages * PAGE }, mode };
	must(ioctl(uffd, UFFDIO_WRITEPROTECT, &range));
}

static void *serve(void *unused)
{
	struct uffd_msg message;
	while (must(read(uffd, &message, sizeof message)) == sizeof message) {
		expect(message.event == UFFD_EVENT_PAGEFAULT, "%d", message.event);
		char *at = (char *)(message.arg.pagefault.address & -PAGE);
		if (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
			protected++;
			protect(at, 1, 0);
		} else {
			missing++;
			put((at - area) / PAGE, 0);
		}
	}
	return unused;
}

static void watch(char *at, long pages, long mode)
{
	struct uffdio_register range = { { (long)at, pages * PAGE }, mode, 0 };
	must(ioctl(uffd, UFFDIO_REGISTER, &range));
}

int main(void)
{
	begin();
	char *plain = map(64);
	paint(plain, 64 * PAGE, 1);
	ready();
	while (access(in_base("watch"), F_OK))
		nap(MS);
	uffd = must(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
	struct uffdio_api api = { UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0 };
	must(ioctl(uffd, UFFDIO_API, &api));
	// The smallest there is.
	single = map(1);
	paint(single, PAGE, 77);
	watch(single, 1, UFFDIO_REGISTER_MODE_WP);
	protect(single, 1, UFFDIO_WRITEPROTECT_MODE_WP);
	area = map(PAGES);
	watch(area, PAGES, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
	for (long page = 0; page < FILLED; page++)
		put(page, UFFDIO_COPY_MODE_WP);
	pthread_t server;
	zero(pthread_create(&server, NULL, serve, NULL));
	char at[64];
	snprintf(at, sizeof at, "%lx %lx", (long)single, (long)area);
	put_file("watching", at);
	wait_go();
	// Nobody else has touched any of it, and all is still watched.
	expect(missing == 0 && protected == 0, "%d %d", missing, protected);
	for (long page = 0; page < PAGES; page++)
		expect_painted(area + page * PAGE, PAGE, page);
	expect(missing == PAGES - FILLED && protected == 0, "%d %d", missing, protected);
	for (long page = 0; page < FILLED; page++)
		area[page * PAGE]++;
	single[0]++;
	expect(missing == PAGES - FILLED && protected == FILLED + 1, "%d %d", missing, protected);
	single[0]--;
	expect_painted(single, PAGE, 77);
	expect_painted(plain, 64 * PAGE, 1);
	return passed();
}
