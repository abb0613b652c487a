//! The container: a header, then sections. Pure: bytes in, bytes out.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::Range;

use super::{Owner, Record, Tag, decode, encode};
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};

const MAGIC: [u8; 8] = *b"CRYOSLP\n";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 16;
/// Of a section: everything before its payload, and that without the checksum.
const PREFIX_LEN: usize = 24;
const CHECKED_LEN: usize = 20;

/// What a container is for, so that one file is never taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    State,
    Manifest,
}

impl Kind {
    const fn bytes(self) -> [u8; 4] {
        match self {
            Kind::State => *b"STAT",
            Kind::Manifest => *b"MANI",
        }
    }
}

/// Does this begin like a container of any kind or version?
pub(super) fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// One section as it stands in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Section<'a> {
    pub(crate) tag: Tag,
    pub(crate) version: u16,
    pub(crate) owner: Owner,
    pub(crate) payload: &'a [u8],
}

impl Section<'_> {
    /// Does it say something of the image's own page segments?
    pub(crate) fn is_of_segments(&self) -> bool {
        self.tag == super::segment::Chunks::TAG
    }

    pub(crate) fn subject(&self) -> Subject {
        subject(self.tag, self.owner)
    }

    /// Decodes the payload, which the caller knows to carry the tag of `R`.
    pub(crate) fn record<R: Record>(&self) -> Result<R> {
        match self.version {
            version if version == R::VERSION => decode(self.payload),
            version if version > R::VERSION => Err(newer(version, R::VERSION)),
            version => R::upgrade(version, self.payload),
        }
        .about(|| named::<R>(self.owner))
    }
}

fn newer(found: u16, known: u16) -> Error {
    let reason = format!("written in version {found} of this record: this library reads up to {known}");
    Error::new(ErrorKind::Image, reason).with_hint("use the version of the library that wrote the image")
}

fn subject(tag: Tag, owner: Owner) -> Subject {
    Subject::Section(format!("{tag} {owner}"))
}

/// The subject of errors about one record.
pub(super) fn named<R: Record>(owner: Owner) -> Subject {
    Subject::Section(format!("{} {owner} ({})", R::TAG, R::NAME))
}

fn torn(reason: &'static str) -> Error {
    Error::new(ErrorKind::Image, reason)
}

/// Where the sections of a container are. Holds no bytes: each question brings them again.
#[derive(Debug)]
pub(crate) struct Sections(BTreeMap<(Tag, Owner), Entry>);

#[derive(Debug)]
struct Entry {
    version: u16,
    payload: Range<usize>,
}

impl Sections {
    /// Finds and verifies every section of a container.
    pub(crate) fn parse(bytes: &[u8], kind: Kind) -> Result<Self> {
        check_header(bytes, kind)?;
        let mut sections = BTreeMap::new();
        let mut at = HEADER_LEN;
        while at < bytes.len() {
            let (key, entry) = parse_section(bytes, at)?;
            at = entry.payload.end;
            if sections.insert(key, entry).is_some() {
                return Err(torn("the section is there twice").about(subject(key.0, key.1)));
            }
        }
        Ok(Self(sections))
    }

    pub(crate) fn get<'a>(&self, bytes: &'a [u8], tag: Tag, owner: Owner) -> Option<Section<'a>> {
        let Entry { version, payload } = self.0.get(&(tag, owner))?;
        Some(Section { tag, version: *version, owner, payload: bytes.get(payload.clone())? })
    }

    /// All sections, by tag and owner.
    pub(crate) fn iter<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = Section<'a>> + 'a {
        self.0.keys().filter_map(move |(tag, owner)| self.get(bytes, *tag, *owner))
    }

    pub(crate) fn owners(&self, tag: Tag) -> impl Iterator<Item = Owner> + '_ {
        self.0.range((tag, Owner(0))..=(tag, Owner(u32::MAX))).map(|((_, owner), _)| *owner)
    }
}

fn check_header(bytes: &[u8], kind: Kind) -> Result<()> {
    if !has_magic(bytes) {
        return Err(torn("not a file of a cryosleep image"));
    }
    let mut fields = Fields(bytes.get(MAGIC.len()..).unwrap_or_default());
    match fields.u32() {
        Some(VERSION) => {}
        Some(version) => {
            let reason = format!("container version {version}: this library reads version {VERSION}");
            return Err(Error::new(ErrorKind::Image, reason));
        }
        None => return Err(torn("cut off in its header")),
    }
    match fields.take::<4>() {
        Some(found) if found == kind.bytes() => Ok(()),
        Some(_) => Err(torn("another file of an image than its name says")),
        None => Err(torn("cut off in its header")),
    }
}

