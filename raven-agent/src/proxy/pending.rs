//! Pending connections: accepted, but not yet authenticated or routed. Their number is bounded; at the limit, the oldest
//! one of the address with most of them is evicted, so that a flood from one address evicts only its own connections.
//!
//! A well-behaved client is pending for milliseconds only, so the oldest connection is most likely an idle one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
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
    used: BTreeMap<u64, (IpAddr, CancellationToken)>,
    by_address: BTreeMap<IpAddr, BTreeSet<u64>>,
}

impl Slots {
    fn insert(&mut self, address: IpAddr, evicted: CancellationToken) -> u64 {
        let number = self.next;
        self.next += 1;
        self.used.insert(number, (address, evicted));
        self.by_address.entry(address).or_default().insert(number);
        number
    }

    fn remove(&mut self, number: u64) -> Option<CancellationToken> {
        let (address, evicted) = self.used.remove(&number)?;
        if let Some(numbers) = self.by_address.get_mut(&address) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_address.remove(&address);
            }
        }
        Some(evicted)
    }

    /// The oldest slot of the address with most slots.
    fn least_deserving(&self) -> Option<u64> {
        let most = self.by_address.values().max_by_key(|numbers| numbers.len())?;
        most.first().copied()
    }
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

    /// Takes a slot for a connection from this address. True if another one was evicted for it.
    pub(crate) fn enter(&self, from: IpAddr) -> (PendingSlot, bool) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let full = slots.used.len() >= self.limit;
        let evicted = full.then(|| slots.least_deserving().and_then(|number| slots.remove(number))).flatten();
        evicted.iter().for_each(CancellationToken::cancel);
        let token = CancellationToken::new();
        let number = slots.insert(from.to_canonical(), token.clone());
        (PendingSlot { number, slots: self.slots.clone(), evicted: token }, evicted.is_some())
    }
}

impl Drop for PendingSlot {
    fn drop(&mut self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn oldest_connection_is_evicted_only_at_the_limit() {
        let pending = PendingSet::new(2);
        let ((first, _), (second, _)) = (pending.enter(A), pending.enter(A));
        drop(second);
        let (third, evicted) = pending.enter(A);
        assert!(!evicted && !first.evicted.is_cancelled());
        let (_fourth, evicted) = pending.enter(A);
        assert!(evicted && first.evicted.is_cancelled() && !third.evicted.is_cancelled());
    }

    #[test]
    fn flood_from_one_address_evicts_only_its_own_connections() {
        let pending = PendingSet::new(100);
        let (honest, _) = pending.enter(B);
        let flood: Vec<_> = (0..1000).map(|_| pending.enter(A).0).collect();
        assert!(!honest.evicted.is_cancelled());
        assert_eq!(flood.iter().filter(|slot| !slot.evicted.is_cancelled()).count(), 99);
        drop(flood);
        assert_eq!(pending.slots.lock().expect("not poisoned").by_address.len(), 1);
    }
}
