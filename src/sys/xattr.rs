//! Extended attributes: xattr(7), by path.

use std::ffi::CStr;

use nix::errno::Errno;

/// listxattr(2): the names.
pub(crate) fn list(path: &CStr) -> nix::Result<Vec<Vec<u8>>> {
    // SAFETY: the path ends in a zero byte, and the kernel writes at most `len` bytes to `buffer`.
    let all = whole(|buffer, len| unsafe { libc::listxattr(path.as_ptr(), buffer, len) })?;
    Ok(all.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// getxattr(2): one value.
pub(crate) fn get(path: &CStr, name: &CStr) -> nix::Result<Vec<u8>> {
    // SAFETY: both strings end in a zero byte, and the kernel writes at most `len` bytes to `buffer`.
    whole(|buffer, len| unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.cast(), len) })
}

/// setxattr(2).
pub(crate) fn set(path: &CStr, name: &CStr, value: &[u8]) -> nix::Result<()> {
    // SAFETY: both strings end in a zero byte, and the value is as long as said.
    let done = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(done).map(drop)
}

/// Asks with the largest size that there is (XATTR_SIZE_MAX, XATTR_LIST_MAX).
fn whole(ask: impl FnOnce(*mut libc::c_char, usize) -> isize) -> nix::Result<Vec<u8>> {
    const LARGEST: usize = 1 << 16;
    let mut buffer = vec![0u8; LARGEST];
    let len = Errno::result(ask(buffer.as_mut_ptr().cast(), buffer.len()))?;
    buffer.truncate(len as usize);
    Ok(buffer)
}