fn parse_section(bytes: &[u8], start: usize) -> Result<((Tag, Owner), Entry)> {
    let rest = bytes.get(start..).unwrap_or_default();
    let cut = || torn("cut off in the header of a section");
    let checked = rest.get(..CHECKED_LEN).ok_or_else(cut)?;
    let mut fields = Fields(rest);
    let tag = Tag(fields.take().ok_or_else(cut)?);
    let version = fields.u16().ok_or_else(cut)?;
    let reserved = fields.u16().ok_or_else(cut)?;
    let owner = Owner(fields.u32().ok_or_else(cut)?);
    let length = fields.u64().ok_or_else(cut)?;
    let checksum = fields.u32().ok_or_else(cut)?;
    if !tag.is_plausible() || reserved != 0 {
        return Err(torn("a section with a malformed header").about(subject(tag, owner)));
    }
    let payload = usize::try_from(length).ok().and_then(|length| fields.0.get(..length));
    let payload = payload.ok_or_else(|| torn("cut off").about(subject(tag, owner)))?;
    if checksum_of(checked, payload) != checksum && !cfg!(fuzzing) {
        return Err(torn("the checksum does not match").about(subject(tag, owner)));
    }
    let first = start + PREFIX_LEN; // cannot overflow: all these bytes are there
    Ok(((tag, owner), Entry { version, payload: first..first + payload.len() }))
}

fn checksum_of(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

/// Little-endian fields, taken one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Writes a container, section by section.
#[derive(Debug)]
pub(crate) struct SectionWriter<W> {
    out: W,
    written: BTreeSet<(Tag, Owner)>,
}

impl<W: Write> SectionWriter<W> {
    pub(crate) fn new(mut out: W, kind: Kind) -> Result<Self> {
        let mut header = [0; HEADER_LEN];
        Filler(&mut header).put(&MAGIC).put(&VERSION.to_le_bytes()).put(&kind.bytes());
        out.write_all(&header).call("write")?;
        Ok(Self { out, written: BTreeSet::new() })
    }

    pub(crate) fn put_record<R: Record>(&mut self, owner: Owner, record: &R) -> Result<()> {
        encode(record)
            .and_then(|payload| {
                self.put(Section { tag: R::TAG, version: R::VERSION, owner, payload: &payload })
            })
            .about(|| named::<R>(owner))
    }

    pub(crate) fn put(&mut self, section: Section<'_>) -> Result<()> {
        let Section { tag, version, owner, payload } = section;
        if !tag.is_plausible() {
            return Err(torn("the tag is not ASCII").about(subject(tag, owner)));
        }
        if !self.written.insert((tag, owner)) {
            return Err(torn("the section is written twice").about(subject(tag, owner)));
        }
        let mut header = [0; PREFIX_LEN];
        Filler(&mut header)
            .put(&tag.bytes())
            .put(&version.to_le_bytes())
            .put(&[0; 2])
            .put(&owner.0.to_le_bytes())
            .put(&(payload.len() as u64).to_le_bytes());
        let (checked, checksum) = header.split_at_mut(CHECKED_LEN);
        Filler(checksum).put(&checksum_of(checked, payload).to_le_bytes());
        self.out.write_all(&header).and_then(|()| self.out.write_all(payload)).call("write")
    }

    pub(crate) fn get_ref(&self) -> &W {
        &self.out
    }

    pub(crate) fn into_inner(self) -> W {
        self.out
    }
}

/// Fills a buffer from its start.
struct Filler<'a>(&'a mut [u8]);

