/* The least that a process can be: one page of contents, as benches/table/subject.rs fills it, and a wait. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

static uint64_t contents[512];

int main(void)
{
	setsid();
	close_range(3, ~0u, 0);
	for (uint64_t place = 0; place < 512; place++) {
		uint64_t mixed = (place + 1) * 0x9e3779b97f4a7c15u;
		contents[place] = (mixed ^ mixed >> 32) * 0xd6e8feb86659fd93u ^ mixed >> 29;
	}
	printf("%lu\n", (unsigned long)contents);
	fflush(stdout);
	dup2(0, 1);
	for (;;)
		pause();
}
