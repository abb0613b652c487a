//! The outside view: what /proc shows of a tree, before a checkpoint and after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cell;

/// One line for everything that must be the same, by where it was found: `pid/tid/file/key`.
pub(crate) type View = BTreeMap<String, String>;

/// What is done with a file of /proc/PID and /proc/PID/task/TID.
#[derive(Clone, Copy)]
#[allow(dead_code)] // the reasons are for whoever reads this
enum Look {
    /// It must be the same byte for byte, or be as unreadable as before.
    Whole,
    /// It is a link, which must lead to the same place.
    Link,
    /// All that is in the directory must be the same.
    Each,
    /// It is compared in part, by this.
    By(fn(&str) -> Vec<(String, String)>),
    /// It takes more than one file to compare it.
    Elsewhere(&'static str),
    /// It is not compared, and this is why.
    Not(&'static str),
}

use Look::{By, Each, Elsewhere, Link, Not, Whole};

/// Every file that there is: one that is not listed here fails the test.
const FILES: &[(&str, Look)] = &[
    ("arch_status", Not("for how long AVX-512 has not been used")),
    ("attr", Each),
    ("autogroup", By(autogroup)),
    ("auxv", Whole),
    ("cgroup", Whole),
    ("children", Elsewhere("see children()")),
    ("clear_refs", Not("it can only be written")),
    ("cmdline", Whole),
    ("comm", Whole),
    ("coredump_filter", Whole),
    ("cpu_resctrl_groups", Whole),
    ("cpuset", Whole),
    ("cwd", Link),
    ("environ", Whole),
    ("exe", Link),
    ("fail-nth", Whole),
    ("fd", Elsewhere("see descriptors()")),
    ("fdinfo", Elsewhere("see descriptors()")),
    ("gid_map", Whole),
    ("io", Not("counts what has been read and written: history")),
    ("ksm_merging_pages", Not("how far the kernel has got with merging")),
    ("ksm_stat", By(ksm_stat)),
    ("latency", Not("history")),
    ("limits", Whole),
    ("loginuid", Whole),
    ("make-it-fail", Whole),
    ("map_files", Each),
    ("maps", Not("smaps has all of it")),
    ("mem", Not("the subject checks what is in its memory")),
    ("mountinfo", By(mounts)),
    ("mounts", By(mounts)),
    ("mountstats", Not("mountinfo, with counters of network file systems")),
    ("net", Not("is that of the network namespace, which ns/net compares")),
    ("ns", Each),
    ("numa_maps", Elsewhere("see mappings()")),
    ("oom_adj", Whole),
    ("oom_score", Not("follows from oom_score_adj and the memory in use")),
    ("oom_score_adj", Whole),
    ("pagemap", Not("where memory is in the machine")),
    ("patch_state", Whole),
    ("personality", Whole),
    ("projid_map", Whole),
    ("root", Link),
    ("sched", By(sched)),
    ("schedstat", Not("times: history")),
    ("seccomp_cache", Whole),
    ("sessionid", Not("counted by the kernel: setting a loginuid begins a session")),
    ("setgroups", Whole),
    ("smaps", Elsewhere("see mappings()")),
    ("smaps_rollup", Not("sums of smaps that follow what is resident")),
    ("stack", Not("where in the kernel it happens to be")),
    ("stat", By(stat)),
    ("statm", Not("sizes: vsize is in stat, the others follow what is resident")),
    ("status", By(status)),
    ("syscall", Not("in which call it happens to be; of one that restarts it shows another number")),
    ("task", Elsewhere("see of(): each thread")),
    ("timens_offsets", Whole),
    ("timers", Whole),
    ("timerslack_ns", Whole),
    ("uid_map", Whole),
    ("wchan", Not("where in the kernel it happens to be")),
];

/// Lines of status that may differ.
const STATUS: &[(&str, &str)] = &[
    ("State", "sleeping or running is chance; `stopped` and `zombie` are compared by themselves"),
    ("VmPeak", "history"),
    ("VmHWM", "history"),
    ("VmRSS", "clean and zero pages come back when they are touched"),
    ("RssAnon", "as VmRSS"),
    ("RssFile", "as VmRSS"),
    ("RssShmem", "as VmRSS"),
    ("HugetlbPages", "as VmRSS"),
    ("VmPTE", "page tables follow VmRSS"),
    ("VmSwap", "what was swapped out is read in"),
    ("SigQ", "counts all signals that are pending for the user, in all processes of the machine"),
    ("FDSize", "the size of a table that only grows: history"),
    ("voluntary_ctxt_switches", "history"),
    ("nonvoluntary_ctxt_switches", "history"),
];

/// Fields of stat that may differ, by their number in proc_pid_stat(5).
const STAT: &[(usize, &str)] = &[
    (3, "state: as in status"),
    (9, "flags of the kernel's: tell fork from exec, and whether the floating-point unit was used"),
    (10, "minflt: history"),
    (11, "cminflt: history"),
    (12, "majflt: history"),
    (13, "cmajflt: history"),
    (14, "utime: history"),
    (15, "stime: history"),
    (16, "cutime: history"),
    (17, "cstime: history"),
    (22, "starttime: the restored process started later"),
    (24, "rss: as in status"),
    (29, "kstkesp: where its stack happens to be; 0 but for the dying"),
    (30, "kstkeip: the same"),
    (31, "signal: the lower half of what status has"),
    (32, "blocked: the same"),
    (33, "sigignore: the same"),
    (34, "sigcatch: the same"),
    (35, "wchan: whether it happens to sleep"),
    (39, "processor: chance"),
    (42, "delayacct_blkio_ticks: history"),
    (43, "guest_time: history"),
    (44, "cguest_time: history"),
];

/// Lines of sched that may differ, by how they begin.
const SCHED: &[(&str, &str)] = &[
    ("se.exec_start", "time"),
    ("se.vruntime", "time"),
    ("se.deadline", "time"),
    ("se.sum_exec_runtime", "history"),
    ("se.nr_migrations", "history"),
    ("se.statistics.", "history"),
    ("se.avg.", "load of the last moments"),
    ("sum_", "history"),
    ("nr_", "history"),
    ("wait_", "history"),
    ("sleep_", "history"),
    ("block_", "history"),
    ("exec_max", "history"),
    ("slice_max", "history"),
    ("iowait_", "history"),
    ("avg_", "history"),
    ("core_forceidle_sum", "history"),
    ("dl.runtime", "what is left of this period; sched_getattr(2) tells the parameters to the subjects"),
    ("dl.deadline", "time"),
    ("clock-delta", "a measurement, not of the task"),
    ("mm->numa_scan_seq", "history of NUMA balancing"),
    ("numa_", "history of NUMA balancing"),
    ("total_numa_faults", "history of NUMA balancing"),
    ("current_node", "chance"),
];

/// Lines of smaps that may differ.
const SMAPS: &[(&str, &str)] = &[
    ("Size", "is in the range"),
    ("Rss", "clean and zero pages come back when they are touched"),
    ("Pss", "as Rss"),
    ("Pss_Dirty", "as Rss"),
    ("Shared_Clean", "as Rss; and who else has the pages"),
    ("Shared_Dirty", "as Shared_Clean"),
    ("Private_Clean", "as Shared_Clean"),
    ("Private_Dirty", "as Shared_Clean"),
    ("Referenced", "history"),
    ("Anonymous", "as Rss"),
    ("KSM", "how far the kernel has got with merging"),
    ("LazyFree", "the kernel may take these pages at any time"),
    ("AnonHugePages", "the kernel's choice"),
    ("ShmemPmdMapped", "the kernel's choice"),
    ("FilePmdMapped", "the kernel's choice"),
    ("Shared_Hugetlb", "as Shared_Clean"),
    ("Private_Hugetlb", "as Shared_Clean"),
    ("Swap", "what was swapped out is read in"),
    ("SwapPss", "as Swap"),
    ("Locked", "as Pss, of a locked mapping, which VmFlags tells"),
    ("THPeligible", "follows from size, alignment and flags"),
];

/// Lines of fdinfo that may differ.
const FDINFO: &[(&str, &str)] = &[
    ("eventfd-id", "the kernel counts them"),
    ("it_value", "time goes on"),
    ("ticks", "as it_value; what is unread is checked by the subjects"),
];

/// Lines of fdinfo that may differ, of files without a name.
const NAMELESS: &[(&str, &str)] = &[(
    "ino",
    "a new object is a new inode, and so is a deleted file that was made again (perhaps by another name)",
)];

/// What an epoll instance watches may be a new pipe.
fn without_inodes_of_targets(line: &str) -> String {
    let end = line.find("ino:").filter(|_| line.starts_with("tfd:")).unwrap_or(line.len());
    line[..end].to_owned()
}

fn excepted(exceptions: &[(&str, &str)], key: &str) -> bool {
    exceptions.iter().any(|(name, _)| *name == key)
}

/// The processes of the tree below `root`, itself included.
pub(crate) fn tree(root: u32) -> BTreeSet<u32> {
    tree_in("/proc", root)
}

fn tree_in(proc: &str, root: u32) -> BTreeSet<u32> {
    let parents: BTreeMap<u32, u32> = numbers(proc)
        .into_iter()
        .filter_map(|pid| Some((pid, stat_fields(&format!("{proc}/{pid}"))?.get(4)?.parse().ok()?)))
        .collect();
    let mut found = BTreeSet::from([root]);
    loop {
        let more: Vec<u32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// Looks at the whole tree. An error is a file of /proc about which nobody has decided.
pub(crate) fn of(root: u32) -> Result<View, String> {
    of_in("/proc", root)
}

/// The same as it sees itself, in the pid namespace that it has of its own. That is another namespace after a
/// restore, and another parent may have the root.
pub(crate) fn from_inside(root: u32) -> Result<View, String> {
    let inner = numbers_of(root).last().copied().ok_or("it has no number")?;
    let mounted = cell::lab().join(LOOK);
    fs::create_dir_all(&mounted).map_err(|e| e.to_string())?;
    let mut mount = Command::new("nsenter");
    mount.arg(format!("--pid=/proc/{root}/ns/pid")).args(["mount", "-t", "proc", "proc"]).arg(&mounted);
    let done = mount.status().map_err(|e| format!("{mount:?}: {e}"))?;
    let view = of_in(&mounted.to_string_lossy(), inner);
    nix::mount::umount(&mounted).map_err(|e| format!("{mount:?}: {done}; umount: {e}"))?;
    let mut view = view?;
    let other = ["/ns/pid", "/ns/pid_for_children"];
    let of_root = ["/status/PPid", "/stat/4"];
    let root = format!("{inner}/");
    view.retain(|key, _| {
        let ends = |with: &[&str]| with.iter().any(|end| key.ends_with(end));
        !ends(&other) && (!key.starts_with(&root) || !ends(&of_root))
    });
    Ok(view)
}

/// Where a /proc is mounted while it is looked at.
const LOOK: &str = "look-at-proc";

/// All numbers of a process, from ours to its own.
pub(crate) fn numbers_of(pid: u32) -> Vec<u32> {
    let status = text(&format!("/proc/{pid}/status"));
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

fn of_in(proc: &str, root: u32) -> Result<View, String> {
    let mut look = Looker::default();
    for pid in tree_in(proc, root) {
        let at = format!("{proc}/{pid}");
        look.task(&at, &pid.to_string())?;
        for tid in numbers(&format!("{at}/task")) {
            look.task(&format!("{at}/task/{tid}"), &format!("{pid}/{tid}"))?;
        }
        look.see(format!("{pid}/children/all"), children(&at));
    }
    Ok(look.view)
}

/// What differs, a line each. `common` looks only at processes that are in both.
pub(crate) fn difference(before: &View, after: &View, common: bool) -> Vec<String> {
    let pids = |view: &View| -> BTreeSet<String> {
        view.keys().filter_map(|key| Some(key.split_once('/')?.0.to_owned())).collect()
    };
    let both: BTreeSet<String> = pids(before).intersection(&pids(after)).cloned().collect();
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let wanted = |key: &&&String| !common || key.split_once('/').is_some_and(|(pid, _)| both.contains(pid));
    let show = |value: Option<&String>| value.map_or("nothing".to_owned(), |value| format!("{value:?}"));
    // What works all the time changes these all the time.
    const RESTLESS: [&str; 4] = ["/status/SigBlk", "/status/SigPnd", "/status/ShdPnd", "/children/all"];
    keys.iter()
        .filter(|key| !(common && RESTLESS.iter().any(|end| key.ends_with(end))))
        .filter(wanted)
        .filter(|key| before.get(**key) != after.get(**key))
        .map(|key| format!("{key}: {} -> {}", show(before.get(*key)), show(after.get(*key))))
        .collect()
}

/// Numbers that the kernel gives to nameless objects: only which of them are the same matters.
#[derive(Default)]
struct Names(BTreeMap<String, usize>);

impl Names {
    fn same(&mut self, name: &str) -> String {
        let next = self.0.len();
        format!("#{}", self.0.entry(name.to_owned()).or_insert(next))
    }
}

fn numbers(dir: &str) -> Vec<u32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    all
}

fn text(path: &str) -> String {
    fs::read(path)
        .map_or_else(|error| format!("<{error}>"), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn link(path: &str) -> String {
    fs::read_link(path).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Without its number in the list and, of locks that belong to a description, who took it. Inodes are compared anyway.
fn lock(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().skip(2).collect();
    let pid = if words.first() == Some(&"FLOCK") { 3 } else { usize::MAX };
    let kept =
        words.iter().enumerate().filter(|(index, word)| *index != pid && word.matches(':').count() != 2);
    kept.map(|(_, word)| *word).collect::<Vec<_>>().join(" ")
}

fn inode(path: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map(|found| found.ino()).unwrap_or_default()
}

/// Counted as in proc_pid_stat(5): the first is number 1.
fn stat_fields(at: &str) -> Option<Vec<String>> {
    fields(&text(&format!("{at}/stat")))
}

fn fields(text: &str) -> Option<Vec<String>> {
    let (head, rest) = text.rsplit_once(')')?;
    let (pid, comm) = head.split_once('(')?;
    let mut fields = vec![String::new(), pid.trim().to_owned(), comm.to_owned()];
    fields.extend(rest.split_whitespace().map(str::to_owned));
    Some(fields)
}

fn field(at: &str, number: usize) -> String {
    stat_fields(at).and_then(|fields| fields.get(number).cloned()).unwrap_or_default()
}

/// All children of a process. By which of its threads each was born decides what __WNOTHREAD and PR_SET_PDEATHSIG
/// mean, and their order whom of several that have ended wait(2) finds first: neither is restored in all cases.
fn children(at: &str) -> String {
    let of_thread = |tid: u32| text(&format!("{at}/task/{tid}/children"));
    let all: String = numbers(&format!("{at}/task")).into_iter().map(of_thread).collect();
    let mut all: Vec<&str> = all.split_whitespace().collect();
    all.sort_unstable();
    all.join(" ")
}

/// What has been seen so far.
#[derive(Default)]
struct Looker {
    view: View,
    names: Names,
}

impl Looker {
    /// `at` is the directory of a process or a thread.
    fn task(&mut self, at: &str, key: &str) -> Result<(), String> {
        let Ok(entries) = fs::read_dir(at) else { return Ok(()) };
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            let (path, key) = (format!("{at}/{name}"), format!("{key}/{name}"));
            match FILES.iter().find(|(known, _)| *known == name) {
                None => return Err(format!("{path} is neither compared nor excepted: see FILES in view.rs")),
                Some((_, Whole)) => self.see(key, text(&path)),
                Some((_, Link)) => self.see(key, link(&path)),
                Some((_, Each)) => self.each(&path, &key),
                Some((_, By(parts))) => {
                    parts(&text(&path))
                        .into_iter()
                        .for_each(|(part, value)| self.see(format!("{key}/{part}"), value));
                }
                Some((_, Elsewhere(_) | Not(_))) => {}
            }
        }
        use std::os::unix::fs::MetadataExt;
        let owner = fs::metadata(at).map_or(String::new(), |of| format!("{} {}", of.uid(), of.gid()));
        self.see(format!("{key}/owner"), owner);
        self.descriptors(at, key);
        // Threads share their memory. What a dead leader had is seen by its threads.
        let process = key.split_once('/').is_none();
        if process || text(&format!("{at}/../../smaps")).is_empty() {
            self.mappings(at, key);
        }
        Ok(())
    }

    fn see(&mut self, key: String, value: String) {
        self.view.insert(key, value);
    }

    fn each(&mut self, at: &str, key: &str) {
        for entry in fs::read_dir(at).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (path, key) = (format!("{at}/{name}"), format!("{key}/{name}"));
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.each(&path, &key),
                Ok(kind) if kind.is_symlink() => {
                    let target = link(&path);
                    // By which name it was made again smaps tells, too.
                    let deleted = key.contains("/map_files/") && target.ends_with(" (deleted)");
                    self.see(key, if deleted { "deleted".into() } else { target });
                }
                _ => self.see(key, text(&path)),
            }
        }
    }

    fn descriptors(&mut self, at: &str, key: &str) {
        for fd in numbers(&format!("{at}/fd")) {
            let target = link(&format!("{at}/fd/{fd}"));
            let deleted = target.ends_with(" (deleted)") && !Path::new(&target).exists();
            let numbered = target.starts_with("pipe:") || target.starts_with("socket:");
            let nameless = numbered || deleted || target.starts_with("/proc/");
            let nameless = nameless || target == "anon_inode:[pidfd]";
            let target = match deleted {
                true => self.names.same(&format!("deleted {}", inode(&format!("{at}/fd/{fd}")))),
                false if numbered => self.names.same(&target),
                false => target,
            };
            let info = text(&format!("{at}/fdinfo/{fd}"));
            let new = |line: &&str| {
                let line = line.split(':').next().unwrap_or_default().trim();
                excepted(FDINFO, line) || nameless && excepted(NAMELESS, line)
            };
            let mut info: Vec<String> = info
                .lines()
                .filter(|line| !new(line))
                .map(
                    |line| {
                        if line.starts_with("lock:") { lock(line) } else { without_inodes_of_targets(line) }
                    },
                )
                .collect();
            // By address in the kernel.
            info.sort_unstable();
            self.see(format!("{key}/fd/{fd}"), format!("{target} {}", info.join(" ").replace('\t', "")));
        }
    }

    /// Address range, protection, offset, device, inode, name and memory policy of each mapping, and its properties.
    fn mappings(&mut self, at: &str, key: &str) {
        let numa = text(&format!("{at}/numa_maps"));
        let policies: BTreeMap<&str, &str> = numa
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                Some((words.next()?, words.next()?))
            })
            .collect();
        // Start, end, everything else.
        let mut all: Vec<(String, String, String)> = Vec::new();
        for line in text(&format!("{at}/smaps")).lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((start, end)) = first.split_once('-') {
                let mut rest: Vec<String> = words.map(str::to_owned).collect();
                // What has no name is a new inode; that of a System V segment is its id.
                if line.ends_with(" (deleted)") && !line.contains("/SYSV") && rest.len() > 3 {
                    rest[3] = self.names.same(&rest[3]);
                    // Where another file has its name now, it was made again by another one.
                    let replaced = Path::new(&rest[4]).exists() || rest[4].contains("/.cryosleep-");
                    if replaced && !line.contains("/dev/zero") {
                        rest[4] = "replaced".into();
                    }
                }
                let policy = policies.get(start).copied().unwrap_or_default();
                all.push((start.to_owned(), end.to_owned(), format!("{} policy: {policy}", rest.join(" "))));
            } else if let (false, Some(current)) =
                (excepted(SMAPS, first.trim_end_matches(':')), all.last_mut())
            {
                // `sd` is whether somebody has cleared the marks of written pages (clear_refs), not a property.
                let words: Vec<&str> = words.filter(|word| *word != "sd").collect();
                current.2 += &format!(" {first} {}", words.join(" "));
            }
        }
        // Whether neighbours that are alike are one mapping or two depends on how they came about.
        all.dedup_by(|next, previous| {
            let nameless = ["policy:", "[heap] policy:"];
            let anonymous = nameless.iter().any(|rest| next.2.contains(&format!(" 00000000 00:00 0 {rest}")));
            let same = anonymous && next.0 == previous.1 && next.2 == previous.2;
            if same {
                previous.1 = next.1.clone();
            }
            same
        });
        for (start, end, rest) in all {
            self.see(format!("{key}/mapping {start}-{end}"), rest);
        }
    }
}

/// "/autogroup-25 nice 0": the number is the kernel's.
fn autogroup(text: &str) -> Vec<(String, String)> {
    text.trim().rsplit(' ').take(1).map(|nice| ("nice".to_owned(), nice.to_owned())).collect()
}

/// But for what has been mounted to look at them.
fn mounts(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains(LOOK)).collect();
    vec![("all".to_owned(), lines.join("\n"))]
}

