//! Connections that have not yet said who they are or what they want. There is room for so many; for one more, the oldest has to go: who is
//! honest is through within moments, and who only holds a place has held it longest.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The room; clones share it.
#[derive(Clone)]
pub(crate) struct Waiting {
    room: usize,
    places: Arc<Mutex<Places>>,
}

#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, CancellationToken>,
}

/// A place, until it is dropped.
pub(crate) struct Place {
    number: u64,
    places: Arc<Mutex<Places>>,
    /// Cancelled when the place is needed for another.
    pub(crate) over: CancellationToken,
}

impl Waiting {
    pub(crate) fn new(room: usize) -> Self {
        Self { room, places: Arc::default() }
    }

    /// Takes a place; true: somebody had to go for it.
    pub(crate) fn enter(&self) -> (Place, bool) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let evicted = if places.taken.len() >= self.room { places.taken.pop_first() } else { None };
        if let Some((_, oldest)) = &evicted {
            oldest.cancel();
        }
        let (number, over) = (places.next, CancellationToken::new());
        places.next += 1;
        places.taken.insert(number, over.clone());
        (Place { number, places: self.places.clone(), over }, evicted.is_some())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_and_a_place_that_was_left_is_free() {
        let waiting = Waiting::new(2);
        let ((first, _), (second, _)) = (waiting.enter(), waiting.enter());
        drop(second);
        let (third, crowded) = waiting.enter();
        assert!(!crowded && !first.over.is_cancelled());
        let (_fourth, crowded) = waiting.enter();
        assert!(crowded && first.over.is_cancelled() && !third.over.is_cancelled());
    }
}
