//! The processes that are dumped and restored. Each fills memory with numbers that only depend on their
//! place, says where it is, lets go of everything that ties it to the bench, and waits.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use memmap2::{Advice, MmapMut};

use crate::{Result, engine};

pub(crate) const MIB: usize = 1024 * 1024;

/// What tells this program to be a subject: how much memory it is to have.
const ROLE: &str = "CRYOSLEEP_BENCH_SUBJECT";
/// The memory of the tiny ones: enough to show that it was restored.
const TINY: usize = 4096;

/// Open files in a table that many share.
const SHARED_FILES: usize = 1000;

/// In C: no dynamic linker, no runtime, the least that a process can be.
struct StaticC {
    name: &'static str,
    source: &'static str,
    program: OnceLock<PathBuf>,
}

static ONE: StaticC = StaticC { name: "tiny", source: include_str!("tiny.c"), program: OnceLock::new() };
static LAYOUTS: StaticC =
    StaticC { name: "layouts", source: include_str!("layouts.c"), program: OnceLock::new() };
static MANY: StaticC = StaticC { name: "many", source: include_str!("many.c"), program: OnceLock::new() };

pub(crate) enum Kind {
    /// A static C program: what other engines are measured with.
    StaticC,
    /// This program, dynamically linked.
    TinyRust,
    /// This program with that many bytes of touched anonymous memory.
    Memory(usize),
    /// A static C program with that many threads.
    Threads(usize),
    /// A tree of that many of them.
    Processes(usize),
    /// One with that many open files.
    Files(usize),
    /// One with an epoll instance that watches that many of them.
    Watches(usize),
    /// A tree of that many processes that share one table of files.
    Sharers(usize),
    /// Memory in another shape, of that many bytes and so many of what that shape consists of.
    Layout(Layout, usize, usize),
}

/// What benches/table/layouts.c makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Many small mappings.
    Mappings,
    /// A few pages of much address space.
    Sparse,
    /// Transparent huge pages.
    Huge,
    /// Processes with memory of their own.
    Processes,
    /// Processes that share memory by copy-on-write.
    Forked,
}

impl Layout {
    fn word(self) -> &'static str {
        match self {
            Layout::Mappings => "mappings",
            Layout::Sparse => "sparse",
            Layout::Huge => "huge",
            Layout::Processes => "processes",
            Layout::Forked => "forked",
        }
    }
}

impl Kind {
    pub(crate) fn name(&self) -> String {
        match self {
            Kind::StaticC => "tiny, static C".into(),
            Kind::TinyRust => "tiny, dynamic".into(),
            Kind::Memory(bytes) => size(*bytes),
            Kind::Layout(Layout::Mappings, bytes, count) => format!("{count} mappings, {}", size(*bytes)),
            Kind::Layout(Layout::Sparse, bytes, count) => format!("{count} pages of {}", size(*bytes)),
            Kind::Layout(Layout::Huge, bytes, _) => format!("{} THP", size(*bytes)),
            Kind::Layout(Layout::Processes, bytes, count) => format!("{count} x {}", size(*bytes)),
            Kind::Layout(Layout::Forked, bytes, count) => format!("{count} x {} forked", size(*bytes)),
            Kind::Threads(count) => format!("{count} threads"),
            Kind::Processes(count) => format!("{count} processes"),
            Kind::Files(count) => format!("{count} files"),
            Kind::Watches(count) => format!("{count} watches"),
            Kind::Sharers(count) => format!("{count} sharing files"),
        }
    }

    /// How many there are of what it is about.
    pub(crate) fn count(&self) -> Option<usize> {
        match self {
            Kind::Threads(count)
            | Kind::Processes(count)
            | Kind::Files(count)
            | Kind::Watches(count)
            | Kind::Sharers(count) => Some(*count),
            Kind::StaticC | Kind::TinyRust | Kind::Memory(_) | Kind::Layout(..) => None,
        }
    }