/// Its other lines count pages.
fn ksm_stat(text: &str) -> Vec<(String, String)> {
    keyed(text, ':').filter(|(key, _)| key.starts_with("ksm_merge")).collect()
}

fn sched(text: &str) -> Vec<(String, String)> {
    let excepted = |key: &str| SCHED.iter().any(|(start, _)| key.starts_with(start));
    // The first line is the task's name.
    keyed(text, ':').skip(1).filter(|(key, _)| !excepted(key)).collect()
}

fn keyed(text: &str, by: char) -> impl Iterator<Item = (String, String)> {
    text.lines().map(move |line| {
        let (key, value) = line.split_once(by).unwrap_or((line, ""));
        (key.trim().to_owned(), value.trim().to_owned())
    })
}

fn stat(text: &str) -> Vec<(String, String)> {
    let fields = fields(text).unwrap_or_default();
    let state = fields.get(3).cloned().filter(|state| matches!(state.as_str(), "T" | "Z" | "t"));
    let excepted = |number: usize| STAT.iter().any(|(except, _)| *except == number);
    let compared = fields.into_iter().enumerate().skip(1).filter(|(number, _)| !excepted(*number));
    let compared = compared.map(|(number, field)| (number.to_string(), field));
    compared.chain(state.map(|state| ("state".to_owned(), state))).collect()
}

