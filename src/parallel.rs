//! Looks at many tasks by several threads of ours: ptrace(2) has to be called by the tracer, all else by any.

use std::num::NonZeroUsize;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;

use crate::error::{Error, ErrorKind, Result};

/// More gain little.
pub(crate) const MOST: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);

/// How many threads do one thing at the same time, unless somebody says otherwise: as many as there are processors, but at
/// most [`MOST`]. To ask takes longer than to do what is not much.
pub(crate) fn usual() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN).min(MOST)
}

/// What `look` tells of each item, in order; of `few` and more by the usual number of threads, the calling one among
/// them. Where there cannot be so many, it does more of the work.
pub(crate) fn map<I: Sync, T: Send>(
    items: &[I],
    few: usize,
    look: impl Fn(&I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if items.len() < few {
        return items.iter().map(look).collect();
    }
    let threads = usual().get();
    let (own, others) = items.split_at(items.len() / threads);
    let each = others.len().div_ceil((threads - 1).max(1)).max(1);
    let look_at = |some: &[I]| some.iter().map(&look).collect::<Result<Vec<_>>>();
    std::thread::scope(|scope| {
        let begin = |some| thread().spawn_scoped(scope, move || look_at(some)).map_err(|_| some);
        let begun: Vec<_> = others.chunks(each).map(begin).collect();
        let mut all = look_at(own)?;
        for looker in begun {
            all.extend(match looker {
                Ok(looker) => looker.join().unwrap_or_else(|_| Err(ended()))?,
                Err(some) => look_at(some)?,
            });
        }
        Ok(all)
    })
}

/// Has `body` get what `look` tells of each item, one after the other. Of many, a second thread looks ahead.
pub(crate) fn ahead<I: Sync, T: Send, R>(
    items: &[I],
    look: impl Fn(&I) -> Result<T> + Sync,
    body: impl FnOnce(&mut dyn FnMut() -> Result<T>) -> Result<R>,
) -> Result<R> {
    const FEW: usize = 64;
    /// To hand something over takes as long as to look at some.
    const AT_ONCE: usize = 8;
    let look = &look;
    std::thread::scope(|scope| {
        let (give, take) = sync_channel(1);
        let looker = move || {
            // Until nobody wants to know any more.
            let seen = |some: &[I]| give.send(some.iter().map(look).collect::<Vec<_>>());
            items.chunks(AT_ONCE).try_for_each(seen)
        };
        let mut rest = items.iter();
        let looks_ahead = items.len() >= FEW && thread().spawn_scoped(scope, looker).is_ok();
        if looks_ahead {
            let mut seen = take.into_iter().flatten();
            body(&mut || seen.next().unwrap_or_else(|| Err(ended())))
        } else {
            body(&mut || rest.next().map_or_else(|| Err(ended()), look))
        }
    })
}

fn thread() -> Builder {
    Builder::new().name("cryosleep-look".into())
}

fn ended() -> Error {
    Error::new(ErrorKind::Kernel, "a looking thread ended early")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 5] = [0, 1, 63, 64, 1000];

    fn double(number: &usize) -> Result<usize> {
        match number {
            500 => Err(Error::new(ErrorKind::TaskGone, "five hundred")),
            number => Ok(number * 2),
        }
    }

    #[test]
    fn all_are_looked_at_in_order() {
        for size in SIZES {
            let items: Vec<usize> = (1000..1000 + size).collect();
            let expected: Vec<usize> = items.iter().map(|number| number * 2).collect();
            assert_eq!(map(&items, 64, double).unwrap(), expected);
            let one_by_one = ahead(&items, double, |next| items.iter().map(|_| next()).collect());
            let one_by_one: Vec<usize> = one_by_one.unwrap();
            assert_eq!(one_by_one, expected);
        }
    }

    #[test]
    fn errors_arrive() {
        let items: Vec<usize> = (0..1000).collect();
        assert_eq!(map(&items, 64, double).unwrap_err().kind(), ErrorKind::TaskGone);
        let (mut seen, all) = (0, items.len());
        let error = ahead(&items, double, |next| (0..all).try_for_each(|_| next().map(|_| seen += 1)));
        assert_eq!((error.unwrap_err().kind(), seen), (ErrorKind::TaskGone, 500));
    }

    /// Nobody waits for ever: neither who looks for who has enough, nor who asks too often.
    #[test]
    fn who_stops_early_or_asks_too_often() {
        let items: Vec<usize> = (1000..2000).collect();
        assert_eq!(ahead(&items, double, |next| next()).unwrap(), 2000);
        for items in [&items[..], &items[..10]] {
            let error = ahead(items, double, |next| (0..=items.len()).try_for_each(|_| next().map(drop)));
            assert_eq!(error.unwrap_err().kind(), ErrorKind::Kernel);
        }
    }
}
