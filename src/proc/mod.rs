//! Pure parsers of /proc files that the procfs crate lacks.