fn status(text: &str) -> Vec<(String, String)> {
    let dead = text.contains("\nState:\tZ");
    // Nothing can signal the dead any more.
    let history = |key: &str| dead && (key.starts_with("Sig") || key == "ShdPnd");
    keyed(text, ':').filter(|(key, _)| !history(key) && !excepted(STATUS, key)).collect()
}

/// The state letter of a task, as in /proc/PID/stat.
pub(crate) fn state(pid: u32) -> char {
    field(&format!("/proc/{pid}"), 3).chars().next().unwrap_or('X')
}

/// Those of all its threads.
pub(crate) fn states(pid: u32) -> Vec<char> {
    let tids = numbers(&format!("/proc/{pid}/task")).into_iter();
    tids.filter_map(|tid| field(&format!("/proc/{pid}/task/{tid}"), 3).chars().next()).collect()
}

/// For a test that hangs: where every task of the namespace is.
pub(crate) fn whereabouts() -> String {
    let describe = |at: String| {
        let line = |name: &str| text(&format!("{at}/{name}")).trim().replace('\n', " | ");
        format!(
            "{at}: {} {} wchan {} syscall {}\n  stack {}\n",
            line("comm"),
            field(&at, 3),
            line("wchan"),
            line("syscall"),
            line("stack")
        )
    };
    numbers("/proc")
        .into_iter()
        .filter(|pid| *pid != 1)
        .flat_map(|pid| {
            numbers(&format!("/proc/{pid}/task"))
                .into_iter()
                .map(move |tid| format!("/proc/{pid}/task/{tid}"))
        })
        .map(describe)
        .collect()
}
