// Every register holds a value of its own while the checkpoint is made: in a loop ("spin") or in a system call
// ("call"), with AVX-512 if the machine has it ("512") or the lower halves only. And AMX tiles ("tiles").
#include "subject.h"
#include <asm/prctl.h>

uint8_t in_zmm[32][64], out_zmm[32][64];
uint64_t in_k[8], out_k[8];
long double in_x87[8], out_x87[8];
uint64_t out_gpr[16];
uint32_t mxcsr = 0x1fc0 | 2 << 13, out_mxcsr, go_on; // flush to zero off, round up, DAZ on
uint16_t fcw = 0x077f, out_fcw; // round up
uint64_t out_flags;
struct timespec length = { 1, 0 };

#define LOW "0,1,2,3,4,5,6,7"
#define MIDDLE "8,9,10,11,12,13,14,15"
#define HIGH "16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"

// What both ways in share: all registers but the stack pointer, then `body`, then everything out again.
#define FUNCTION(name, load, body, store)                                                          \
	asm(".text\n" #name ":\n"                                                                  \
	    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n" load              \
	    "fninit\nfldcw fcw(%rip)\n"                                                            \
	    ".irp i," LOW "\nfldt in_x87+16*\\i(%rip)\n.endr\n"                                    \
	    "ldmxcsr mxcsr(%rip)\n"                                                                \
	    "movabs $0x1111111111110001,%rax\nmovabs $0x1111111111110002,%rbx\n"                   \
	    "movabs $0x1111111111110003,%rcx\nmovabs $0x1111111111110004,%rdx\n"                   \
	    "movabs $0x1111111111110005,%rsi\nmovabs $0x1111111111110006,%rdi\n"                   \
	    "movabs $0x1111111111110007,%rbp\n"                                                    \
	    ".irp i,8,9,10,11,12,13,14,15\nmovabs $0x1111111111110000+\\i,%r\\i\n.endr\n"          \
	    "std\n" body                                                                           \
	    "mov %rax,out_gpr(%rip)\nmov %rbx,out_gpr+8(%rip)\nmov %rcx,out_gpr+16(%rip)\n"        \
	    "mov %rdx,out_gpr+24(%rip)\nmov %rsi,out_gpr+32(%rip)\nmov %rdi,out_gpr+40(%rip)\n"    \
	    "mov %rbp,out_gpr+48(%rip)\n"                                                          \
	    ".irp i,8,9,10,11,12,13,14,15\nmov %r\\i,out_gpr+8*\\i(%rip)\n.endr\n"                 \
	    "pushfq\npop %rax\nmov %rax,out_flags(%rip)\ncld\n"                                    \
	    "stmxcsr out_mxcsr(%rip)\nfnstcw out_fcw(%rip)\n"                                      \
	    ".irp i," LOW "\nfstpt out_x87+16*(7-\\i)(%rip)\n.endr\n" store                        \
	    "fninit\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");          \
	void name(void)

#define LOAD_256 ".irp i," LOW "," MIDDLE "\nvmovdqu in_zmm+64*\\i(%rip),%ymm\\i\n.endr\n"
#define STORE_256 ".irp i," LOW "," MIDDLE "\nvmovdqu %ymm\\i,out_zmm+64*\\i(%rip)\n.endr\nvzeroupper\n"
#define LOAD_512                                                                                   \
	".irp i," LOW "," MIDDLE "," HIGH "\nvmovdqu64 in_zmm+64*\\i(%rip),%zmm\\i\n.endr\n"       \
	".irp i," LOW "\nkmovq in_k+8*\\i(%rip),%k\\i\n.endr\n"
#define STORE_512                                                                                  \
	".irp i," LOW "," MIDDLE "," HIGH "\nvmovdqu64 %zmm\\i,out_zmm+64*\\i(%rip)\n.endr\n"      \
	".irp i," LOW "\nkmovq %k\\i,out_k+8*\\i(%rip)\n.endr\nvzeroupper\n"
#define SPIN "1: cmpl $0,go_on(%rip)\nje 1b\n"
#define CALL "mov $35,%eax\nlea length(%rip),%rdi\nxor %esi,%esi\nsyscall\n"

FUNCTION(spin_256, LOAD_256, SPIN, STORE_256);
FUNCTION(call_256, LOAD_256, CALL, STORE_256);
FUNCTION(spin_512, LOAD_512, SPIN, STORE_512);
FUNCTION(call_512, LOAD_512, CALL, STORE_512);

static void *herald(void *unused)
{
	nap(50 * MS); // the registers are loaded by now
	ready();
	wait_go();
	*(volatile uint32_t *)&go_on = 1;
	return unused;
}

enum { TILES = 8, ROWS = 16, TILE_ROW = 64, TILE_DATA = 18 };

#define EACH_TILE(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7)
#define LOAD_TILE(i) asm volatile("tileloadd (%0,%1,1),%%tmm" #i ::"r"(in[i]), "r"((long)TILE_ROW) : "memory");
#define STORE_TILE(i) asm volatile("tilestored %%tmm" #i ",(%0,%1,1)" ::"r"(out[i]), "r"((long)TILE_ROW) : "memory");

struct tile_config {
	uint8_t palette, start_row, reserved[14];
	uint16_t columns[16];
	uint8_t rows[16];
};

// Thread 0 spins, thread 1 sleeps; each has tiles of its own, of another shape.
static void *use_tiles(void *number)
{
	long me = (long)number;
	static uint8_t all[2][2][TILES][ROWS][TILE_ROW];
	uint8_t(*in)[ROWS][TILE_ROW] = all[me][0], (*out)[ROWS][TILE_ROW] = all[me][1];
	struct tile_config config = { .palette = 1 }, after;
	for (int i = 0; i < TILES; i++) {
		config.columns[i] = TILE_ROW;
		config.rows[i] = ROWS - me;
	}
	paint(in, sizeof all[0][0], me);
	asm volatile("ldtilecfg %0" ::"m"(config));
	EACH_TILE(LOAD_TILE)
	while (!*(volatile uint32_t *)&go_on)
		if (me)
			nap(10 * MS);
	EACH_TILE(STORE_TILE)
	asm volatile("sttilecfg %0" : "=m"(after));
	asm volatile("tilerelease");
	expect(!memcmp(&config, &after, sizeof config), "the shape of tiles");
	for (int i = 0; i < TILES; i++)
		expect(!memcmp(in[i], out[i], (ROWS - me) * TILE_ROW), "tile %d of thread %ld", i, me);
	return number;
}

static int tiles(void)
{
	if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA))
		skip("no AMX");
	pthread_t threads[2];
	for (long i = 0; i < 2; i++)
		zero(pthread_create(&threads[i], NULL, use_tiles, (void *)i));
	herald(NULL);
	for (int i = 0; i < 2; i++)
		zero(pthread_join(threads[i], NULL));
	uint64_t permitted;
	must(syscall(SYS_arch_prctl, 0x1022 /* ARCH_GET_XCOMP_PERM */, &permitted));
	expect(permitted >> TILE_DATA & 1);
	go_on = 1;
	use_tiles((void *)0); // permitted still
	return passed();
}

