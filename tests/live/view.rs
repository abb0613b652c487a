//! The outside view: what /proc shows of a tree, before a checkpoint and after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// One line for everything that must be the same, by where it was found: `pid/file/key`.
pub(crate) type View = BTreeMap<String, String>;

/// Lines of status that may differ.
const STATUS: &[(&str, &str)] = &[
    ("State", "sleeping or running is chance; `stopped` and `zombie` are compared by themselves"),
    ("VmPeak", "history"),
    ("VmHWM", "history"),
    ("VmRSS", "clean and zero pages come back when they are touched"),
    ("RssAnon", "as VmRSS"),
    ("RssFile", "as VmRSS"),
    ("RssShmem", "as VmRSS"),
    ("VmPTE", "page tables follow VmRSS"),
    ("VmSwap", "what was swapped out is read in"),
    ("SigQ", "counts all signals that are pending for the user, in all processes of the machine"),
    ("FDSize", "the size of a table that only grows: history"),
    ("voluntary_ctxt_switches", "history"),
    ("nonvoluntary_ctxt_switches", "history"),
];

/// Fields of stat that are the same, by their number in proc_pid_stat(5). Left out: times, faults and
/// resident size (history), addresses inside the kernel, the processor, and `flags`, which tells fork from exec.
const STAT: &[(usize, &str)] = &[
    (2, "comm"),
    (5, "pgrp"),
    (6, "session"),
    (7, "tty_nr"),
    (8, "tpgid"),
    (18, "priority"),
    (19, "nice"),
    (20, "num_threads"),
    (23, "vsize"),
    (25, "rsslim"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
    (52, "exit_code"),
];

/// Whole files, which must be the same byte for byte.
const FILES: &[&str] = &[
    "cmdline",
    "environ",
    "auxv",
    "comm",
    "personality",
    "limits",
    "oom_score_adj",
    "coredump_filter",
    "timerslack_ns",
    "cgroup",
    "timers",
];

/// Lines of fdinfo that may differ, by how they begin.
const FDINFO: &[(&str, &str)] = &[
    ("eventfd-id:", "the kernel counts them"),
    ("it_value:", "time goes on"),
    ("ticks:", "as it_value; what is unread is checked by the subjects"),
];

/// What an epoll instance watches may be a new pipe.
fn without_inodes_of_targets(line: &str) -> String {
    let end = line.find("ino:").filter(|_| line.starts_with("tfd:")).unwrap_or(line.len());
    line[..end].to_owned()
}

const LINKS: &[&str] = &["exe", "cwd", "root"];

/// The processes of the tree below `root`, itself included.
pub(crate) fn tree(root: u32) -> BTreeSet<u32> {
    let parents: BTreeMap<u32, u32> = numbers("/proc")
        .into_iter()
        .filter_map(|pid| Some((pid, stat_fields(&format!("/proc/{pid}"))?.get(4)?.parse().ok()?)))
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

/// Looks at the whole tree.
pub(crate) fn of(root: u32) -> View {
    let mut view = View::new();
    let mut names = Names::default();
    for pid in tree(root) {
        let at = format!("/proc/{pid}");
        if pid != root {
            view.insert(format!("{pid}/ppid"), field(&at, 4));
        }
        process(pid, &mut view, &mut names);
        for tid in numbers(&format!("{at}/task")) {
            task(&format!("{at}/task/{tid}"), &format!("{pid}/{tid}"), &mut view);
        }
    }
    view
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
    const RESTLESS: [&str; 3] = ["/status/SigBlk", "/status/SigPnd", "/status/ShdPnd"];
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
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
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
    let text = text(&format!("{at}/stat"));
    let (head, rest) = text.rsplit_once(')')?;
    let (pid, comm) = head.split_once('(')?;
    let mut fields = vec![String::new(), pid.trim().to_owned(), comm.to_owned()];
    fields.extend(rest.split_whitespace().map(str::to_owned));
    Some(fields)
}

fn field(at: &str, number: usize) -> String {
    stat_fields(at).and_then(|fields| fields.get(number).cloned()).unwrap_or_default()
}

fn process(pid: u32, view: &mut View, names: &mut Names) {
    let at = format!("/proc/{pid}");
    for name in FILES {
        view.insert(format!("{pid}/{name}"), text(&format!("{at}/{name}")));
    }
    for name in LINKS {
        view.insert(format!("{pid}/{name}"), link(&format!("{at}/{name}")));
    }
    for name in fs::read_dir(format!("{at}/ns")).into_iter().flatten().flatten() {
        let name = name.file_name().to_string_lossy().into_owned();
        view.insert(format!("{pid}/ns/{name}"), link(&format!("{at}/ns/{name}")));
    }
    for fd in numbers(&format!("{at}/fd")) {
        let target = link(&format!("{at}/fd/{fd}"));
        let deleted = target.ends_with(" (deleted)") && !std::path::Path::new(&target).exists();
        let nameless = target.starts_with("pipe:") || deleted || target.starts_with("/proc/");
        let nameless = nameless || target == "anon_inode:[pidfd]";
        let target = match deleted {
            true => names.same(&format!("deleted {}", inode(&format!("{at}/fd/{fd}")))),
            false if target.starts_with("pipe:") => names.same(&target),
            false => target,
        };
        let info = text(&format!("{at}/fdinfo/{fd}"));
        // A new pipe is a new inode, and so is a deleted file that was made again (perhaps by another name).
        let lines = info.lines().filter(|line| !(nameless && line.starts_with("ino:")));
        let mut info: Vec<String> = lines
            .filter(|line| !FDINFO.iter().any(|(start, _)| line.starts_with(start)))
            .map(|line| if line.starts_with("lock:") { lock(line) } else { without_inodes_of_targets(line) })
            .collect();
        // By address in the kernel.
        info.sort_unstable();
        view.insert(format!("{pid}/fd/{fd}"), format!("{target} {}", info.join(" ").replace('\t', "")));
    }
    mappings(pid, &text(&format!("{at}/smaps")), view, names);
}

/// Address range, protection, offset, device, inode and name of each mapping, its flags and its key.
fn mappings(pid: u32, smaps: &str, view: &mut View, names: &mut Names) {
    // Start, end, everything else.
    let mut all: Vec<(String, String, String)> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let mut rest: Vec<String> = words.map(str::to_owned).collect();
            // What has no name is a new inode; that of a System V segment is its id.
            if line.ends_with(" (deleted)") && !line.contains("/SYSV") && rest.len() > 3 {
                rest[3] = names.same(&rest[3]);
                // Where another file has its name now, it was made again by another one.
                let replaced = std::path::Path::new(&rest[4]).exists() || rest[4].contains("/.cryosleep-");
                if replaced && !line.contains("/dev/zero") {
                    rest[4] = "replaced".into();
                }
            }
            all.push((start.to_owned(), end.to_owned(), rest.join(" ")));
        } else if let (true, Some(current)) = (matches!(first, "VmFlags:" | "ProtectionKey:"), all.last_mut())
        {
            // `sd` is whether somebody has cleared the marks of written pages (clear_refs), not a property.
            let words: Vec<&str> = words.filter(|word| *word != "sd").collect();
            current.2 += &format!(" {first} {}", words.join(" "));
        }
    }
    // Whether neighbours that are alike are one mapping or two depends on how they came about.
    all.dedup_by(|next, previous| {
        let anonymous =
            next.2.contains(" 00000000 00:00 0 VmFlags") || next.2.contains(" 00000000 00:00 0 Prot");
        let same = anonymous && next.0 == previous.1 && next.2 == previous.2;
        if same {
            previous.1 = next.1.clone();
        }
        same
    });
    for (start, end, rest) in all {
        view.insert(format!("{pid}/mapping {start}-{end}"), rest);
    }
}

fn task(at: &str, key: &str, view: &mut View) {
    let fields = stat_fields(at).unwrap_or_default();
    for (number, name) in STAT {
        view.insert(format!("{key}/stat/{name}"), fields.get(*number).cloned().unwrap_or_default());
    }
    let state = fields.get(3).cloned().unwrap_or_default();
    let dead = state == "Z";
    if matches!(state.as_str(), "T" | "Z" | "t") {
        view.insert(format!("{key}/state"), state);
    }
    for line in text(&format!("{at}/status")).lines() {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        // Nothing can signal the dead any more.
        let history = dead && (name.starts_with("Sig") || name == "ShdPnd");
        if !history && !STATUS.iter().any(|(except, _)| *except == name) {
            view.insert(format!("{key}/status/{name}"), value.trim().to_owned());
        }
    }
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
