//! What a task is: its place in the tree, its registers, its name, and what it is blocked in.

pub(crate) mod attributes;
pub(crate) mod births;
pub(crate) mod blocked;
pub(crate) mod caller;
pub(crate) mod cgroup;
pub(crate) mod cpu;
pub(crate) mod credentials;
pub(crate) mod dead_leader;
pub(crate) mod dynamic_features;
pub(crate) mod identity;
pub(crate) mod job_stop;
pub(crate) mod limits;
pub(crate) mod login;
pub(crate) mod membarrier;
pub(crate) mod mempolicy;
pub(crate) mod name;
pub(crate) mod pids;
pub(crate) mod plan;
pub(crate) mod proc_files;
pub(crate) mod registers;
pub(crate) mod rseq;
pub(crate) mod scheduling;
pub(crate) mod seccomp;
pub(crate) mod sharing;
pub(crate) mod tree;
pub(crate) mod unsupported;
