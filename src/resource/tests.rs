//! What holds for the registration lists: complete, unique, and all that a new kind needs besides its file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::all_records;

/// Every source file of the crate with its text.
fn sources() -> BTreeMap<PathBuf, String> {
    fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.insert(path.clone(), std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// The types of this trait, and the files that they are in.
fn implementors(of: &str) -> Vec<(String, PathBuf)> {
    let start = format!(" {of} for ");
    let mut types = Vec::new();
    for (path, text) in sources() {
        // What an image knows of its own segments is a record like any other.
        let inside = path.components().any(|part| part.as_os_str() == "resource")
            || path.ends_with("image/segment.rs");
        for line in text.lines().filter(|line| inside && line.starts_with("impl")) {
            let named = line.split_once(&start).map(|(_, rest)| name(rest).to_owned());
            types.extend(named.map(|name| (name, path.clone())));
        }
    }
    types
}

/// The name of a type, without its path, its parameters and whatever follows.
fn name(text: &str) -> &str {
    let path = text.split(['<', '>', ' ', '{']).next().unwrap();
    path.rsplit("::").next().unwrap()
}

/// The types that a list registers, from its source: `Something::of::<path::to::Type>(),`.
fn registered(file: &str, list: &str) -> BTreeSet<String> {
    let start = format!("const {list}: &[");
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/resource").join(file));
    let text = text.unwrap();
    let lines = text.lines().skip_while(|line| !line.contains(&start)).take_while(|line| *line != "];");
    lines.filter_map(|line| line.split_once("::of::<")).map(|(_, path)| name(path).to_owned()).collect()
}

#[test]
fn every_kind_is_registered() {
    let states = registered("mod.rs", "STATES");
    let kinds = registered("fds/mod.rs", "KINDS");
    let objects = registered("mod.rs", "OBJECTS");
    let names = |of| implementors(of).into_iter().map(|(name, _)| name).collect::<BTreeSet<_>>();
    assert_eq!(names("State"), states);
    assert_eq!(names("FileKind"), kinds);
    let all: BTreeSet<String> = [&states, &kinds, &objects].into_iter().flatten().cloned().collect();
    assert_eq!(names("Record"), all);
    assert_eq!(names("Paged"), registered("mod.rs", "PAGED"));
}

#[test]
fn tags_and_names_are_unique() {
    let tags: BTreeSet<_> = all_records().map(|record| record.tag).collect();
    let names: BTreeSet<_> = all_records().map(|record| record.name).collect();
    let count = all_records().count();
    assert_eq!((tags.len(), names.len()), (count, count));
    assert!(!tags.contains(&<crate::image::Manifest as crate::image::Record>::TAG));
}

/// A new kind is one file, its `mod` line and one line of a list: nothing else says its name.
#[test]
fn nothing_else_knows_a_kind() {
    /// The kinds that the engine does know, where, and why.
    const KNOWN: [(&str, &str); 1] = [
        // Batches are over when registers are set; they also say whether a thread was stopped.
        ("Registers", "restore/blueprint.rs"),
    ];
    for (kind, home) in implementors("State").into_iter().chain(implementors("FileKind")) {
        let path_to_it = format!("{}::{kind}", home.file_stem().unwrap().to_str().unwrap());
        for (path, text) in sources().iter().filter(|(path, _)| **path != home) {
            let known = KNOWN.iter().any(|(name, file)| *name == kind && path.ends_with(file));
            let mut code = text.lines().filter(|line| !line.contains("::of::<") && !line.contains("//"));
            let named = code.any(|line| {
                line.match_indices(&path_to_it).any(|(at, found)| {
                    !line[at + found.len()..].starts_with(|next: char| next.is_alphanumeric())
                })
            });
            assert!(!named || known, "{} names {kind}", path.display());
        }
    }
}

/// The README's table of what is supported is the registration lists, no more and no less.
#[test]
fn readme_lists_what_is_registered() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(path).unwrap();
    let table = text.split_once("<!-- supported -->").unwrap().1.split_once("<!-- end -->").unwrap().0;
    // Rows, without the head of the table and the line below it.
    let rows = table.lines().filter(|line| line.starts_with('|')).skip(2);
    let listed: Vec<&str> = rows.map(|row| row.trim_matches('|').split('|').next().unwrap().trim()).collect();
    let names: BTreeSet<&str> = all_records().map(|record| record.name).collect();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), names);
    assert_eq!(listed.len(), names.len(), "a kind is listed twice");
}
