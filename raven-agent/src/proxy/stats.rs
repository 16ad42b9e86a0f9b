//! What the L7 path counts, and the ids of its streams. Labels come from short lists only.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Why a request or a tunnel was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Refusal {
    /// It names no node.
    NoName,
    /// It names a node, or an address, that nobody has.
    Unknown,
    /// It names an address that several have.
    Ambiguous,
    /// A port that is not reached.
    Port,
    /// What it sent is no TLS, or no HTTP.
    Malformed,
    /// It did not say what it wants in time.
    Slow,
    /// Too many like it.
    TooMany,
    /// No tunnel to the node's site.
    NoTunnel,
    /// The node does not answer.
    Unreachable,
    /// A tunnel whose other end did not prove who it is.
    Unauthenticated,
    /// A tunnel of a node that was not elected for it.
    NotElected,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: Refusal,
}

/// Counters of the L7 path; clones count together.
#[derive(Clone, Default)]
pub struct Stats {
    refused: Family<Refused, Counter>,
    streams: Counter,
    open: Gauge<i64, AtomicI64>,
    sent: Counter,
    received: Counter,
    tunnels: Gauge<i64, AtomicI64>,
    ids: Arc<Ids>,
}

impl Stats {
    /// Counts a refusal.
    pub fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&Refused { reason }).inc();
    }

    /// How often that was.
    pub fn refusals(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&Refused { reason }).get()
    }

    /// Streams that are open.
    pub fn open_streams(&self) -> i64 {
        self.open.get()
    }

    /// An id that no other stream of this node has, nor, most probably, one of another node.
    pub fn next_id(&self) -> String {
        format!("{:08x}-{:x}", self.ids.node, self.ids.next.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn opened(&self) {
        self.streams.inc();
        self.open.inc();
    }

    pub(super) fn closed(&self, sent: u64, received: u64) {
        self.open.dec();
        self.sent.inc_by(sent);
        self.received.inc_by(received);
    }

    pub(super) fn tunnel(&self, change: i64) {
        self.tunnels.inc_by(change);
    }

    /// Puts all of them into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("raven_proxy_refused", "Requests and tunnels that were refused, by reason", self.refused.clone());
        registry.register("raven_proxy_streams", "Streams that were opened", self.streams.clone());
        registry.register("raven_proxy_open_streams", "Streams that are open", self.open.clone());
        registry.register("raven_proxy_sent_bytes", "Bytes towards nodes", self.sent.clone());
        registry.register("raven_proxy_received_bytes", "Bytes from nodes", self.received.clone());
        registry.register("raven_proxy_tunnels", "Tunnels that are up", self.tunnels.clone());
    }
}

struct Ids {
    node: u32,
    next: AtomicU64,
}

impl Default for Ids {
    fn default() -> Self {
        // Seeded by the system's random numbers.
        Self { node: RandomState::new().build_hasher().finish() as u32, next: AtomicU64::new(1) }
    }
}
