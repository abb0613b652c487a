//! The options of a socket that can be both read and set: socket(7).

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::image::{Bytes, Decode, Encode};
use crate::sys::socket::{option, set_option};

/// By number, in the order in which they are set: setting a size says that it is not to be adapted (SO_BUF_LOCK).
const OPTIONS: &[(i32, &str)] = &[
    (libc::SO_DEBUG, "SO_DEBUG"),
    (libc::SO_REUSEADDR, "SO_REUSEADDR"),
    (libc::SO_DONTROUTE, "SO_DONTROUTE"),
    (libc::SO_BROADCAST, "SO_BROADCAST"),
    (libc::SO_SNDBUF, "SO_SNDBUF"),
    (libc::SO_RCVBUF, "SO_RCVBUF"),
    (72, "SO_BUF_LOCK"),
    (libc::SO_KEEPALIVE, "SO_KEEPALIVE"),
    (libc::SO_OOBINLINE, "SO_OOBINLINE"),
    (libc::SO_NO_CHECK, "SO_NO_CHECK"),
    (libc::SO_PRIORITY, "SO_PRIORITY"),
    (libc::SO_LINGER, "SO_LINGER"),
    (libc::SO_RCVLOWAT, "SO_RCVLOWAT"),
    (libc::SO_RCVTIMEO, "SO_RCVTIMEO"),
    (libc::SO_SNDTIMEO, "SO_SNDTIMEO"),
    (libc::SO_TIMESTAMP, "SO_TIMESTAMP"),
    (libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS"),
    (63, "SO_TIMESTAMP_NEW"),
    (64, "SO_TIMESTAMPNS_NEW"),
    (libc::SO_TIMESTAMPING, "SO_TIMESTAMPING"),
    (libc::SO_MARK, "SO_MARK"),
    (libc::SO_RXQ_OVFL, "SO_RXQ_OVFL"),
    (libc::SO_WIFI_STATUS, "SO_WIFI_STATUS"),
    (libc::SO_NOFCS, "SO_NOFCS"),
    (libc::SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE"),
    (libc::SO_BUSY_POLL, "SO_BUSY_POLL"),
    (libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE"),
    (libc::SO_INCOMING_CPU, "SO_INCOMING_CPU"),
    (69, "SO_PREFER_BUSY_POLL"),
    (74, "SO_TXREHASH"),
    (libc::SO_PEEK_OFF, "SO_PEEK_OFF"),
    (libc::SO_PASSSEC, "SO_PASSSEC"),
    (76, "SO_PASSPIDFD"),
    (83, "SO_PASSRIGHTS"),
    (libc::SO_PASSCRED, "SO_PASSCRED"),
];

/// A struct timeval.
const LONGEST: usize = 16;

/// Those that this kernel has, with their values.
#[derive(Encode, Decode, Debug, Default, PartialEq, Eq)]
pub(super) struct Options(Vec<(i32, Bytes)>);

impl Options {
    pub(super) fn of(socket: BorrowedFd<'_>) -> Result<Self> {
        let mut all = Vec::with_capacity(OPTIONS.len());
        for (number, _) in OPTIONS {
            match option(socket, *number, LONGEST) {
                Ok(value) => all.push((*number, value.into())),
                Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP) => {}
                Err(errno) => return Err(Error::call("getsockopt", errno)),
            }
        }
        Ok(Self(all))
    }

    pub(super) fn are_known(&self) -> bool {
        self.0.iter().all(|(number, value)| name(*number).is_some() && value.len() <= LONGEST)
    }

    /// Sets those that differ.
    pub(super) fn set(&self, socket: BorrowedFd<'_>) -> Result<()> {
        for (number, wanted) in &self.0 {
            let is = || option(socket, *number, LONGEST).call("getsockopt");
            if is()? == **wanted {
                continue;
            }
            let name = name(*number).unwrap_or("?");
            let set = match *number {
                libc::SO_SNDBUF => set_size(socket, wanted, (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE)),
                libc::SO_RCVBUF => set_size(socket, wanted, (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)),
                number => set_option(socket, number, wanted),
            };
            let privilege = |error: Error| match error.raw_errno() {
                Some(Errno::EPERM) => error.with_hint(format!("{name} needs CAP_NET_ADMIN")),
                _ => error,
            };
            set.call("setsockopt").map_err(privilege)?;
            if is()? != **wanted {
                let reason = format!("{name} cannot be set as it was");
                return Err(Error::new(ErrorKind::Conflict, reason)
                    .with_hint("CAP_NET_ADMIN is needed for more than net.core.wmem_max and rmem_max"));
            }
        }
        Ok(())
    }
}

fn name(number: i32) -> Option<&'static str> {
    OPTIONS.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// The kernel shows twice what it was told, and takes more than the system's limit only by the second of these options.
fn set_size(socket: BorrowedFd<'_>, shown: &[u8], (first, second): (i32, i32)) -> nix::Result<()> {
    let shown = i32::from_ne_bytes(shown.try_into().map_err(|_| Errno::EINVAL)?);
    let told = (shown / 2).to_ne_bytes();
    set_option(socket, first, &told)?;
    if option(socket, first, LONGEST)? != shown.to_ne_bytes() {
        let _ = set_option(socket, second, &told); // what has come of it is looked at
    }
    Ok(())
}

/// Takes as much as can be had.
pub(super) fn make_room(socket: BorrowedFd<'_>) -> Result<()> {
    let much = (1i32 << 29).to_ne_bytes();
    let forced = set_option(socket, libc::SO_SNDBUFFORCE, &much);
    forced.or_else(|_| set_option(socket, libc::SO_SNDBUF, &much)).call("setsockopt(SO_SNDBUF)")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn options_are_set_again() {
        let (one, other) = UnixStream::pair().unwrap();
        one.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
        set_option(one.as_fd(), libc::SO_SNDBUF, &9_000i32.to_ne_bytes()).unwrap();
        set_option(one.as_fd(), libc::SO_PEEK_OFF, &3i32.to_ne_bytes()).unwrap();
        let wanted = Options::of(one.as_fd()).unwrap();
        assert!(wanted.are_known() && wanted != Options::of(other.as_fd()).unwrap());
        wanted.set(other.as_fd()).unwrap();
        assert_eq!(wanted, Options::of(other.as_fd()).unwrap());
        assert!(!Options(vec![(libc::SO_ATTACH_FILTER, Bytes::default())]).are_known());
    }
}
