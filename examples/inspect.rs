//! What is in an image: `inspect DIR` for people, `inspect DIR --json` for tools.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a program, not a library

use std::error::Error;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::UNIX_EPOCH;

use cryosleep::inspect::{Content, Inspection, Process, Section};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HELP: &str = "\
usage: inspect DIR [--verify] [--records] [--json]

Shows what the image in DIR holds, after it has been verified (but for the contents of pages).

  --verify   the contents of pages, too, are read and verified first
  --records  the contents of every record too
  --json     everything as one JSON object; sizes are in bytes
  --help     this text
";

#[derive(Default)]
struct Options {
    dir: Option<String>,
    verify: bool,
    records: bool,
    json: bool,
    help: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inspect: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let options = parse()?;
    let text = if options.help {
        HELP.to_owned()
    } else {
        let image = Inspection::open(options.dir.ok_or("which directory? see --help")?)?;
        if options.verify {
            image.verify_pages()?;
        }
        if options.json {
            serde_json::to_string_pretty(&as_json(&image)?)? + "\n"
        } else {
            show(&image, options.records)?
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()), // somebody has seen enough
        written => Ok(written?),
    }
}

fn parse() -> Result<Options> {
    let mut options = Options::default();
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--verify" => options.verify = true,
            "--records" => options.records = true,
            "--json" => options.json = true,
            "--help" | "-h" => options.help = true,
            option if option.starts_with('-') => {
                return Err(format!("unknown option {option}; see --help").into());
            }
            _ if options.dir.is_some() => return Err("more than one directory".into()),
            _ => options.dir = Some(arg),
        }
    }
    Ok(options)
}

fn show(image: &Inspection, records: bool) -> Result<String> {
    let manifest = image.manifest();
    let since_1970 = manifest.created.duration_since(UNIX_EPOCH)?.as_secs();
    let mut lines = vec![
        format!("image    {}", hex(&manifest.id)),
        format!(
            "format   {} (cryosleep {}), {} bytes of records",
            manifest.format, manifest.library, manifest.state_len
        ),
        format!(
            "machine  {}, Linux {}, pages of {} bytes",
            manifest.arch, manifest.kernel, manifest.page_size
        ),
        format!("created  {since_1970} seconds after 1970"),
    ];
    lines.extend(
        image
            .parents()
            .iter()
            .map(|parent| format!("parent   {} in {}", hex(&parent.manifest.id), parent.dir.display())),
    );
    lines.extend([String::new(), "processes".to_owned()]);
    if manifest.content == Content::Pages {
        lines.push("  none: this is a pre-dump, which holds pages only".to_owned());
    }
    let processes = processes(image)?;
    lines.extend(processes.iter().map(|process| show_process(process, &processes)));
    lines.extend([
        String::new(),
        format!("{:<5}{:>10} {:>8} {:>9}  record", "tag", "owner", "version", "bytes"),
    ]);
    for section in image.sections() {
        lines.push(show_section(&section));
        if records {
            lines.push(format!("      {}", section.text()?));
        }
    }
    lines.extend([String::new(), "pages".to_owned()]);
    lines.extend(image.segments().map(|segment| {
        let packed = if segment.contents > segment.len { "compressed to " } else { "" };
        let full = if packed.is_empty() { String::new() } else { format!("{} bytes, ", segment.contents) };
        format!("  {}  {full}{packed}{} bytes", segment.file, segment.len)
    }));
    Ok(lines.join("\n") + "\n")
}

/// A pre-dump has none.
fn processes(image: &Inspection) -> Result<Vec<Process>> {
    match image.manifest().content {
        Content::Pages => Ok(Vec::new()),
        _ => Ok(image.processes()?),
    }
}

/// Children are further right than their parents.
fn show_process(process: &Process, all: &[Process]) -> String {
    let parent_of = |child: &&Process| all.iter().find(|other| other.pid == child.parent);
    let depth = std::iter::successors(Some(process), parent_of).count();
    let Process { pid, group, session, threads, wait_status, .. } = process;
    let life = match wait_status {
        Some(status) => format!("has ended, wait status {status:#x}"),
        None if threads.len() == 1 => "1 thread".to_owned(),
        None => format!("{} threads", threads.len()),
    };
    format!("{:1$}{pid}  group {group}, session {session}, {life}", "", 2 * depth)
}

fn show_section(section: &Section<'_>) -> String {
    let name = section.name().unwrap_or("(unknown to this version)");
    let (tag, owner) = (section.tag().to_string(), section.owner());
    format!("{tag:<5}{owner:>10} {:>8} {:>9}  {name}", section.version(), section.len())
}

fn as_json(image: &Inspection) -> Result<Value> {
    let manifest = image.manifest();
    let processes: Vec<Value> = processes(image)?.iter().map(process_json).collect();
    let parents = image.parents().iter();
    let parents: Vec<Value> =
        parents.map(|parent| json!({ "id": hex(&parent.manifest.id), "dir": parent.dir })).collect();
    let sections: Vec<Value> = image.sections().map(|section| section_json(&section)).collect();
    let segments: Vec<Value> = image
        .segments()
        .map(|segment| {
            json!({
                "index": segment.index,
                "file": segment.file,
                "bytes": segment.len,
                "contents": segment.contents,
            })
        })
        .collect();
    Ok(json!({
        "format": manifest.format,
        "id": hex(&manifest.id),
        "library": manifest.library,
        "created": manifest.created.duration_since(UNIX_EPOCH)?.as_secs_f64(),
        "arch": manifest.arch,
        "kernel": manifest.kernel,
        "page_size": manifest.page_size,
        "root": manifest.root.get(),
        "pre_dump": manifest.content == Content::Pages,
        "parents": parents,
        "processes": processes,
        "sections": sections,
        "segments": segments,
    }))
}

fn process_json(process: &Process) -> Value {
    json!({
        "pid": process.pid.get(),
        "parent": process.parent.get(),
        "group": process.group.get(),
        "session": process.session.get(),
        "threads": process.threads.iter().map(|tid| tid.get()).collect::<Vec<_>>(),
        "wait_status": process.wait_status,
    })
}

/// A record that cannot be read shows why instead.
fn section_json(section: &Section<'_>) -> Value {
    let mut value = json!({
        "tag": section.tag().to_string(),
        "name": section.name(),
        "owner": section.owner(),
        "version": section.version(),
        "bytes": section.len(),
    });
    match section.text() {
        Ok(text) => value["record"] = text.into(),
        Err(error) => value["error"] = error.to_string().into(),
    }
    value
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
