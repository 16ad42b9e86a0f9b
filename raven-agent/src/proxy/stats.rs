//! What the L7 path counts, and the ids of its streams. Labels come from short lists only.

use std::{
    collections::{BTreeMap, hash_map::RandomState},
    fmt::Write,
    hash::{BuildHasher, Hasher},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde::Serialize;
use tokio::time::Instant;

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

/// Whom a tunnel is with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct End {
    gateway: String,
    node: String,
}

/// One tunnel, as long as its connection lives.
pub(crate) struct TunnelStats {
    end: End,
    begin: Instant,
    streams: AtomicU32,
    /// Microseconds; 0: not known.
    rtt: AtomicU64,
    retired: AtomicBool,
    mute: AtomicBool,
}

impl TunnelStats {
    /// Whether it answered when it was asked for a stream.
    pub(crate) fn answers(&self, does: bool) {
        self.mute.store(!does, Ordering::Relaxed);
    }

    /// It did not answer when it was asked last.
    pub(crate) fn is_mute(&self) -> bool {
        self.mute.load(Ordering::Relaxed)
    }

    /// How long a question to the other end and its answer took.
    pub(crate) fn took(&self, rtt: Duration) {
        self.answers(true);
        self.rtt.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// It takes no new streams any more.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Streams that are open or being opened.
    pub(crate) fn streams(&self) -> u32 {
        self.streams.load(Ordering::Relaxed)
    }

    /// See [`TunnelStats::retire`].
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    fn rtt(&self) -> Option<Duration> {
        Some(self.rtt.load(Ordering::Relaxed)).filter(|us| *us > 0).map(Duration::from_micros)
    }

    /// A place for one more stream, if there are fewer than `most`.
    pub(crate) fn take_place(self: &Arc<Self>, most: u32) -> Option<Place> {
        let taken = self.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most).then_some(n + 1));
        taken.is_ok().then(|| Place(self.clone()))
    }
}

/// Keeps a tunnel among those that are shown, until it is dropped.
pub(crate) struct Shown {
    pub(crate) number: u64,
    pub(crate) tunnel: Arc<TunnelStats>,
    tunnels: Arc<Mutex<BTreeMap<u64, Arc<TunnelStats>>>>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// A stream's place in a tunnel; given back when it is dropped.
pub(crate) struct Place(Arc<TunnelStats>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A tunnel as a person reads it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    tunnel: u64,
    gateway: &'a str,
    node: &'a str,
    /// `up`, or `retiring`: it ends with its last stream.
    state: &'static str,
    streams: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_ms: Option<f64>,
    seconds: u64,
}

/// Lines of log about refusals, for each reason: so many at once …
const SAID: NonZeroU32 = NonZeroU32::new(10).expect("not zero");

/// Who has been told of in the log.
struct Said(DefaultKeyedRateLimiter<Refusal>);

impl Default for Said {
    fn default() -> Self {
        // … and one a second from then on: whoever knocks ten thousand times fills no disk.
        Self(RateLimiter::keyed(Quota::per_second(NonZeroU32::MIN).allow_burst(SAID)))
    }
}

/// Counters of the L7 path; clones count together.
#[derive(Clone, Default)]
pub struct Stats {
    said: Arc<Said>,
    refused: Family<Refused, Counter>,
    streams: Counter,
    open: Gauge<i64, AtomicI64>,
    sent: Counter,
    received: Counter,
    tunnels: Arc<Mutex<BTreeMap<u64, Arc<TunnelStats>>>>,
    numbers: Arc<AtomicU64>,
    ids: Arc<Ids>,
}

impl Stats {
    /// Counts a refusal. True: it should be said, too (it is none of very many).
    pub fn refused(&self, reason: Refusal) -> bool {
        self.refused.get_or_create(&Refused { reason }).inc();
        self.said.0.check_key(&reason).is_ok()
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

    /// A tunnel with a node of a Gateway has come up.
    pub(crate) fn tunnel(&self, gateway: &str, node: &str) -> Shown {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let tunnel = Arc::new(TunnelStats {
            end: End { gateway: gateway.to_owned(), node: node.to_owned() },
            begin: Instant::now(),
            streams: AtomicU32::new(0),
            rtt: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            mute: AtomicBool::new(false),
        });
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).insert(number, tunnel.clone());
        Shown { number, tunnel, tunnels: self.tunnels.clone() }
    }

    fn now(&self) -> BTreeMap<u64, Arc<TunnelStats>> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All tunnels, a line of JSON each.
    pub fn tunnels(&self) -> String {
        self.now().iter().fold(String::new(), |mut text, (number, tunnel)| {
            let line = Line {
                tunnel: *number,
                gateway: &tunnel.end.gateway,
                node: &tunnel.end.node,
                state: if tunnel.is_retired() { "retiring" } else { "up" },
                streams: tunnel.streams(),
                rtt_ms: tunnel.rtt().map(|rtt| rtt.as_secs_f64() * 1000.0),
                seconds: tunnel.begin.elapsed().as_secs(),
            };
            let _ = writeln!(text, "{}", serde_json::to_string(&line).unwrap_or_default());
            text
        })
    }

    /// Puts all of them into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("raven_proxy_refused", "Requests and tunnels that were refused, by reason", self.refused.clone());
        registry.register("raven_proxy_streams", "Streams that were opened", self.streams.clone());
        registry.register("raven_proxy_open_streams", "Streams that are open", self.open.clone());
        registry.register("raven_proxy_sent_bytes", "Bytes towards nodes", self.sent.clone());
        registry.register("raven_proxy_received_bytes", "Bytes from nodes", self.received.clone());
        let (up, streams) = (Family::<End, Gauge>::default(), Family::<End, Gauge>::default());
        let rtt = Family::<End, Gauge<f64, AtomicU64>>::default();
        for tunnel in self.now().values() {
            up.get_or_create(&tunnel.end).inc();
            streams.get_or_create(&tunnel.end).inc_by(tunnel.streams().into());
            if let Some(seen) = tunnel.rtt() {
                let gauge = rtt.get_or_create(&tunnel.end);
                gauge.set(gauge.get().max(seen.as_secs_f64()));
            }
        }
        registry.register("raven_proxy_tunnels", "Tunnels that are up, by the node at the other end", up);
        registry.register("raven_proxy_tunnel_streams", "Streams in them", streams);
        registry.register("raven_proxy_tunnel_rtt_seconds", "Question and answer through the slowest of them", rtt);
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
