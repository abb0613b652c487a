//! What the functions of a vdso are replaced with where the kernel has another one: a way to the same function of that,
//! or the system call that each of them is a faster form of.

/// System calls with the arguments of their functions.
const CALLS: [(&[u8], i64); 6] = [
    (b"clock_gettime", libc::SYS_clock_gettime),
    (b"gettimeofday", libc::SYS_gettimeofday),
    (b"time", libc::SYS_time),
    (b"clock_getres", libc::SYS_clock_getres),
    (b"getcpu", libc::SYS_getcpu),
    (b"getrandom", libc::SYS_getrandom),
];

/// No replacement is longer.
pub(crate) const ENTRY_MAX: usize = 14;

/// Code for the beginning of this function; `there` is where the other vdso has it.
pub(crate) fn entry(function: &[u8], there: Option<u64>) -> Vec<u8> {
    let plain = function.strip_prefix(b"__vdso_").unwrap_or(function);
    let call = CALLS.iter().find(|(name, _)| *name == plain).map(|(_, number)| *number);
    match (there, call) {
        // What getrandom() keeps in the program's memory is laid out as its own kernel wants it.
        (Some(address), _) if plain != b"getrandom" => {
            // jmp *(%rip), and the address
            [&b"\xff\x25\0\0\0\0"[..], &address.to_le_bytes()].concat()
        }
        // mov $number, %eax; syscall; ret
        (_, Some(number)) => [b"\xb8", &(number as u32).to_le_bytes()[..], b"\x0f\x05\xc3"].concat(),
        // mov $-ENOSYS, %rax; ret
        (_, None) => [b"\x48\xc7\xc0", &(-libc::ENOSYS).to_le_bytes()[..], b"\xc3"].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_fit() {
        let way = entry(b"__vdso_time", Some(0x7fff_1234_5678));
        assert_eq!(way, b"\xff\x25\0\0\0\0\x78\x56\x34\x12\xff\x7f\0\0");
        assert_eq!(entry(b"time", None), b"\xb8\xc9\0\0\0\x0f\x05\xc3");
        assert_eq!(entry(b"__vdso_getrandom", Some(1)), entry(b"getrandom", None));
        assert_eq!(entry(b"__vdso_sgx_enter_enclave", None), b"\x48\xc7\xc0\xda\xff\xff\xff\xc3");
        assert!(way.len() <= ENTRY_MAX);
    }
}
