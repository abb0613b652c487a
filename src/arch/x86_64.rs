//! x86_64: registers, the batch loop, signal frames, the stub program.
#![allow(unsafe_code)]

use std::arch::global_asm;

use super::Cpu;
use crate::sys::ptrace::SigMask;

/// The general registers, in the kernel's `user_regs_struct`.
pub(crate) type Regs = libc::user_regs_struct;

/// The register set number of the whole extended state (elf.h).
pub(crate) const NT_X86_XSTATE: u32 = 0x202;

/// Room for the extended state of any processor so far (AMX makes 11,008 bytes).
pub(crate) const XSTATE_MAX: usize = 16 * 1024;

/// Length of the `syscall` instruction.
pub(crate) const SYSCALL_LEN: u64 = 2;

/// The bytes of the `syscall` instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Words of one batch entry: number, six arguments, result.
pub(crate) const ENTRY_WORDS: usize = 8;

/// The number of the batch entry that is no system call but the sums of pages: their address, where the sums go (a
/// `u32` each), how many pages.
pub(crate) const SUM_PAGES: i64 = -1;

/// The sums of `rdx` pages at `rdi`, to `rsi`. Four pages are summed up at the same time: the instruction takes three
/// cycles but can begin in each, and of each page the processor fetches ahead what comes next.
macro_rules! sum_pages {
    () => {
        "6: cmp rdx, 4
        jb 8f
        or r8d, -1
        or r9d, -1
        or r10d, -1
        or r11d, -1
        mov ecx, 512
        7: crc32 r8, qword ptr [rdi]
        crc32 r9, qword ptr [rdi + 4096]
        crc32 r10, qword ptr [rdi + 8192]
        crc32 r11, qword ptr [rdi + 12288]
        add rdi, 8
        dec ecx
        jnz 7b
        not r8d
        not r9d
        not r10d
        not r11d
        mov [rsi], r8d
        mov [rsi + 4], r9d
        mov [rsi + 8], r10d
        mov [rsi + 12], r11d
        add rsi, 16
        add rdi, 12288
        sub rdx, 4
        jmp 6b
        8: test rdx, rdx
        jz 9f
        or r8d, -1
        mov ecx, 512
        7: crc32 r8, qword ptr [rdi]
        add rdi, 8
        dec ecx
        jnz 7b
        not r8d
        mov [rsi], r8d
        add rsi, 4
        dec rdx
        jmp 8b
        9:"
    };
}

// The code that runs inside a task. `rbx` walks the entries, `r12` is the first address after them.
// The last entry of every batch stops the task; whoever lets it run on after that (because the tracer
// is gone) returns to the interrupted program through the signal frame at `rsp`.
global_asm!(
    ".pushsection .rodata.cryosleep,\"a\",@progbits",
    ".globl __cryosleep_code",
    ".hidden __cryosleep_code",
    ".globl __cryosleep_code_end",
    ".hidden __cryosleep_code_end",
    "__cryosleep_code:",
    "syscall",
    "2: mov eax, 15", // rt_sigreturn
    "syscall",
    "ud2",
    ".balign 16, 0x90",
    // One tile instruction: the kernel then gives the thread room for tile data (r13: a tile configuration).
    "ldtilecfg [r13]",
    "tilezero tmm0",
    ".balign 16, 0x90",
    "3: cmp rbx, r12",
    "jae 2b",
    "mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "test rax, rax",
    "js 5f",
    "syscall",
    "4: mov [rbx + 56], rax",
    "add rbx, 64",
    "jmp 3b",
    ".globl __cryosleep_loop_end",
    ".hidden __cryosleep_loop_end",
    "__cryosleep_loop_end:",
    "5:",
    sum_pages!(),
    "xor eax, eax",
    "jmp 4b",
    "__cryosleep_code_end:",
    ".popsection",
    // The same for our own pages, as a function of C: pages, sums, count.
    ".pushsection .text.cryosleep,\"ax\",@progbits",
    ".globl __cryosleep_sum_pages",
    ".hidden __cryosleep_sum_pages",
    ".type __cryosleep_sum_pages, @function",
    "__cryosleep_sum_pages:",
    sum_pages!(),
    "ret",
    ".popsection",
);

