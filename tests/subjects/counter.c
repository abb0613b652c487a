// Counts without any system call, as fast as it can; with a number, beside so many MiB of memory that is full, and
// with a second one, a limit on descriptors; with a third, so many MiB more, of zeroes that were written; with a fourth
// word, no signal is one that it ignores; with a fifth, every other page of the memory is empty.
#include "subject.h"
#include <sys/resource.h>

static int every_other;

static uint64_t word(size_t place)
{
	return every_other && place >> 9 & 1 ? 0 : (place + 1) * 0x9e3779b97f4a7c15;
}

static void heed(int signal)
{
	(void)signal;
}

int main(int argc, char **argv)
{
	begin();
	volatile uint64_t count = 0, sum = 0;
	every_other = argc > 5;
	size_t words = argc > 1 ? (size_t)atoi(argv[1]) << 17 : 0;
	uint64_t *memory = aligned_alloc(4096, (words + 512) * sizeof *memory);
	for (size_t i = 0; i < words; i++)
		memory[i] = word(i);
	size_t empty = argc > 3 ? (size_t)atoi(argv[3]) << 20 : 0;
	volatile char *zeroes = calloc(empty + 1, 1);
	for (size_t i = 0; i < empty; i += 4096)
		zeroes[i] = 0;
	if (argc > 2)
		must(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ (rlim_t)atoi(argv[2]), (rlim_t)atoi(argv[2]) }));
	for (int signal = 1; argc > 4 && signal < 32; signal++)
		sigaction(signal, &(struct sigaction){ .sa_handler = heed, .sa_flags = SA_RESTART }, NULL);
	ready();
	do {
		for (int i = 0; i < 100000; i++) {
			count++;
			sum += count;
		}
	} while (!gone_yet());
	expect(sum == (count % 2 ? (count + 1) / 2 * count : count / 2 * (count + 1)), "%llu of %llu", (long long)sum, (long long)count);
	for (size_t i = 0; i < words; i++)
		expect(memory[i] == word(i), "word %zu", i);
	for (size_t i = 0; i < empty; i++)
		expect(!zeroes[i], "zero %zu", i);
	return passed();
}
