//! Somewhere an ordinary user may choose pids: a pid namespace of one's own, inside a user namespace of
//! one's own. No privilege is needed for either, only a kernel that lets users make them.

use std::error::Error;
use std::fs;
use std::process::{Command, ExitStatus};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getegid, geteuid};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Set for the first process of the namespaces, which is this program once more.
const INIT: &str = "CRYOSLEEP_EXAMPLE_INIT";

/// Has this process the right to choose pids, as far as its capabilities tell?
pub(crate) fn may_choose_pids() -> Result<bool> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    const CAP_CHECKPOINT_RESTORE: u64 = 1 << 40;
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0");
    let effective = u64::from_str_radix(effective.trim(), 16)?;
    Ok(effective & (CAP_SYS_ADMIN | CAP_CHECKPOINT_RESTORE) != 0)
}

/// Runs this program once more inside new namespaces, and returns how that ended.
pub(crate) fn run_inside() -> Result<ExitStatus> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)
        .map_err(|errno| format!("this kernel lets ordinary users make no namespaces: unshare: {errno}"))?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    Ok(again().env(INIT, "1").status()?)
}

/// Is this the first process of the namespaces that [`run_inside`] made?
pub(crate) fn is_init() -> bool {
    std::env::var_os(INIT).is_some()
}

/// What the first process does: it mounts the /proc of its namespace, starts the real work, and reaps
/// whatever is orphaned until that is over. Returns the exit code of the work.
pub(crate) fn init() -> Result<u8> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .map_err(|errno| format!("cannot mount the new namespace's /proc: {errno}"))?;
    let worker = again().env_remove(INIT).spawn()?;
    let worker = Pid::from_raw(i32::try_from(worker.id())?);
    loop {
        match waitpid(None, None)? {
            WaitStatus::Exited(pid, code) if pid == worker => return Ok(u8::try_from(code)?),
            WaitStatus::Signaled(pid, signal, _) if pid == worker => {
                return Err(format!("the work was ended by {signal}").into());
            }
            _ => {}
        }
    }
}

fn again() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1));
    command
}
