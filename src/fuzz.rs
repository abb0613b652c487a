//! What the fuzz targets run, and what the unit tests run on the corpus. Not part of the library.

use crate::image::{Kind, Manifest, Record, SectionWriter, Sections, decode, encode};

/// Any bytes as a state file: what parses can be written again and reads the same.
pub fn container(bytes: &[u8]) {
    let Ok(sections) = Sections::parse(bytes, Kind::State) else { return };
    let mut writer = SectionWriter::new(Vec::new(), Kind::State).expect("a vector takes all bytes");
    sections.iter(bytes).for_each(|section| writer.put(section).expect("no section is there twice"));
    let rewritten = writer.into_inner();
    assert_eq!(rewritten.len(), bytes.len());
    let again = Sections::parse(&rewritten, Kind::State).expect("our own bytes are readable");
    assert!(sections.iter(bytes).eq(again.iter(&rewritten)));
}

/// Any bytes as a manifest.
pub fn manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::from_bytes(bytes) else { return };
    let rewritten = manifest.to_bytes().expect("what was read can be written");
    let again = Manifest::from_bytes(&rewritten).expect("our own bytes are readable");
    assert_eq!(format!("{manifest:?}"), format!("{again:?}"));
}

/// Any bytes as the stream form of an image: no part is longer than what came.
pub fn stream(bytes: &[u8]) {
    let mut taken = 0;
    let read = crate::image::unpack(&mut &*bytes, |_, offset, piece| {
        taken += piece.len();
        assert!(offset + piece.len() as u64 <= taken as u64);
        Ok(())
    });
    assert!(taken <= bytes.len());
    drop(read);
}

/// Any bytes as a record: the first byte chooses which.
pub fn record(bytes: &[u8]) {
    let Some((choice, payload)) = bytes.split_first() else { return };
    let decoders = decoders();
    decoders[usize::from(*choice) % decoders.len()](payload);
}

/// Any bytes as a /proc file: the first byte chooses which.
pub fn proc_file(bytes: &[u8]) {
    crate::proc::fuzz_all(bytes);
}

/// One decoder for each kind of record. Their order is part of the corpus: append only.
fn decoders() -> Vec<fn(&[u8])> {
    std::iter::once(round_trip::<Manifest> as fn(&[u8]))
        .chain(crate::resource::all_records().map(|kind| kind.fuzz))
        .collect()
}

pub(crate) fn round_trip<R: Record>(payload: &[u8]) {
    let Ok(record) = decode::<R>(payload) else { return };
    let encoded = encode(&record).expect("what was read can be written");
    let again = decode::<R>(&encoded).expect("our own bytes are readable");
    assert_eq!(format!("{record:?}"), format!("{again:?}"));
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::image::{
        ImageStore, Kind, Manifest, Owner, Part, Section, SectionWriter, StreamStore, Tag, encode,
    };

    fn corpus_of(target: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "fuzz", "corpus", target].iter().collect()
    }

    fn stream(manifest: &[u8], records: &[u8]) -> Vec<u8> {
        let mut stream = Vec::new();
        let mut store = StreamStore::new(&mut stream);
        for (part, bytes) in
            [(Part::Pages(0), &[7; 64][..]), (Part::Records, records), (Part::Manifest, manifest)]
        {
            store.append(part, bytes).unwrap();
        }
        store.finish().unwrap();
        stream
    }

    fn run_corpus(target: &str, run: fn(&[u8])) {
        // The published package has none.
        let Ok(entries) = std::fs::read_dir(corpus_of(target)) else { return };
        entries.for_each(|entry| run(&std::fs::read(entry.unwrap().path()).unwrap()));
    }

    #[test]
    fn corpus() {
        run_corpus("container", super::container);
        run_corpus("manifest", super::manifest);
        run_corpus("stream", super::stream);
        run_corpus("records", super::record);
        run_corpus("proc_files", super::proc_file);
    }

    #[test]
    fn seeds_are_readable() {
        let Ok(seed) = std::fs::read(corpus_of("manifest").join("seed")) else { return };
        Manifest::from_bytes(&seed).unwrap();
        let seed = std::fs::read(corpus_of("container").join("seed")).unwrap();
        assert_eq!(super::Sections::parse(&seed, Kind::State).unwrap().iter(&seed).count(), 3);
        let seed = std::fs::read(corpus_of("stream").join("seed")).unwrap();
        crate::image::unpack(&mut &*seed, |_, _, _| Ok(())).unwrap();
    }

    /// Run it by name after a change of the format: `cargo test --lib write_seeds -- --ignored`.
    #[test]
    #[ignore = "writes into the source tree"]
    fn write_seeds() {
        let write = |target, bytes: &[u8]| std::fs::write(corpus_of(target).join("seed"), bytes).unwrap();
        let manifest = Manifest::sample();
        write("manifest", &manifest.to_bytes().unwrap());
        write("records", &[&[0], &encode(&manifest).unwrap()[..]].concat());
        let mut writer = SectionWriter::new(Vec::new(), Kind::State).unwrap();
        writer.put_record(Owner(7), &manifest).unwrap();
        for (tag, payload) in [(b"SOME", &b"payload"[..]), (b"NONE", b"")] {
            let section = Section { tag: Tag::new(tag), version: 1, owner: Owner(u32::MAX), payload };
            writer.put(section).unwrap();
        }
        let container = writer.into_inner();
        write("container", &container);
        write("stream", &stream(&manifest.to_bytes().unwrap(), &container));
    }
}
