//! What this kernel, and the privileges of this process, allow.
//!
//! A consumer that wants to know beforehand asks once, at its start, and shows what is missing:
//!
//! ```
//! use cryosleep::check::{Feature, Features};
//!
//! let features = Features::probe();
//! for (feature, why) in features.missing_for_checkpoint() {
//!     println!("no checkpoint here: {feature}: {why}");
//! }
//! if !features.supports(Feature::Clone3SetTid).is_yes() {
//!     println!("a restore would fail: pids cannot be chosen");
//! }
//! ```
//!
//! Nothing else in the library depends on the answers: a checkpoint or restore tries, and its error says what
//! was missing. Every answer comes from trying the thing itself, on the calling process or on a child that
//! only sleeps and is gone when [`Features::probe`] returns. That child sends no SIGCHLD when it ends; while
//! it is traced a `waitpid(-1)` of the host can see it stop or end, as it can see any task of the library's.

use std::cmp::Ordering;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::inotify::{InitFlags, Inotify};

use crate::Pid;
use crate::proc::status;
use crate::resource::sockets::unix_diag;
use crate::sys::{self, file, pagemap, pidfd, probe, ptrace};
use crate::tracee::{CloneArgs, Dummy, Tracee};

/// What a feature is good for.
///
/// ```
/// use cryosleep::check::{Feature, Need};
/// assert_eq!(Feature::Clone3SetTid.need(), Need::Restore);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Need {
    /// No checkpoint and no restore without it.
    Both,
    /// No checkpoint without it.
    Checkpoint,
    /// No restore without it.
    Restore,
    /// Without it something is slower, less exact or refused; [`Feature::hint`] says what.
    Optional,
    /// Nothing in this version uses it.
    Unused,
}

/// Is a feature there?
///
/// ```
/// use cryosleep::check::{Feature, Features, Support};
/// match Features::probe().supports(Feature::PagemapScan) {
///     Support::No(why) => println!("{why}"),
///     _ => println!("there"),
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Support {
    /// It works, here and now, for this process.
    Yes,
    /// It does not.
    No(WhyNot),
}

impl Support {
    /// It works.
    pub fn is_yes(self) -> bool {
        self == Support::Yes
    }

    /// Why it does not work, if it does not.
    pub fn why_not(self) -> Option<WhyNot> {
        match self {
            Support::Yes => None,
            Support::No(why) => Some(why),
        }
    }
}

/// Why a feature is not there, and what would help.
///
/// ```
/// use cryosleep::check::{Features, Reason};
/// for (feature, support) in Features::probe().iter() {
///     if let Some(why) = support.why_not().filter(|why| why.reason == Reason::Privilege) {
///         println!("{feature} wants more privilege: {}", why.hint);
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WhyNot {
    /// The kind of reason.
    pub reason: Reason,
    /// The error number that the kernel gave, as in errno(3); 0 when it gave none.
    pub errno: i32,
    /// What would help, or what goes without it.
    pub hint: &'static str,
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            Reason::Kernel => "this kernel does not have it",
            Reason::Privilege => "it is not permitted",
            Reason::Setting => "a system setting turns it off",
            Reason::Unknown => "it could not be found out",
        };
        f.write_str(reason)?;
        if self.errno != 0 {
            write!(f, " ({})", Errno::from_raw(self.errno))?;
        }
        write!(f, "; {}", self.hint)
    }
}

/// The kind of reason why a feature is not there.
///
/// ```
/// use cryosleep::check::{Feature, Features, Reason};
/// let why = Features::probe().supports(Feature::Openat2).why_not();
/// assert!(why.is_none_or(|why| why.reason != Reason::Setting));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The kernel is too old, or was built without it.
    Kernel,
    /// A capability is missing, or a security policy (seccomp, an LSM) forbids it.
    Privilege,
    /// A sysctl turns it off.
    Setting,
    /// The question itself failed: no free descriptor, no room for one more process.
    Unknown,
}

