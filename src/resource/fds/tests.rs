//! Images that contradict themselves are refused before anything is made of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::table::Slot;
use super::{Builder, Description, FdTable, FileRef, FileValidation, Finder, Glance, Inherited, Probe};
use crate::Pid;
use crate::error::{ErrorKind, Result};
use crate::image::{Image, ImageWriter, ManifestInfo, Owner, Record, Records};

/// A directory for one test, gone with it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cryosleep-fds-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // No symbolic link leads to it.
        let path = std::env::temp_dir().canonicalize().unwrap().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Opened anew.
    pub(super) fn file(&self, name: &str) -> fs::File {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path(name))
            .unwrap()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "image").collect()
    }

    /// An image with these records and one page segment of 4096 bytes.
    pub(crate) fn image(&self, put: impl FnOnce(&mut Records)) -> Image {
        let mut writer = ImageWriter::create(&self.path("image")).unwrap();
        writer.segment().unwrap().file().unwrap().set_len(4096).unwrap();
        let mut records = Records::new().unwrap();
        put(&mut records);
        writer.finish(records, ManifestInfo { root: Pid::from(1) }).unwrap();
        Image::open(&self.path("image")).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes all files of an image.
pub(super) fn make(image: &Image) -> Result<()> {
    let finder = Finder::new(image, FileValidation::Size)?;
    Builder::new(image, finder, Inherited::default(), Default::default()).make_all()
}

/// Is an image refused that has this record as its only open file?
pub(super) fn refuses<R: Record>(record: &R) -> bool {
    let scratch = Scratch::new();
    let image = scratch.image(|records| {
        records.put(Owner(1), &Description { flags: libc::O_RDWR }).unwrap();
        records.put(Owner(1), record).unwrap();
    });
    match make(&image) {
        Ok(()) => false,
        Err(error) => error.kind() == ErrorKind::Image || panic!("{error}"),
    }
}

pub(super) fn refused(image: &Image, kind: ErrorKind) -> String {
    let error = make(image).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

/// One slot of our own, as if it were of a task.
pub(super) fn probe(file: &fs::File) -> Probe {
    use std::os::fd::AsRawFd;
    let (own, fd) = (Pid::from(std::process::id()), file.as_raw_fd());
    Probe::new(own, fd, Glance::at(own, fd, file.try_clone().unwrap().into()).unwrap()).unwrap()
}

#[test]
fn slots_in_order_and_their_locks() {
    let slot = |fd| Slot { fd, close_on_exec: false, description: 1 };
    let table =
        |fds: &[i32]| FdTable { slots: fds.iter().copied().map(slot).collect(), ..FdTable::default() };
    table(&[0, 3, 7]).check().unwrap();
    for wrong in [&[3, 0][..], &[1, 1], &[-1, 0]] {
        assert_eq!(table(wrong).check().unwrap_err().kind(), ErrorKind::Image);
    }
    let locked = |fd, start, last| FdTable {
        locks: vec![super::locks::TableLock::new(fd, start, last)],
        ..table(&[0, 3])
    };
    locked(3, 5, Some(9)).check().unwrap();
    for wrong in [locked(2, 5, None), locked(3, 5, Some(4)), locked(0, u64::MAX, None)] {
        assert_eq!(wrong.check().unwrap_err().kind(), ErrorKind::Image);
    }
}

#[test]
fn descriptors_of_nothing_and_files_of_no_kind() {
    let table =
        FdTable { slots: vec![Slot { fd: 3, close_on_exec: false, description: 2 }], ..FdTable::default() };
    table.check_references(&[1, 2].into()).unwrap();
    assert_eq!(table.check_references(&[1].into()).unwrap_err().kind(), ErrorKind::Image);
    let scratch = Scratch::new();
    let put = |records: &mut Records| records.put(Owner(1), &Description { flags: 0 }).unwrap();
    assert!(refused(&scratch.image(put), ErrorKind::Image).contains("without its kind"));
}

/// A number that no process can have, before there is one.
#[test]
fn numbers_have_a_limit() {
    let room = super::Room::find().unwrap();
    room.check(100).unwrap();
    assert_eq!(room.check(i32::MAX).unwrap_err().kind(), ErrorKind::Conflict);
}

/// What a path leads to must be what it is said to be, with nothing in between.
#[test]
fn paths_that_lead_elsewhere() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "").unwrap();
    std::os::unix::fs::symlink(scratch.path("file"), scratch.path("link")).unwrap();
    fs::create_dir(scratch.path("dir")).unwrap();
    let named = |path: &Path| FileRef::of_test(path, libc::S_IFREG);
    let finder = Finder::of_nothing();
    let open = |path: &Path| finder.open(&named(path), nix::fcntl::OFlag::O_RDONLY);
    open(&scratch.path("file")).unwrap();
    for wrong in ["dir/../file", "link", "dir", "none", "file/x"] {
        assert_eq!(open(&scratch.path(wrong)).unwrap_err().kind(), ErrorKind::Conflict, "{wrong}");
    }
    open(Path::new("file")).unwrap_err();
    // A fifo must not be waited for.
    fs::remove_file(scratch.path("file")).unwrap();
    nix::unistd::mkfifo(&scratch.path("file"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(open(&scratch.path("file")).unwrap_err().kind(), ErrorKind::Conflict);
}