int main(int argc, char **argv)
{
	begin();
	expect(argc == 2, "usage");
	if (!strcmp(argv[1], "tiles"))
		return tiles();
	int wide = strstr(argv[1], "512") != NULL, call = strstr(argv[1], "call") != NULL;
	if (wide && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")))
		skip("no AVX-512");
	paint(in_zmm, sizeof in_zmm, 1);
	paint(in_k, sizeof in_k, 2);
	for (int i = 0; i < 8; i++)
		in_x87[i] = 1.0L / (i + 3);
	static char place[8];
	must(syscall(SYS_arch_prctl, ARCH_SET_GS, place));
	pthread_t thread;
	zero(pthread_create(&thread, NULL, herald, NULL));

	void (*functions[])(void) = { spin_256, call_256, spin_512, call_512 };
	functions[wide * 2 + call]();

	zero(pthread_join(thread, NULL));
	int vectors = wide ? 32 : 16, bytes = wide ? 64 : 32;
	for (int i = 0; i < vectors; i++)
		expect(!memcmp(in_zmm[i], out_zmm[i], bytes), "vector register %d", i);
	for (int i = 0; wide && i < 8; i++)
		expect(in_k[i] == out_k[i], "k%d is %llx", i, (long long)out_k[i]);
	for (int i = 0; i < 8; i++)
		expect(in_x87[i] == out_x87[i], "st%d", i);
	expect(out_mxcsr == mxcsr, "%x", out_mxcsr);
	expect(out_fcw == fcw, "%x", out_fcw);
	expect(out_flags & 0x400, "direction flag: %llx", (long long)out_flags);
	// rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 ...; a system call uses rax, rcx, rsi, rdi and r11.
	for (int i = 0; i < 16; i++) {
		int used = call && (i == 0 || i == 2 || i == 4 || i == 5 || i == 11);
		uint64_t want = 0x1111111111110000ull + (i < 7 ? i + 1 : i);
		if (i != 7 && !used)
			expect(out_gpr[i] == want, "general register %d is %llx", i, (long long)out_gpr[i]);
	}
	expect(!call || out_gpr[0] == 0, "nanosleep gave %lld", (long long)out_gpr[0]);
	void *gs;
	must(syscall(SYS_arch_prctl, ARCH_GET_GS, &gs));
	expect(gs == place, "%p", gs);
	return passed();
}
