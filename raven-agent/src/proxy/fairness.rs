//! Shares a site's streams among clients, so that one pod cannot stop `kubectl logs` for everybody else.
//!
//! A client may open another stream while it has fewer than [`limits::SHARE`] times those that are still free. This is the
//! dynamic threshold of shared-memory switches (Choudhury and Hahne, IEEE/ACM ToN 6, 1998): a single busy client gets
//! most of the streams, several greedy ones get equal parts, and some always stay free for a new client.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use super::limits;

/// Name of a Gateway, and a client's address.
type Key = (String, IpAddr);

/// Open streams per client and Gateway; clones share the counts.
#[derive(Clone, Default)]
pub(super) struct Shares(Arc<Mutex<BTreeMap<Key, u32>>>);

/// A client's stream; given back on drop.
pub(super) struct Share {
    key: Key,
    counts: Arc<Mutex<BTreeMap<Key, u32>>>,
}

impl Shares {
    /// Takes a stream for a client, unless its share of a Gateway's streams, of which `free` are left, is used up.
    pub(super) fn take(&self, gateway: &str, client: IpAddr, free: u32) -> Option<Share> {
        let key = (gateway.to_owned(), client.to_canonical());
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let have = counts.get(&key).copied().unwrap_or(0);
        if have >= free.saturating_mul(limits::SHARE) {
            return None;
        }
        counts.insert(key.clone(), have + 1);
        Some(Share { key, counts: self.0.clone() })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
        }
        if counts.get(&self.key) == Some(&0) {
            counts.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of these clients opens streams until it is refused; returns how many it has.
    fn greedy(clients: u8, total: u32) -> Vec<usize> {
        let shares = Shares::default();
        let mut open: Vec<Vec<Share>> = (0..clients).map(|_| Vec::new()).collect();
        loop {
            let before: usize = open.iter().map(Vec::len).sum();
            for client in 0..clients {
                let used = open.iter().map(Vec::len).sum::<usize>() as u32;
                let share = shares.take("x", IpAddr::from([10, 0, 0, client]), total - used);
                open[usize::from(client)].extend(share);
            }
            if open.iter().map(Vec::len).sum::<usize>() == before {
                return open.iter().map(Vec::len).collect();
            }
        }
    }

    #[test]
    fn one_client_gets_most_and_many_get_equal_parts_with_some_left() {
        assert_eq!(greedy(1, 2046), [1637]);
        let ten = greedy(10, 2046);
        assert!(ten.iter().all(|n| (198..=202).contains(n)), "{ten:?}");
        assert!(2046 - ten.iter().sum::<usize>() >= 40);
    }

    #[test]
    fn share_is_given_back() {
        let (shares, client) = (Shares::default(), IpAddr::from([10, 0, 0, 1]));
        let held: Vec<Share> = (0..4).filter_map(|_| shares.take("x", client, 1)).collect();
        assert_eq!(held.len(), 4);
        assert!(shares.take("x", client, 1).is_none());
        assert!(shares.take("y", client, 1).is_some(), "another Gateway");
        assert!(shares.take("x", "::ffff:10.0.0.1".parse().expect("an address"), 1).is_none(), "the same client");
        drop(held);
        assert!(shares.take("x", client, 1).is_some());
        assert!(shares.take("x", client, 0).is_none());
    }
}