    /// Builds what has to be built.
    pub(crate) fn prepare(&self, dir: &Path) -> Result<()> {
        match self {
            Kind::StaticC => ONE.build(dir),
            Kind::Layout(..) => LAYOUTS.build(dir),
            Kind::TinyRust | Kind::Memory(_) => Ok(()),
            _ => MANY.build(dir),
        }
    }

    fn command(&self) -> Result<Command> {
        Ok(match self {
            Kind::StaticC => ONE.command::<usize>(&[])?,
            Kind::Threads(count) => MANY.command(&[*count, 1, 0, 0, 0])?,
            Kind::Processes(count) => MANY.command(&[1, *count, 0, 0, 0])?,
            Kind::Files(count) => MANY.command(&[1, 1, *count, 0, 0])?,
            Kind::Watches(count) => MANY.command(&[1, 1, 0, *count, 0])?,
            Kind::Sharers(count) => MANY.command(&[1, *count, SHARED_FILES, 0, 1])?,
            Kind::Layout(layout, bytes, count) => {
                LAYOUTS.command(&[layout.word().to_owned(), bytes.to_string(), count.to_string()])?
            }
            Kind::TinyRust => itself(TINY)?,
            Kind::Memory(bytes) => itself(*bytes)?,
        })
    }

    /// How much memory there is, where that is what it is about.
    pub(crate) fn populated(&self) -> Option<usize> {
        match self {
            Kind::Memory(bytes) | Kind::Layout(Layout::Mappings | Layout::Huge, bytes, _) => Some(*bytes),
            Kind::Layout(Layout::Sparse, _, count) => Some(count * PAGE),
            Kind::Layout(Layout::Processes, bytes, count) => Some(bytes * count),
            Kind::Layout(Layout::Forked, bytes, count) => Some(bytes + count * CHANGED),
            _ => None,
        }
    }

    /// How much of the area that is checked holds the numbers, and at which distance its pages are.
    fn extent(&self) -> (usize, usize) {
        match self {
            Kind::Layout(Layout::Sparse, bytes, count) => (*bytes, bytes / count / PAGE * PAGE),
            Kind::Layout(Layout::Forked, bytes, _) => (bytes - CHANGED, PAGE),
            Kind::Memory(bytes) | Kind::Layout(_, bytes, _) => (*bytes, PAGE),
            _ => (TINY, PAGE),
        }
    }

    fn processes(&self) -> usize {
        match self {
            Kind::Layout(Layout::Processes | Layout::Forked, _, count) => *count,
            Kind::Threads(count) | Kind::Processes(count) | Kind::Sharers(count) => *count,
            _ => 1,
        }
    }
}

pub(crate) const PAGE: usize = 4096;
/// What each process of [`Layout::Forked`] has for itself.
const CHANGED: usize = MIB;

fn size(bytes: usize) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1024 * MIB) => format!("{} GiB", bytes / MIB / 1024),
        bytes => format!("{} MiB", bytes / MIB),
    }
}

impl StaticC {
    fn build(&self, dir: &Path) -> Result<()> {
        if self.program.get().is_some() {
            return Ok(());
        }
        let program = dir.join(self.name);
        let source = program.with_extension("c");
        fs::write(&source, self.source)?;
        let cc =
            Command::new("cc").args(["-O1", "-pthread", "-static", "-o"]).arg(&program).arg(&source).output();
        let built = cc.map_err(|error| format!("cc: {error}"))?;
        if !built.status.success() {
            return Err(format!("cc -static: {}", String::from_utf8_lossy(&built.stderr)).into());
        }
        self.program.get_or_init(|| program);
        Ok(())
    }

    fn command<T: ToString>(&self, arguments: &[T]) -> Result<Command> {
        let mut command = Command::new(self.program.get().ok_or("it has not been built")?);
        command.args(arguments.iter().map(T::to_string));
        Ok(command)
    }
}

fn itself(bytes: usize) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env_clear().env(ROLE, bytes.to_string());
    Ok(command)
}