impl<'a> Filler<'a> {
    fn put(self, bytes: &[u8]) -> Filler<'a> {
        match self.0.split_at_mut_checked(bytes.len()) {
            Some((head, tail)) => {
                head.copy_from_slice(bytes);
                Filler(tail)
            }
            None => Filler(&mut []), // our own headers fit: their lengths are constants above
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::image::{Decode, Encode};

    #[derive(Encode, Decode, Debug, PartialEq, Clone)]
    pub(in crate::image) struct Thing {
        pub(in crate::image) name: String,
        pub(in crate::image) values: Vec<u32>,
    }

    impl Record for Thing {
        const TAG: Tag = Tag::new(b"THNG");
        const VERSION: u16 = 2;
        const NAME: &'static str = "thing";

        fn upgrade(version: u16, payload: &[u8]) -> Result<Self> {
            match version {
                1 => Ok(Thing { name: decode::<Older>(payload)?.0, values: Vec::new() }),
                _ => Err(torn("too old")),
            }
        }
    }

    #[derive(Encode, Decode, Debug)]
    struct Older(String);

    impl Record for Older {
        const TAG: Tag = Tag::new(b"THNG");
        const VERSION: u16 = 1;
        const NAME: &'static str = "older thing";
    }

    #[derive(Encode, Decode, Debug)]
    struct Newer(u8);

    impl Record for Newer {
        const TAG: Tag = Tag::new(b"THNG");
        const VERSION: u16 = 9;
        const NAME: &'static str = "newer thing";
    }

    pub(in crate::image) fn thing(name: &str) -> Thing {
        Thing { name: name.into(), values: vec![1, 2, 3] }
    }

    fn container() -> Vec<u8> {
        let mut writer = SectionWriter::new(Vec::new(), Kind::State).unwrap();
        writer.put_record(Owner(7), &thing("seven")).unwrap();
        writer.put_record(Owner(3), &thing("three")).unwrap();
        writer.put(Section { tag: Tag::new(b"ELSE"), version: 1, owner: Owner(0), payload: b"" }).unwrap();
        writer.into_inner()
    }

    fn refused(bytes: &[u8]) -> String {
        let error = Sections::parse(bytes, Kind::State).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
        error.to_string()
    }

    #[test]
    fn round_trip_in_order_of_owners() {
        let bytes = container();
        let sections = Sections::parse(&bytes, Kind::State).unwrap();
        assert_eq!(sections.owners(Thing::TAG).collect::<Vec<_>>(), [Owner(3), Owner(7)]);
        let section = sections.get(&bytes, Thing::TAG, Owner(7)).unwrap();
        assert_eq!(section.record::<Thing>().unwrap(), thing("seven"));
        assert_eq!(sections.iter(&bytes).count(), 3);
        assert!(sections.get(&bytes, Thing::TAG, Owner(8)).is_none());
    }

    #[test]
    fn a_cut_between_sections_loses_them_and_any_other_cut_is_an_error() {
        let bytes = container();
        let sections = Sections::parse(&bytes, Kind::State).unwrap();
        let mut ends: Vec<usize> = sections.0.values().map(|entry| entry.payload.end).collect();
        ends.push(HEADER_LEN);
        for len in 0..bytes.len() {
            if !ends.contains(&len) {
                refused(&bytes[..len]);
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let bytes = container();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&bytes);
        }
    }

    #[test]
    fn refuses_duplicates_on_both_sides() {
        let mut writer = SectionWriter::new(Vec::new(), Kind::State).unwrap();
        writer.put_record(Owner(1), &thing("a")).unwrap();
        let error = writer.put_record(Owner(1), &thing("b")).unwrap_err();
        assert!(error.to_string().contains("section THNG 1"), "{error}");

        let mut bytes = container();
        bytes.extend_from_within(HEADER_LEN..);
        assert!(refused(&bytes).contains("section THNG 7: the section is there twice"));
    }

    #[test]
    fn refuses_foreign_files() {
        assert!(refused(b"").contains("not a file"));
        assert!(refused(b"\x7fELF\x02\x01\x01 and so on and so on").contains("not a file"));
        let error = Sections::parse(&container(), Kind::Manifest).unwrap_err();
        assert!(error.to_string().contains("another file"), "{error}");
        let mut bytes = container();
        bytes[8] = 2;
        assert!(refused(&bytes).contains("container version 2"));
    }

    #[test]
    fn refuses_what_is_newer_and_upgrades_what_is_older() {
        let mut writer = SectionWriter::new(Vec::new(), Kind::State).unwrap();
        writer.put_record(Owner(1), &Newer(1)).unwrap();
        writer.put_record(Owner(2), &Older("old".into())).unwrap();
        let bytes = writer.into_inner();
        let sections = Sections::parse(&bytes, Kind::State).unwrap();
        let get = |owner| sections.get(&bytes, Thing::TAG, Owner(owner)).unwrap();

        let error = get(1).record::<Thing>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
        assert!(error.to_string().contains("version 9") && error.to_string().contains("up to 2"), "{error}");
        assert_eq!(get(2).record::<Thing>().unwrap().name, "old");
        let error = get(2).record::<Newer>().unwrap_err();
        assert!(error.to_string().contains("version 1 of this record is too old"), "{error}");
    }

    #[test]
    fn hostile_section_length() {
        let mut bytes = container();
        bytes[HEADER_LEN + 12..HEADER_LEN + 20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(refused(&bytes).contains("cut off"));
    }
}