// Process 1 of a pid namespace, in the stub program: gives back the memory that it was made with (the registers
// are those of the munmap), and waits for children until the one in `r12` has ended, whose status it passes on.
global_asm!(
    ".pushsection .rodata.cryosleep,\"a\",@progbits",
    ".globl __cryosleep_init",
    ".hidden __cryosleep_init",
    ".globl __cryosleep_init_end",
    ".hidden __cryosleep_init_end",
    "__cryosleep_init:",
    "syscall",
    "2: mov eax, 61", // wait4
    "mov edi, -1",
    "lea rsi, [rip + 5f]",
    "mov edx, 0x40000000", // __WALL
    "xor r10d, r10d",
    "syscall",
    "cmp eax, -10", // ECHILD
    "je 3f",
    "cmp eax, r12d",
    "jne 2b",
    "mov edi, [rip + 5f]",
    "mov eax, edi",
    "shr edi, 8",
    "and eax, 0x7f",
    "jz 4f",
    "lea edi, [eax + 128]", // ended by a signal, as a shell says it
    "jmp 4f",
    "3: mov edi, 255",
    "4: and edi, 0xff",
    "mov eax, 231", // exit_group
    "syscall",
    "ud2",
    "5: .long 0",
    "__cryosleep_init_end:",
    ".popsection",
);

unsafe extern "C" {
    static __cryosleep_code: u8;
    static __cryosleep_loop_end: u8;
    static __cryosleep_code_end: u8;
    static __cryosleep_init: u8;
    static __cryosleep_init_end: u8;
}

/// Has the processor the instruction by which tasks sum up their pages?
pub(crate) fn can_sum() -> bool {
    std::arch::is_x86_feature_detected!("sse4.2")
}

/// The position-independent code of a process 1.
fn init() -> &'static [u8] {
    let (start, end) = (&raw const __cryosleep_init, &raw const __cryosleep_init_end);
    // SAFETY: both symbols bound one read-only object, assembled above.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// The position-independent code that runs inside a task: a bare `syscall`, the way back, the batch loop.
pub(crate) fn code() -> &'static [u8] {
    let (start, end) = (&raw const __cryosleep_code, &raw const __cryosleep_code_end);
    // SAFETY: both symbols bound one read-only object, assembled above.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// Offset of the batch loop in [`code`]; the bare `syscall` is at 0.
pub(crate) const LOOP: u64 = 32;

/// Offset of the loop's end.
fn loop_end() -> u64 {
    let (start, end) = (&raw const __cryosleep_code, &raw const __cryosleep_loop_end);
    // SAFETY: both symbols are in one read-only object, assembled above.
    unsafe { end.offset_from(start) as u64 }
}

/// Offset in [`code`] of a use of AMX tiles that goes on into the batch loop.
pub(crate) const USE_TILES: u64 = 16;

/// The xcr0 bit of AMX tile data, the only feature so far that needs permission.
pub(crate) const TILE_DATA: u64 = 18;

/// The smallest tile configuration: palette 1, tile 0 of one row and four bytes.
pub(crate) fn tile_configuration() -> [u8; 64] {
    let mut configuration = [0; 64];
    (configuration[0], configuration[16], configuration[48]) = (1, 4, 1);
    configuration
}

/// Kernel-internal results of an interrupted system call (linux/errno.h).
pub(crate) mod restart {
    pub(crate) const SYS: i64 = -512;
    pub(crate) const NOINTR: i64 = -513;
    pub(crate) const NOHAND: i64 = -514;
    pub(crate) const BLOCK: i64 = -516;
}