/// Is this process to be a subject? With how many bytes?
pub(crate) fn role() -> Option<usize> {
    std::env::var(ROLE).ok()?.parse().ok()
}

/// The subject's whole life.
pub(crate) fn live(bytes: usize) -> Result<()> {
    nix::unistd::setsid()?;
    close_inherited()?;
    let memory = memory(bytes)?;
    println!("{}", memory.as_ptr() as usize);
    // Standard output was the bench's pipe: its end tells the bench that this is ready.
    nix::unistd::dup2_stdout(std::io::stdin())?;
    loop {
        nix::unistd::pause();
    }
}

fn close_inherited() -> Result<()> {
    let open = fs::read_dir("/proc/self/fd")?.flatten();
    let numbers: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2) {
        // The directory's own descriptor is closed already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// Anonymous 4K pages, every word of which holds its own number.
pub(crate) fn memory(bytes: usize) -> Result<MmapMut> {
    let mut memory = MmapMut::map_anon(bytes)?;
    memory.advise(Advice::NoHugePage)?;
    fill(&mut memory, 0);
    Ok(memory)
}

fn fill(memory: &mut [u8], first: usize) {
    for (index, word) in memory.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&number(first + index).to_ne_bytes());
    }
}

/// Looks random, so that no page is like another or compresses well, and depends on nothing but its place.
fn number(place: usize) -> u64 {
    let mixed = (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ mixed >> 29
}

/// A running subject that has said that it is ready.
pub(crate) struct Subject {
    child: Child,
    contents: Contents,
}

/// What a subject must hold, before and after.
#[derive(Clone, Copy)]
pub(crate) struct Contents {
    address: u64,
    extent: (usize, usize),
    tasks: usize,
    /// All processes have memory to be checked, not only the root.
    all: bool,
}

impl Subject {
    pub(crate) fn start(kind: &Kind) -> Result<Self> {
        let mut command = kind.command()?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn()?;
        let mut subject = Self {
            child,
            contents: Contents {
                address: 0,
                extent: kind.extent(),
                tasks: kind.processes(),
                all: matches!(kind, Kind::Layout(..)),
            },
        };
        let mut said = String::new();
        subject.child.stdout.take().ok_or("no pipe")?.read_to_string(&mut said)?;
        subject.contents.address = said.trim().parse().map_err(|_| "the subject did not get ready")?;
        Ok(subject)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn contents(&self) -> Contents {
        self.contents
    }

    /// Makes room for the pid, after a dump that has ended it.
    pub(crate) fn reap(mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Only matters on the way out of an error: otherwise it is dead and waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Contents {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Reads all of it out of the process, and counts the tasks of its tree.
    pub(crate) fn verify(&self, pid: u32) -> Result<()> {
        let root = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
        let mut tasks = 0;
        let processes: Vec<_> = engine::descendants(root)?.into_iter().chain([root]).collect();
        for process in &processes {
            tasks += fs::read_dir(format!("/proc/{process}/task"))?.count();
        }
        if tasks != self.tasks {
            return Err(format!("{tasks} tasks instead of {}", self.tasks).into());
        }
        let checked = processes.iter().filter(|process| self.all || **process == root);
        checked.into_iter().try_for_each(|process| self.verify_one(*process))
    }

    fn verify_one(&self, process: nix::unistd::Pid) -> Result<()> {
        let memory = File::open(format!("/proc/{process}/mem"))?;
        let (len, stride) = self.extent;
        let piece = if stride == PAGE { len.min(MIB) } else { PAGE };
        let (mut seen, mut expected) = (vec![0; piece], vec![0; piece]);
        for start in (0..len).step_by(piece.max(stride)) {
            let piece = piece.min(len - start);
            let (seen, expected) = (&mut seen[..piece], &mut expected[..piece]);
            memory.read_exact_at(seen, self.address + start as u64)?;
            fill(expected, start / 8);
            if seen != expected {
                return Err(format!("the restored memory of {process} differs at {start:#x}").into());
            }
        }
        Ok(())
    }
}
