// Counts without any system call, as fast as it can.
#include "subject.h"

int main(void)
{
	begin();
	volatile uint64_t count = 0, sum = 0;
	ready();
	do {
		for (int i = 0; i < 100000; i++) {
			count++;
			sum += count;
		}
	} while (!gone_yet());
	expect(sum == (count % 2 ? (count + 1) / 2 * count : count / 2 * (count + 1)), "%llu of %llu", (long long)sum, (long long)count);
	return passed();
}