/// What the engine asks of a register set.
pub(crate) trait RegsExt {
    /// Was the task inside a system call when it stopped? Its number.
    fn interrupted_call(&self) -> Option<i64>;
    fn result(&self) -> i64;
    fn set_result(&mut self, result: i64);
    fn stack_pointer(&self) -> u64;
    fn pc(&self) -> u64;
    fn args(&self) -> [u64; 6];
    fn set_args(&mut self, args: [u64; 6]);
    /// Sets the registers up to run the entries from `table` to `end` by the loop in the code at `code`.
    fn enter_loop(&mut self, code: u64, table: u64, end: u64, stack: u64);
    /// The entries that the loop in the code at `code`, which these registers are in, has yet to execute.
    fn left_in_loop(&self, code: u64) -> std::ops::Range<u64>;
    /// From [`RegsExt::enter_loop`], but with a use of AMX tiles first, by the configuration at this address.
    fn enter_through_tiles(&mut self, configuration: u64);
    /// Sets the registers up to execute one system call by the instruction at `pc`.
    fn enter_call(&mut self, pc: u64, number: i64, args: [u64; 6], stack: u64);
    /// Sets the registers up to become process 1 of a pid namespace, by the code in the stub program at `stub`:
    /// it needs no other memory of ours, and waits for `root`.
    fn enter_init(&mut self, stub: u64, unneeded: std::ops::Range<u64>, root: u32);
    /// What the kernel would make of an interrupted call on the way back: the call again, from the start.
    fn rewound(&self) -> Self;
    /// The registers as plain words, in the kernel's order.
    fn to_words(&self) -> [u64; REG_WORDS];
    fn from_words(words: [u64; REG_WORDS]) -> Self;
}

/// Words of [`Regs`].
pub(crate) const REG_WORDS: usize = 27;

impl RegsExt for Regs {
    fn interrupted_call(&self) -> Option<i64> {
        let number = self.orig_rax as i64;
        (number >= 0).then_some(number)
    }

    fn result(&self) -> i64 {
        self.rax as i64
    }

    fn set_result(&mut self, result: i64) {
        self.rax = result as u64;
    }

    fn stack_pointer(&self) -> u64 {
        self.rsp
    }

    fn pc(&self) -> u64 {
        self.rip
    }

    fn args(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9]
    }

    fn set_args(&mut self, args: [u64; 6]) {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9] = args;
    }

    fn enter_loop(&mut self, code: u64, table: u64, end: u64, stack: u64) {
        // No orig_rax and a plain rax: the kernel must not take this for a call to restart.
        (self.orig_rax, self.rax) = (u64::MAX, 0);
        (self.rbx, self.r12, self.rsp) = (table, end, stack);
        self.rip = code + LOOP;
        // A target may have been stopped with the direction or trap flag set.
        self.eflags &= !0x500;
    }

    fn left_in_loop(&self, code: u64) -> std::ops::Range<u64> {
        // The loop ends in `mov [rbx + 56], rax` and `add rbx, 64`, of 4 bytes each, and a jump of 2.
        let end = code + loop_end();
        let called = (end - 10..end - 5).contains(&self.rip);
        let next = if called { self.rbx.wrapping_add(ENTRY_WORDS as u64 * 8) } else { self.rbx };
        next..self.r12
    }

    fn enter_through_tiles(&mut self, configuration: u64) {
        self.rip -= LOOP - USE_TILES;
        self.r13 = configuration;
    }

    fn enter_call(&mut self, pc: u64, number: i64, args: [u64; 6], stack: u64) {
        self.enter_loop(pc, 0, 0, stack);
        (self.rip, self.rax) = (pc, number as u64);
        self.set_args(args);
    }

    fn enter_init(&mut self, stub: u64, unneeded: std::ops::Range<u64>, root: u32) {
        let length = unneeded.end - unneeded.start;
        let code = stub + STUB_HEADERS + STUB_PAUSE.len() as u64;
        self.enter_call(code, libc::SYS_munmap, [unneeded.start, length, 0, 0, 0, 0], 0);
        self.r12 = u64::from(root);
    }

    fn rewound(&self) -> Self {
        let mut regs = *self;
        if let (Some(number), restart::BLOCK | restart::NOHAND | restart::NOINTR | restart::SYS) =
            (self.interrupted_call(), self.result())
        {
            regs.rax = number as u64;
            regs.rip -= SYSCALL_LEN;
        }
        regs.orig_rax = u64::MAX;
        regs
    }

    fn to_words(&self) -> [u64; REG_WORDS] {
        let r = self;
        [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
            r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs,
            r.gs,
        ]
    }

    fn from_words(words: [u64; REG_WORDS]) -> Self {
        let [
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            orig_rax,
            rip,
            cs,
            eflags,
            rsp,
            ss,
            fs_base,
            gs_base,
            ds,
            es,
            fs,
            gs,
        ] = words;
        Self {
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            orig_rax,
            rip,
            cs,
            eflags,
            rsp,
            ss,
            fs_base,
            gs_base,
            ds,
            es,
            fs,
            gs,
        }
    }
}

