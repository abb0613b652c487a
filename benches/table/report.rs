//! Medians, and the table.

use std::fmt::Write;
use std::time::Duration;

use crate::engine::Took;
use crate::subject::Kind;

pub(crate) const LEGEND: &str = "\
Times in ms, ratios to a memcpy of the same size just before; median (min-max) over the rounds.
The stages are medians of the library's own account: freezing + frozen + release, where memory is a part of frozen; \
reading + building + release + other, which is what it leaves unaccounted, starting its thread included.";

/// One line of the table.
pub(crate) struct Row {
    subject: String,
    place: &'static str,
    engine: &'static str,
    /// How many, where that is what it is about.
    count: Option<usize>,
    pub(crate) dump: Side,
    pub(crate) restore: Side,
}

/// The dumps, or the restores, of all rounds.
#[derive(Default)]
pub(crate) struct Side {
    copies: Vec<f64>,
    times: Vec<f64>,
    ratios: Vec<f64>,
    stages: [Vec<f64>; 4],
}

impl Row {
    pub(crate) fn new(kind: &Kind, place: &'static str, engine: &'static str) -> Self {
        let (dump, restore) = (Side::default(), Side::default());
        Self { subject: kind.name(), place, engine, count: kind.count(), dump, restore }
    }

    pub(crate) fn title(&self) -> String {
        format!("{} {} {}", self.subject, self.place, self.engine)
    }

    fn cells(&self) -> [String; COLUMNS] {
        let [dump, restore] = [&self.dump, &self.restore];
        [
            self.subject.clone(),
            self.place.into(),
            self.engine.into(),
            spread(&[&dump.copies[..], &restore.copies].concat()),
            spread(&dump.times),
            spread(&dump.ratios),
            self.per_each(dump),
            dump.stages(),
            spread(&restore.times),
            spread(&restore.ratios),
            self.per_each(restore),
            restore.stages(),
        ]
    }
}

impl Row {
    fn per_each(&self, side: &Side) -> String {
        let each = self.count.zip(median(&side.times)).map(|(count, millis)| millis * 1e3 / count as f64);
        each.map_or("-".into(), short)
    }
}

impl Side {
    /// What one round took, and the memcpy just before it.
    pub(crate) fn add(&mut self, copied: Option<Duration>, took: Took) {
        self.copies.extend(copied.map(millis));
        self.times.push(millis(took.whole));
        self.ratios.extend(copied.map(|copied| took.whole.as_secs_f64() / copied.as_secs_f64()));
        for (all, one) in self.stages.iter_mut().zip(took.stages) {
            all.push(millis(one));
        }
    }

    fn stages(&self) -> String {
        let medians: Vec<f64> = self.stages.iter().filter_map(|stage| median(stage)).collect();
        if medians.iter().sum::<f64>() == 0.0 {
            return "-".into(); // an engine that does not tell
        }
        medians.into_iter().map(short).collect::<Vec<_>>().join(" / ")
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    match sorted.len() % 2 {
        0 => Some((sorted.get(middle - 1)? + upper) / 2.0),
        _ => Some(*upper),
    }
}

fn spread(values: &[f64]) -> String {
    let Some(median) = median(values) else { return "-".into() };
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{} ({}-{})", short(median), short(least), short(most))
}

/// Three digits that matter.
fn short(value: f64) -> String {
    let decimals = match value {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

const COLUMNS: usize = 12;
const HEAD: [&str; COLUMNS] = [
    "subject",
    "image",
    "engine",
    "memcpy",
    "dump",
    "dump / memcpy",
    "us / each",
    "freezing / frozen / memory / release",
    "restore",
    "restore / memcpy",
    "us / each",
    "reading / building / release / other",
];

pub(crate) fn table(rows: &[Row]) -> String {
    let head = HEAD.map(String::from);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let mut widths = [0; COLUMNS];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut table = String::new();
    for (number, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(table, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        if number == 0 {
            let _ = writeln!(table, "{}", widths.map(|width| "-".repeat(width)).join("  "));
        }
    }
    table
}
