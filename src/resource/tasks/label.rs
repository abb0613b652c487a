//! How a security module (SELinux, AppArmor, Smack) labels the threads of a process: /proc/PID/attr/current. To change
//! one is a matter of its policy; a restored task has that of whoever restores it, which has to be the same.

use super::caller::Caller;
use crate::Pid;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::resource::{Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch};

const ATTRIBUTE: &str = "security label";

#[derive(Encode, Decode, Debug, PartialEq, Eq)]
pub(crate) struct Label(Bytes);

impl Record for Label {
    const TAG: Tag = Tag::new(b"LABL");
    const VERSION: u16 = 1;
    const NAME: &'static str = ATTRIBUTE;
}

impl Label {
    /// None: no module labels tasks, or none is there.
    fn of(tid: Pid, file: &str) -> Result<Option<Self>> {
        use nix::errno::Errno;
        match read::bytes(tid, &format!("attr/{file}")) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if matches!(error.raw_errno(), Some(Errno::EINVAL | Errno::ENOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Some modules end it by a zero byte, some by a newline.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| !matches!(byte, 0 | b'\n'))?;
        text.get(..=end).map(|label| Self(label.to_vec().into()))
    }

    fn compare(&self, callers: Option<&Self>) -> Result<()> {
        if callers == Some(self) {
            return Ok(());
        }
        let show = |label: &Self| String::from_utf8_lossy(&label.0).into_owned();
        let callers = callers.map_or("none".into(), show);
        let reason = format!("it is {} in the image, and the caller's is {callers}", show(self));
        let error = Error::new(ErrorKind::Conflict, reason).about(Subject::Attribute(ATTRIBUTE));
        Err(error.with_hint("restore from a process with the same label (runcon(1), aa-exec(1))"))
    }
}

impl State for Label {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Plain;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, report: &mut Report) -> Result<Option<Self>> {
        /// For what the thread is about to make, or to execute.
        const NEXT: [&str; 4] = ["exec", "fscreate", "keycreate", "sockcreate"];
        let Some(label) = Self::of(view.tid(), "current")? else { return Ok(None) };
        for thread in &view.process.threads {
            if Self::of(thread.tid(), "current")?.as_ref() != Some(&label) {
                report.attribute(thread.tid(), ATTRIBUTE, "it is not that of the other threads");
            }
            for file in NEXT {
                if Self::of(thread.tid(), file)?.is_some() {
                    report.attribute(
                        thread.tid(),
                        ATTRIBUTE,
                        format!("{file} has been set for what comes next"),
                    );
                }
            }
        }
        Ok(Some(label))
    }

    fn check(&self, caller: &Caller) -> Result<()> {
        self.compare(Self::of(caller.tid, "current")?.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_compared() {
        let label = |text: &[u8]| Label::parse(text);
        let confined = label(b"docker-default (enforce)\n").unwrap();
        assert!(confined.compare(label(b"docker-default (enforce)\0").as_ref()).is_ok());
        for other in [label(b"unconfined\n"), label(b"\n"), None] {
            let error = confined.compare(other.as_ref()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
            assert!(error.to_string().contains("docker-default (enforce) in the image"), "{error}");
        }
        assert!(label(b"\0").is_none() && label(b"").is_none());
    }
}