/// Bytes below the stack pointer that the ABI lets a function use without moving it.
pub(crate) const RED_ZONE: u64 = 128;

/// The code segment of 64-bit programs; anything else is a 32-bit task.
pub(crate) const CS_64: u64 = 0x33;

const XSAVE_HEADER: usize = 512;
const XSAVE_AREA: usize = 576;
const SW_RESERVED: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// The features (xcr0 bits) that an extended state really uses.
pub(crate) fn xstate_in_use(xstate: &[u8]) -> u64 {
    word(xstate, XSAVE_HEADER)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// Length of the standard-format area that holds these features.
fn xstate_len(features: u64) -> usize {
    let components = Cpu::here().components.iter();
    components
        .filter(|[bit, ..]| features >> bit & 1 == 1)
        .map(|[_, size, offset]| (offset + size) as usize)
        .fold(XSAVE_AREA, usize::max)
}

/// How much of an extended state, in bytes, holds anything: what follows are zeroes.
pub(crate) fn xstate_used_len(xstate: &[u8]) -> usize {
    let words = xstate.rchunks_exact(8);
    let zeroes = words.take_while(|word| **word == [0; 8]).count() * 8;
    (xstate.len() - zeroes).max(XSAVE_AREA.min(xstate.len()))
}

/// A signal frame: the bytes and where the stack pointer must be for `rt_sigreturn` to use it.
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    pub(crate) stack_pointer: u64,
}

/// Room that a frame takes at most.
pub(crate) const FRAME_MAX: u64 = XSTATE_MAX as u64 + 1024;

/// Builds at `base` (64-byte aligned) the frame through which `rt_sigreturn` brings back everything that
/// a batch changes: registers, signal mask, extended state. The alternate stack stays as it is.
pub(crate) fn signal_frame(base: u64, regs: &Regs, mask: SigMask, xstate: &[u8]) -> Frame {
    /// Words from the frame's start to its `siginfo`, which is not needed on the way back.
    const WORDS: usize = 64;
    /// Not a mode that sigaltstack(2) knows: the kernel leaves the alternate stack alone.
    const KEEP_ALTSTACK: u64 = 0x7777;
    /// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    const FLAGS: u64 = 7;

    let features = xstate_in_use(xstate) | 3;
    let len = xstate_len(features).min(xstate.len());
    let fpstate = base + (WORDS * 8) as u64;
    let r = regs.rewound();
    let segments = r.cs & 0xffff | (r.ss & 0xffff) << 48;
    let mut words = vec![0, FLAGS, 0, 0, KEEP_ALTSTACK, 0];
    words.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx]);
    words.extend([r.rax, r.rcx, r.rsp, r.rip, r.eflags, segments, 0, 0, 0, 0, fpstate]);
    words.extend([0; 8]);
    words.push(mask.0);
    words.resize(WORDS, 0);

    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(xstate.get(..len).unwrap_or_default());
    let software = (WORDS * 8 + SW_RESERVED)..(WORDS * 8 + XSAVE_HEADER);
    if let Some(area) = bytes.get_mut(software) {
        area.fill(0);
        area[..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_ne_bytes());
        area[4..8].copy_from_slice(&(len as u32 + 4).to_ne_bytes());
        area[8..16].copy_from_slice(&features.to_ne_bytes());
        area[16..20].copy_from_slice(&(len as u32).to_ne_bytes());
    }
    bytes.extend_from_slice(&FP_XSTATE_MAGIC2.to_ne_bytes());
    // rt_sigreturn expects the handler's `ret` to have taken the first word off the stack.
    Frame { bytes, stack_pointer: base + 8 }
}