impl Reason {
    fn of(errno: Errno) -> Self {
        match errno {
            Errno::ENOSYS | Errno::EINVAL | Errno::ENOTTY | Errno::ENOENT | Errno::EOPNOTSUPP => {
                Reason::Kernel
            }
            Errno::EPERM | Errno::EACCES => Reason::Privilege,
            _ => Reason::Unknown,
        }
    }
}

/// How a question ended.
type Answer = Result<(), No>;

/// A reason without its hint.
struct No {
    reason: Reason,
    errno: Option<Errno>,
}

impl From<Errno> for No {
    fn from(errno: Errno) -> Self {
        Self { reason: Reason::of(errno), errno: Some(errno) }
    }
}

impl From<std::io::Error> for No {
    fn from(error: std::io::Error) -> Self {
        error.raw_os_error().map_or(Reason::Unknown.into(), |raw| Errno::from_raw(raw).into())
    }
}

impl From<Reason> for No {
    fn from(reason: Reason) -> Self {
        Self { reason, errno: None }
    }
}

/// The call must fail with this error: it proves that the kernel got as far as that.
fn proves<T>(result: nix::Result<T>, proof: Errno) -> Answer {
    match result {
        Ok(_) => Ok(()),
        Err(errno) if errno == proof => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

struct Row {
    feature: Feature,
    name: &'static str,
    criu: Option<&'static str>,
    since: (u16, u16),
    need: Need,
    source: &'static str,
    hint: &'static str,
    ask: fn(&Things) -> Answer,
}

macro_rules! features {
    ($($(#[$doc:meta])* $feature:ident {
        name: $name:literal, criu: $criu:expr, since: $since:expr, need: $need:ident,
        source: $source:literal, hint: $hint:literal, ask: $ask:expr,
    })*) => {
        /// Something that a kernel has or lacks, or that a process may do or may not.
        ///
        /// ```
        /// use cryosleep::check::Feature;
        /// let feature = Feature::from_name("pagemap_scan").unwrap();
        /// assert_eq!(feature, Feature::PagemapScan);
        /// assert_eq!(feature.since(), (6, 7)); // Linux 6.7
        /// assert!(Feature::from_name("no such thing").is_none());
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Feature {
            $($(#[$doc])* $feature,)*
        }

        static ROWS: &[Row] = &[$(Row {
            feature: Feature::$feature,
            name: $name,
            criu: $criu,
            since: $since,
            need: Need::$need,
            source: $source,
            hint: $hint,
            ask: $ask,
        },)*];
    };
}

features! {
    /// Tracing another task at all (ptrace(2) PTRACE_SEIZE, Linux 3.4).
    Ptrace {
        name: "ptrace", criu: None, since: (3, 4), need: Both,
        source: "ptrace(2)",
        hint: "needs ptrace(2): kernel.yama.ptrace_scope below 3, and no seccomp filter on it",
        ask: |things| things.stopped().map(drop),
    }
    /// Tracing tasks that are not descendants of the calling process.
    PtraceUnrelated {
        name: "ptrace_unrelated", criu: None, since: (3, 4), need: Optional,
        source: "Documentation/admin-guide/LSM/Yama.rst",
        hint: "only descendants can be checkpointed, unless with CAP_SYS_PTRACE or kernel.yama.ptrace_scope = 0",
        ask: |_| yama(),
    }
    /// Reading and writing another task's memory without stopping at every word (process_vm_readv(2)).
    ProcessVm {
        name: "process_vm", criu: None, since: (3, 2), need: Both,
        source: "process_vm_readv(2)",
        hint: "needs CONFIG_CROSS_MEMORY_ATTACH",
        ask: |_| process_vm(),
    }
    /// Asking for the populated pages of a range (PAGEMAP_SCAN).
    PagemapScan {
        name: "pagemap_scan", criu: Some("pagemap_scan"), since: (6, 7), need: Checkpoint,
        source: "Documentation/admin-guide/mm/pagemap.rst",
        hint: "needs Linux 6.7",
        ask: |things| pagemap_scan(things, pagemap::Page::PRESENT),
    }
    /// PAGEMAP_SCAN tells guard regions (MADV_GUARD_INSTALL) apart.
    PagemapScanGuard {
        name: "pagemap_scan_guard_pages", criu: Some("pagemap_scan_guard_pages"), since: (6, 15), need: Optional,
        source: "Documentation/admin-guide/mm/pagemap.rst",
        hint: "without it (Linux 6.15) guard regions, which came with Linux 6.13, are not seen and make a checkpoint fail",
        ask: |things| pagemap_scan(things, pagemap::Page::GUARD),
    }
    /// The address that a thread's end clears can be asked for (PR_GET_TID_ADDRESS).
    TidAddress {
        name: "tid_address", criu: None, since: (3, 5), need: Checkpoint,
        source: "PR_GET_TID_ADDRESS(2const)",
        hint: "needs CONFIG_CHECKPOINT_RESTORE",
        ask: |_| Ok(probe::get_tid_address()?),
    }
    /// `/proc/PID/timers`, which lists POSIX timers.
    ProcTimers {
        name: "proc_timers", criu: None, since: (3, 10), need: Checkpoint,
        source: "proc_pid_timers(5)",
        hint: "needs CONFIG_CHECKPOINT_RESTORE",
        ask: |_| Ok(std::fs::read("/proc/self/timers").map(drop)?),
    }
    /// `/proc/PID/sched`, which says since when a task has been asleep.
    ProcSched {
        name: "proc_sched", criu: None, since: (2, 6), need: Optional,
        source: "Documentation/scheduler/sched-debug.rst",
        hint: "without it (CONFIG_SCHED_DEBUG) a sleep with a relative timeout starts from its full length again",
        ask: |_| match crate::proc::sched::parse(&std::fs::read("/proc/thread-self/sched")?) {
            Ok(_) => Ok(()),
            Err(_) => Err(Reason::Kernel.into()),
        },
    }
    /// Comparing kernel objects of two tasks (kcmp(2)).
    Kcmp {
        name: "kcmp", criu: None, since: (3, 5), need: Checkpoint,
        source: "kcmp(2)",
        hint: "needs CONFIG_KCMP",
        ask: |things| {
            let place = (things.own, things.pagemap()?.as_raw_fd());
            Ok(sys::kcmp_file(place, place).map(drop)?)
        },
    }
    /// Which file an epoll instance watches (kcmp(2) KCMP_EPOLL_TFD).
    KcmpEpoll {
        name: "kcmp_epoll", criu: Some("kcmp_epoll"), since: (4, 13), need: Optional,
        source: "kcmp(2)",
        hint: "without it (CONFIG_KCMP) a checkpoint of a target with epoll fails",
        ask: |things| kcmp_epoll(things.own),
    }
    /// Expirations of a timerfd that have not been read can be set (TFD_IOC_SET_TICKS).
    TimerfdTicks {
        name: "timerfd", criu: Some("timerfd"), since: (3, 17), need: Optional,
        source: "timerfd_create(2)",
        hint: "without it (CONFIG_CHECKPOINT_RESTORE) a timerfd with unread expirations is not restored",
        ask: |_| {
            let timer = file::timerfd(libc::CLOCK_MONOTONIC)?;
            Ok(file::set_ticks(timer.as_fd(), 1)?)
        },
    }
    /// The number of an inotify watch can be chosen (INOTIFY_IOC_SETNEXTWD).
    InotifyNumbers {
        name: "inotify_numbers", criu: None, since: (4, 16), need: Optional,
        source: "linux/inotify.h",
        hint: "without it (CONFIG_CHECKPOINT_RESTORE) inotify watches are not restored",
        ask: |_| {
            let inotify = OwnedFd::from(Inotify::init(InitFlags::IN_CLOEXEC)?);
            Ok(file::set_next_watch(inotify.as_fd(), 7)?)
        },
    }
    /// What a unix socket is connected to (sock_diag(7)).
    UnixDiag {
        name: "unix_diag", criu: None, since: (3, 3), need: Optional,
        source: "sock_diag(7)",
        hint: "without it (CONFIG_UNIX_DIAG) a target with pairs of unix sockets is refused",
        ask: |_| Ok(unix_diag()?),
    }
    /// A descriptor that refers to a process (pidfd_open(2)).
    Pidfd {
        name: "pidfd", criu: None, since: (5, 3), need: Both,
        source: "pidfd_open(2)",
        hint: "needs Linux 5.3",
        ask: |things| Ok(pidfd::open(things.own).map(drop)?),
    }
    /// Duplicating another task's descriptors (pidfd_getfd(2)).
    PidfdGetfd {
        name: "pidfd_getfd", criu: Some("pidfd_store"), since: (5, 6), need: Checkpoint,
        source: "pidfd_getfd(2)",
        hint: "needs Linux 5.6",
        ask: |things| Ok(probe::own_fd_by_pidfd(&pidfd::open(things.own)?)?),
    }
    /// The exit status of a process that somebody else has waited for (PIDFD_INFO_EXIT).
    PidfdInfoExit {
        name: "pidfd_info_exit", criu: None, since: (6, 15), need: Optional,
        source: "ioctl_pidfd(2), linux/pidfd.h",
        hint: "without it Restored::wait() fails if another thread of the host waits for all children and is first",
        ask: |_| pidfd_info_exit(),
    }
    /// The rseq area of a thread can be asked for (PTRACE_GET_RSEQ_CONFIGURATION).
    RseqConfiguration {
        name: "get_rseq_conf", criu: Some("get_rseq_conf"), since: (5, 13), need: Checkpoint,
        source: "ptrace(2)",
        hint: "needs Linux 5.13 with CONFIG_RSEQ",
        ask: |things| Ok(ptrace::rseq_configuration(things.stopped()?.pid()).map(drop)?),
    }
    /// Opening `/proc/PID/map_files/*`, which leads to what a mapping is of.
    MapFiles {
        name: "map_files", criu: None, since: (4, 3), need: Optional,
        source: "proc_pid_map_files(5)",
        hint: "without it (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the initial user namespace) shared anonymous memory is saved as far as it is mapped, and mapped files of some file systems (overlayfs, btrfs) are refused",
        ask: |_| map_files(),
    }
    /// Choosing the pid of a new task (clone3(2) `set_tid`).
    Clone3SetTid {
        name: "clone3_set_tid", criu: Some("clone3_set_tid"), since: (5, 5), need: Restore,
        source: "clone(2)",
        hint: "needs CAP_CHECKPOINT_RESTORE (before Linux 5.9 CAP_SYS_ADMIN) in the user namespace that owns the pid namespace",
        ask: |things| {
            let number = things.own.get();
            let set_tid = (&raw const number) as u64;
            // The number is taken, by ourselves. (Not if unshare(2) has made a pid namespace for our children.)
            proves(Dummy::spawn(CloneArgs { set_tid, set_tid_size: 1, ..CloneArgs::default() }), Errno::EEXIST)
        },
    }
    /// Setting the addresses that the kernel keeps about an address space (PR_SET_MM_MAP).
    PrctlSetMmMap {
        name: "prctl_set_mm_map", criu: None, since: (3, 18), need: Restore,
        source: "PR_SET_MM(2const)",
        hint: "needs CONFIG_CHECKPOINT_RESTORE",
        ask: |_| Ok(probe::set_mm_map_size()?),
    }
    /// Setting what `/proc/PID/exe` leads to (PR_SET_MM_MAP, `exe_fd`).
    ExecutableLink {
        name: "prctl_exe_fd", criu: None, since: (5, 9), need: Restore,
        source: "PR_SET_MM(2const)",
        hint: "needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the caller's user namespace",
        ask: |_| proves(probe::set_exe_link(), Errno::EBADF),
    }
    /// Opening a path without following symbolic links (openat2(2)).
    Openat2 {
        name: "openat2", criu: Some("openat2"), since: (5, 6), need: Restore,
        source: "openat2(2)",
        hint: "needs Linux 5.6, and a container runtime whose seccomp filter knows openat2",
        ask: |_| {
            use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
            Ok(openat2(AT_FDCWD, "/", how).map(drop)?)
        },
    }
    /// A program in memory can be executed (memfd_create(2) with MFD_EXEC).
    MemfdExec {
        name: "memfd_exec", criu: None, since: (3, 17), need: Restore,
        source: "memfd_create(2), Documentation/userspace-api/mfd_noexec.rst",
        hint: "needs vm.memfd_noexec below 2",
        ask: |_| memfd_exec(),
    }
    /// Filling memory from outside in one copy (userfaultfd(2), UFFD_USER_MODE_ONLY).
    Userfaultfd {
        name: "uffd", criu: Some("uffd"), since: (5, 11), need: Optional,
        source: "userfaultfd(2)",
        hint: "without it (CONFIG_USERFAULTFD, Linux 5.11) large memory is restored by plain writes, more slowly",
        ask: |_| Ok(probe::userfaultfd(0).map(drop)?),
    }
    /// User namespaces can be made, in which an ordinary user has the privileges that a restore needs.
    UserNamespaces {
        name: "userns", criu: Some("userns"), since: (3, 8), need: Optional,
        source: "user_namespaces(7)",
        hint: "without it an ordinary user cannot restore; look at user.max_user_namespaces, kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns",
        ask: |_| {
            let flags = (libc::CLONE_NEWUSER | libc::CLONE_NEWPID) as u64;
            match Dummy::spawn(CloneArgs { flags, ..CloneArgs::default() }) {
                Err(errno @ Errno::ENOSPC) => Err(No { reason: Reason::Setting, errno: Some(errno) }),
                made => Ok(made.map(drop)?),
            }
        },
    }
    /// A pid namespace can be made ([`Pids::NewNamespace`](crate::Pids::NewNamespace)).
    PidNamespaces {
        name: "pidns", criu: None, since: (3, 8), need: Optional,
        source: "pid_namespaces(7)",
        hint: "without it (CAP_SYS_ADMIN, CONFIG_PID_NS) a tree is only restored where its numbers are free; look at user.max_pid_namespaces, too",
        ask: |_| {
            let flags = libc::CLONE_NEWPID as u64;
            match Dummy::spawn(CloneArgs { flags, ..CloneArgs::default() }) {
                Err(errno @ Errno::ENOSPC) => Err(No { reason: Reason::Setting, errno: Some(errno) }),
                made => Ok(made.map(drop)?),
            }
        },
    }
    /// Write tracking without a handler (userfaultfd(2), UFFD_FEATURE_WP_ASYNC).
    VmWriteTracking {
        name: "uffd_wp_async", criu: Some("mem_dirty_track"), since: (6, 7), need: Optional,
        source: "Documentation/admin-guide/mm/userfaultfd.rst",
        hint: "without it a Tracker notes nothing, and pages are compared; needs Linux 6.7 with CONFIG_PTE_MARKER_UFFD_WP",
        ask: |_| {
            const WP_UNPOPULATED: u64 = 1 << 13;
            const WP_ASYNC: u64 = 1 << 15;
            Ok(probe::userfaultfd(WP_UNPOPULATED | WP_ASYNC).map(drop)?)
        },
    }
    /// Keeping a task's seccomp filters from applying to what it is made to do (PTRACE_O_SUSPEND_SECCOMP).
    SuspendSeccomp {
        name: "seccomp_suspend", criu: Some("seccomp_suspend"), since: (4, 3), need: Optional,
        source: "ptrace(2)",
        hint: "needs CAP_SYS_ADMIN in the initial user namespace, and CONFIG_CHECKPOINT_RESTORE",
        ask: |things| Ok(probe::suspend_seccomp(things.stopped()?.pid())?),
    }
    /// Choosing the ids of POSIX timers (PR_TIMER_CREATE_RESTORE_IDS).
    TimerCreateRestoreIds {
        name: "timer_create_restore_ids", criu: None, since: (6, 15), need: Optional,
        source: "linux/prctl.h",
        hint: "without it (Linux 6.15) a target with POSIX timers cannot be restored",
        ask: |_| Ok(probe::timer_create_restore_ids()?),
    }
    /// Mapping a vdso at a chosen address (ARCH_MAP_VDSO_64).
    CanMapVdso {
        name: "can_map_vdso", criu: Some("can_map_vdso"), since: (4, 9), need: Unused,
        source: "arch_prctl(2), asm/prctl.h",
        hint: "needs CONFIG_CHECKPOINT_RESTORE",
        ask: |_| match own_mapping(|_, name| name == "[vdso]")? {
            Some(_) => proves(probe::map_vdso(), Errno::EEXIST),
            None => Err(Reason::Unknown.into()),
        },
    }
    /// Making a task right in its cgroup (clone3(2) CLONE_INTO_CGROUP).
    CloneIntoCgroup {
        name: "clone_into_cgroup", criu: None, since: (5, 7), need: Unused,
        source: "clone(2)",
        hint: "needs Linux 5.7 with cgroup v2",
        ask: |_| {
            const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
            let (flags, cgroup) = (CLONE_INTO_CGROUP, i32::MAX as u64);
            proves(Dummy::spawn(CloneArgs { flags, cgroup, ..CloneArgs::default() }), Errno::EBADF)
        },
    }
}

impl Feature {
    /// Every feature that there is a question for.
    pub fn all() -> impl Iterator<Item = Feature> {
        ROWS.iter().map(|row| row.feature)
    }

    /// The feature of this name: one of ours, or the one that `criu check --feature` uses for it.
    pub fn from_name(name: &str) -> Option<Self> {
        ROWS.iter().find(|row| row.name == name || row.criu == Some(name)).map(|row| row.feature)
    }

    /// A short name, as `criu check --feature` has it where it has one.
    pub fn name(self) -> &'static str {
        self.row().map_or("", |row| row.name)
    }

    /// The name that `criu check --feature` has for it.
    pub fn criu_name(self) -> Option<&'static str> {
        self.row().and_then(|row| row.criu)
    }

    /// The version of Linux that first had it: major, minor.
    pub fn since(self) -> (u16, u16) {
        self.row().map_or((0, 0), |row| row.since)
    }

    /// What it is good for.
    pub fn need(self) -> Need {
        self.row().map_or(Need::Unused, |row| row.need)
    }

    /// What it needs, or what goes without it.
    pub fn hint(self) -> &'static str {
        self.row().map_or("", |row| row.hint)
    }

    /// Where it is documented: a manual page, or a file of the kernel's source.
    pub fn source(self) -> &'static str {
        self.row().map_or("", |row| row.source)
    }

    fn row(self) -> Option<&'static Row> {
        ROWS.get(self as usize)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What is there and what is not. The answers hold as long as nobody changes the privileges of the process or
/// the settings of the system.
///
/// ```
/// use cryosleep::check::Features;
/// let features = Features::probe();
/// println!("{features}");
/// let ready = features.missing_for_restore().next().is_none();
/// # let _ = ready;
/// ```
#[derive(Clone, Debug)]
pub struct Features(Vec<Support>);

impl Features {
    /// Asks for all of them; takes a few milliseconds at most.
    pub fn probe() -> Self {
        let things = Things::new();
        Self(ROWS.iter().map(|row| answer(row, &things)).collect())
    }

    /// Is it there?
    pub fn supports(&self, feature: Feature) -> Support {
        let unknown = WhyNot { reason: Reason::Unknown, errno: 0, hint: feature.hint() };
        self.0.get(feature as usize).copied().unwrap_or(Support::No(unknown))
    }

    /// All answers.
    pub fn iter(&self) -> impl Iterator<Item = (Feature, Support)> + '_ {
        Feature::all().zip(self.0.iter().copied())
    }

    /// What a checkpoint needs and does not find. Empty: go ahead.
    pub fn missing_for_checkpoint(&self) -> impl Iterator<Item = (Feature, WhyNot)> + '_ {
        self.missing(Need::Checkpoint)
    }

    /// What a restore needs and does not find. Empty: go ahead.
    pub fn missing_for_restore(&self) -> impl Iterator<Item = (Feature, WhyNot)> + '_ {
        self.missing(Need::Restore)
    }

    fn missing(&self, operation: Need) -> impl Iterator<Item = (Feature, WhyNot)> + '_ {
        self.iter()
            .filter(move |(feature, _)| [operation, Need::Both].contains(&feature.need()))
            .filter_map(|(feature, support)| Some((feature, support.why_not()?)))
    }
}

