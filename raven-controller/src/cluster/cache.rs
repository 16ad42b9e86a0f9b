//! The facts of one kind of objects, maintained from the events of a watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::runtime::watcher::Event;

/// Facts by name. Cheap to copy.
pub(super) type Facts<K, V> = Arc<BTreeMap<K, Arc<V>>>;

/// Facts of one kind, by name. A listing replaces them at once when it is complete.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    pub(super) facts: Facts<K, V>,
    listing: BTreeMap<K, Arc<V>>,
    // The facts may be used: they were listed, or the kind is absent or unavailable.
    pub(super) complete: bool,
    // A listing was completed.
    pub(super) listed: bool,
}

impl<K: Ord + Clone, V: PartialEq> Cache<K, V> {
    pub(super) fn new() -> Self {
        Self { facts: Facts::default(), listing: BTreeMap::new(), complete: false, listed: false }
    }

    // `parse` returns no facts for an object that does not count. Returns true if the facts or
    // their completeness changed.
    pub(super) fn absorb<T>(&mut self, event: Event<T>, parse: impl Fn(T) -> (K, Option<V>)) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                let (key, facts) = parse(object);
                facts.map(|facts| self.listing.insert(key, Arc::new(facts)));
                false
            }
            Event::InitDone => {
                let listing = std::mem::take(&mut self.listing);
                let changed = !self.listed || listing != *self.facts;
                self.facts = Arc::new(listing);
                (self.complete, self.listed) = (true, true);
                changed
            }
            Event::Apply(object) => {
                let (key, facts) = parse(object);
                self.put(key, facts)
            }
            Event::Delete(object) => self.remove(&parse(object).0),
        }
    }

    pub(super) fn put(&mut self, key: K, facts: Option<V>) -> bool {
        match facts {
            Some(facts) if self.facts.get(&key).is_some_and(|old| **old == facts) => false,
            Some(facts) => {
                Arc::make_mut(&mut self.facts).insert(key, Arc::new(facts));
                true
            }
            None => self.remove(&key),
        }
    }

    pub(super) fn remove(&mut self, key: &K) -> bool {
        self.facts.contains_key(key) && Arc::make_mut(&mut self.facts).remove(key).is_some()
    }

    // Takes over the known facts of an object into the listing.
    pub(super) fn keep(&mut self, key: &K) {
        if let Some(facts) = self.facts.get(key) {
            self.listing.insert(key.clone(), facts.clone());
        }
    }

    // The kind is unavailable: the known facts stay valid.
    pub(super) fn assume_complete(&mut self) -> bool {
        !std::mem::replace(&mut self.complete, true)
    }

    // The kind is absent: all facts are dropped.
    pub(super) fn clear(&mut self) -> bool {
        let changed = !self.complete || !self.facts.is_empty();
        *self = Self { complete: true, ..Self::new() };
        changed
    }
}
