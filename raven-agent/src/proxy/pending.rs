//! Pending connections: accepted, but not yet authenticated or routed. Their number is bounded; at the limit, the
//! oldest one is evicted.
//!
//! A well-behaved client is pending for milliseconds only, so under a flood the oldest connection is most likely
//! an idle one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The bounded set; clones share it.
#[derive(Clone)]
pub(crate) struct PendingSet {
    limit: usize,
    slots: Arc<Mutex<Slots>>,
}

#[derive(Default)]
struct Slots {
    next: u64,
    used: BTreeMap<u64, CancellationToken>,
}

/// The slot of one pending connection; freed on drop.
pub(crate) struct PendingSlot {
    number: u64,
    slots: Arc<Mutex<Slots>>,
    /// Cancelled when the connection is evicted.
    pub(crate) evicted: CancellationToken,
}

impl PendingSet {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, slots: Arc::default() }
    }

    /// Takes a slot. True if the oldest connection was evicted for it.
    pub(crate) fn enter(&self) -> (PendingSlot, bool) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if slots.used.len() >= self.limit { slots.used.pop_first() } else { None };
        if let Some((_, evicted)) = &oldest {
            evicted.cancel();
        }
        let (number, evicted) = (slots.next, CancellationToken::new());
        slots.next += 1;
        slots.used.insert(number, evicted.clone());
        (PendingSlot { number, slots: self.slots.clone(), evicted }, oldest.is_some())
    }
}

impl Drop for PendingSlot {
    fn drop(&mut self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).used.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_connection_is_evicted_only_at_the_limit() {
        let pending = PendingSet::new(2);
        let ((first, _), (second, _)) = (pending.enter(), pending.enter());
        drop(second);
        let (third, evicted) = pending.enter();
        assert!(!evicted && !first.evicted.is_cancelled());
        let (_fourth, evicted) = pending.enter();
        assert!(evicted && first.evicted.is_cancelled() && !third.evicted.is_cancelled());
    }
}