/// One line for each feature.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (feature, support) in self.iter() {
            match support {
                Support::Yes => writeln!(f, "{feature:<25} yes")?,
                Support::No(why) => writeln!(f, "{feature:<25} no: {why}")?,
            }
        }
        Ok(())
    }
}

fn answer(row: &Row, things: &Things) -> Support {
    match (row.ask)(things) {
        Ok(()) => Support::Yes,
        Err(No { reason, errno }) => {
            Support::No(WhyNot { reason, errno: errno.map_or(0, |errno| errno as i32), hint: row.hint })
        }
    }
}

/// What several questions use.
struct Things {
    own: Pid,
    pagemap: std::io::Result<File>,
    /// A traced, stopped child; or what became of the attempt.
    stopped: Result<Dummy, (Reason, Option<Errno>)>,
}

impl Things {
    fn new() -> Self {
        Self {
            own: Pid::from(std::process::id()),
            pagemap: File::open("/proc/self/pagemap"),
            stopped: stop_a_dummy().map_err(|no| (no.reason, no.errno)),
        }
    }

    fn pagemap(&self) -> Result<&File, No> {
        self.pagemap.as_ref().map_err(|error| match error.raw_os_error() {
            Some(raw) => Errno::from_raw(raw).into(),
            None => Reason::Unknown.into(),
        })
    }