/// The number that a system call instruction just before `pc` was given, when the code shows it:
/// `mov eax, imm32` or `mov rax, imm32` right before it. `text` ends at `pc`.
pub(crate) fn call_number_before(text: &[u8]) -> Option<i64> {
    let before = text.strip_suffix(&SYSCALL)?;
    let (rest, number) = before.split_last_chunk::<4>()?;
    (rest.ends_with(&[0xb8]) || rest.ends_with(&[0x48, 0xc7, 0xc0]))
        .then(|| i64::from(u32::from_ne_bytes(*number)))
        .filter(|number| *number < 1024)
}

const STUB_HEADERS: u64 = 64 + 2 * 56;

/// mov eax, 34 (pause); syscall; jmp back
const STUB_PAUSE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

/// The smallest program: one page that pauses for ever (or becomes process 1, when told), and `room` bytes of zeroes
/// behind it, all of it writable and executable, at `base`.
pub(crate) fn stub_program(base: u64, room: u64) -> Vec<u8> {
    const ET_EXEC_X86_64_V1: u64 = 2 | 62 << 16 | 1 << 32;
    const EHSIZE_PHENTSIZE_PHNUM: u64 = 64 << 32 | 56 << 48;
    const PT_LOAD_RWX: u64 = 1 | 7 << 32;
    const PT_GNU_STACK_RW: u64 = 0x6474_e551 | 6 << 32;

    let mut program = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let length = STUB_HEADERS + (STUB_PAUSE.len() + init().len()) as u64;
    let header = [ET_EXEC_X86_64_V1, base + STUB_HEADERS, 64, 0, EHSIZE_PHENTSIZE_PHNUM, 2];
    let load = [PT_LOAD_RWX, 0, base, base, length, crate::sys::PAGE + room, crate::sys::PAGE];
    let stack = [PT_GNU_STACK_RW, 0, 0, 0, 0, 0, 16];
    let words = header.iter().chain(&load).chain(&stack);
    program.extend(words.flat_map(|word| word.to_ne_bytes()));
    program.extend(STUB_PAUSE);
    program.extend(init());
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::page_sum;
    use crate::sys::PAGE;

    #[test]
    fn code_is_where_the_constants_say() {
        assert_eq!(code()[..2], SYSCALL);
        assert_eq!(code()[2], 0xb8);
        assert_eq!(code()[LOOP as usize..][..3], [0x4c, 0x39, 0xe3]);
        assert!(code().len() < 256);
        let end = loop_end() as usize;
        // mov [rbx + 56], rax; add rbx, 64; jmp
        assert_eq!(code()[end - 10..end - 1], [0x48, 0x89, 0x43, 56, 0x48, 0x83, 0xc3, 64, 0xeb]);
    }

    #[test]
    fn tasks_sum_up_as_we_do() {
        unsafe extern "C" {
            fn __cryosleep_sum_pages(pages: *const u8, sums: *mut u32, count: usize);
        }
        assert!(can_sum());
        let mut pages = [[0; PAGE as usize]; 11];
        for (at, byte) in pages.as_flattened_mut().iter_mut().enumerate() {
            *byte = ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8;
        }
        for count in 0..=pages.len() {
            let expected: Vec<u32> = pages[..count].iter().map(|page| page_sum(page)).collect();
            let mut sums = vec![0; count];
            // SAFETY: the processor knows the instruction, and there are so many pages, and room for so many sums.
            unsafe { __cryosleep_sum_pages(pages.as_ptr().cast(), sums.as_mut_ptr(), count) };
            assert_eq!(sums, expected);
        }
    }

    #[test]
    fn number_before_a_call() {
        assert_eq!(call_number_before(&[0xb8, 0xe6, 0, 0, 0, 0x0f, 0x05]), Some(230));
        assert_eq!(call_number_before(&[0x48, 0xc7, 0xc0, 35, 0, 0, 0, 0x0f, 0x05]), Some(35));
        assert_eq!(call_number_before(&[0x48, 0x89, 0xf8, 0x0f, 0x05]), None);
        assert_eq!(call_number_before(&[]), None);
    }

    #[test]
    fn stub_is_an_elf_of_the_right_size() {
        let program = stub_program(0x10_0000, 0x1000);
        assert_eq!(program.len(), 64 + 2 * 56 + 9 + init().len());
        assert!(program.len() < 512);
        assert_eq!(&program[..4], b"\x7fELF");
    }
}