    fn stopped(&self) -> Result<&Dummy, No> {
        self.stopped.as_ref().map_err(|(reason, errno)| No { reason: *reason, errno: *errno })
    }
}

fn stop_a_dummy() -> Result<Dummy, No> {
    const LIMIT: Duration = Duration::from_secs(5);
    let dummy = Dummy::spawn(CloneArgs::default()).map_err(|_| No::from(Reason::Unknown))?;
    let stop = || {
        let tracee = Tracee::seize(dummy.pid(), 0)?;
        tracee.interrupt()?;
        tracee.wait(LIMIT)
    };
    match stop() {
        Ok(_) => Ok(dummy),
        Err(error) => Err(error.raw_errno().map_or(Reason::Unknown.into(), No::from)),
    }
}

fn yama() -> Answer {
    const CAP_SYS_PTRACE: u32 = 19;
    // No file: no Yama.
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if matches!(scope.trim(), "" | "0") {
        return Ok(());
    }
    let privileged = std::fs::read("/proc/thread-self/status")
        .is_ok_and(|text| status::parse(&text).is_ok_and(|own| own.cap_eff & 1 << CAP_SYS_PTRACE != 0));
    if privileged && scope.trim() != "3" { Ok(()) } else { Err(Reason::Setting.into()) }
}

fn process_vm() -> Answer {
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    let (from, mut to) = ([42u8; 8], [0u8; 8]);
    let remote = [RemoteIoVec { base: from.as_ptr() as usize, len: from.len() }];
    process_vm_readv(nix::unistd::getpid(), &mut [std::io::IoSliceMut::new(&mut to)], &remote)?;
    if from == to { Ok(()) } else { Err(Reason::Unknown.into()) }
}

/// Scans the page that a variable of ours is in.
fn pagemap_scan(things: &Things, any: pagemap::Page) -> Answer {
    let variable = 0u8;
    let page = (&raw const variable) as u64 & !(sys::PAGE - 1);
    let query = pagemap::Query { any, none: pagemap::Page::empty() };
    Ok(pagemap::scan(things.pagemap()?, page..page + sys::PAGE, query, |_, _| ())?)
}

/// An instance that watches another one is asked about that.
fn kcmp_epoll(own: Pid) -> Answer {
    let new = || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
    let (watching, watched) = (new()?, new()?);
    watching.add(&watched.0, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let target = watched.0.as_raw_fd();
    match file::kcmp_epoll((own, target), (own, watching.0.as_raw_fd()), (target, 0))? {
        Ordering::Equal => Ok(()),
        _ => Err(Reason::Kernel.into()),
    }
}

/// Lets a child end, and asks how it ended after it has been reaped.
fn pidfd_info_exit() -> Answer {
    let mut dummy = Dummy::spawn(CloneArgs::default()).map_err(|_| No::from(Reason::Unknown))?;
    dummy.end();
    match pidfd::exit_status(dummy.pidfd()) {
        Ok(Some(status)) if status & 0x7f == libc::SIGKILL => Ok(()),
        // Linux 6.13 and 6.14 answer, but not this question.
        Ok(_) | Err(Errno::ESRCH) => Err(Reason::Kernel.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// The first mapping of the calling process that fits, as its range in `/proc/self/maps`.
fn own_mapping(fits: impl Fn(&str, &str) -> bool) -> Result<Option<String>, No> {
    let maps = std::fs::read("/proc/self/maps")?;
    let text = String::from_utf8_lossy(&maps);
    let found = text.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (range, inode) = (fields.next()?, fields.nth(3)?);
        fits(inode, fields.next().unwrap_or_default()).then(|| range.to_owned())
    });
    Ok(found)
}

fn map_files() -> Answer {
    match own_mapping(|inode, name| inode != "0" && name.starts_with('/') && !name.starts_with("/dev/"))? {
        Some(range) => Ok(File::open(format!("/proc/self/map_files/{range}")).map(drop)?),
        None => Err(Reason::Unknown.into()),
    }
}

/// As the restore makes its first program.
fn memfd_exec() -> Answer {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::stat::{Mode, fstat};
    let make = |more| memfd_create(c"cryosleep-check", MFdFlags::MFD_CLOEXEC | more);
    let made: OwnedFd = match make(MFdFlags::from_bits_retain(libc::MFD_EXEC)) {
        Err(Errno::EINVAL) => make(MFdFlags::empty())?,
        Err(errno @ Errno::EACCES) => return Err(No { reason: Reason::Setting, errno: Some(errno) }),
        made => made?,
    };
    let mode = Mode::from_bits_truncate(fstat(made.as_fd())?.st_mode);
    if mode.contains(Mode::S_IXUSR) { Ok(()) } else { Err(Reason::Setting.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_the_features() {
        for (index, row) in ROWS.iter().enumerate() {
            assert_eq!(row.feature as usize, index);
            assert_eq!(Feature::from_name(row.name), Some(row.feature));
            assert!(row.criu.is_none_or(|name| Feature::from_name(name) == Some(row.feature)));
            assert!(!row.hint.is_empty() && !row.source.is_empty());
        }
    }

    #[test]
    fn what_the_engine_uses_is_found_where_it_works() {
        let features = Features::probe();
        if nix::unistd::geteuid().is_root() {
            let missing: Vec<_> = features.missing_for_checkpoint().collect();
            assert!(missing.is_empty(), "{missing:?}");
        }
        if std::env::var_os("CRYOSLEEP_REQUIRE_ALL").is_some() {
            let missing: Vec<_> = features.missing_for_restore().collect();
            assert!(missing.is_empty(), "{missing:?}");
        }
    }

    #[test]
    fn probing_leaves_nothing_behind() {
        let names = || {
            let fds = std::fs::read_dir("/proc/self/fd").unwrap();
            fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
                .filter(|name| !name.starts_with("/proc"))
                .filter(|name| {
                    ["pidfd", "userfaultfd", "cryosleep-check"]
                        .iter()
                        .any(|part| name.to_string_lossy().contains(part))
                })
                .count()
        };
        // Other tests of this process have descriptors too: look at those that only a leak would pile up.
        let before = names();
        (0..50).for_each(|_| drop(Features::probe()));
        assert!(names() < before + 25, "{} {}", names(), before);
    }

    #[test]
    fn reads_like_a_sentence() {
        let why = WhyNot { reason: Reason::Privilege, errno: 1, hint: "needs more" };
        assert_eq!(why.to_string(), "it is not permitted (EPERM: Operation not permitted); needs more");
    }
}
