//! Counters of the L7 half, its list of proxy connections, and stream ids. Metric labels come from bounded sets only.

use std::{
    collections::BTreeMap,
    fmt::Write,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
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
use tokio::{sync::watch, time::Instant};

use super::counted::Counted;

/// Why a request or a proxy connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Refusal {
    /// The request names no node.
    NoName,
    /// No node has the requested name or address.
    Unknown,
    /// Several nodes have the requested address.
    Ambiguous,
    /// The L7 half does not reach the requested port.
    Port,
    /// The bytes are neither TLS nor HTTP.
    Malformed,
    /// The ClientHello, the request head or the TLS handshake timed out.
    Slow,
    /// A limit was reached.
    TooMany,
    /// There is no proxy connection to the node's site.
    NoConnection,
    /// The node does not respond.
    Unreachable,
    /// The edge did not prove its identity.
    Unauthenticated,
    /// The edge is not elected for its pool.
    NotElected,
}

impl Refusal {
    /// The value of label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoName => "NoName",
            Self::Unknown => "Unknown",
            Self::Ambiguous => "Ambiguous",
            Self::Port => "Port",
            Self::Malformed => "Malformed",
            Self::Slow => "Slow",
            Self::TooMany => "TooMany",
            Self::NoConnection => "NoConnection",
            Self::Unreachable => "Unreachable",
            Self::Unauthenticated => "Unauthenticated",
            Self::NotElected => "NotElected",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: Refusal,
}

/// The other end of a proxy connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Remote {
    gateway: String,
    node: String,
}

/// Counters of one proxy connection.
pub(crate) struct ConnectionStats {
    remote: Remote,
    begin: Instant,
    /// Streams that are open or being opened.
    streams: watch::Sender<u32>,
    /// True once a stream was opened.
    used: AtomicBool,
    /// Bytes of the connection.
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    /// Milliseconds without a received byte that are normal while streams are open; 0 if unknown.
    quiet: AtomicU64,
    /// True if nothing arrives although streams are open.
    silent: watch::Sender<bool>,
    /// Round-trip time in microseconds; 0 if unknown.
    rtt: AtomicU64,
    retired: AtomicBool,
    responding: AtomicBool,
}

impl ConnectionStats {
    /// Records whether the other end responded to the last request.
    pub(crate) fn set_responding(&self, responding: bool) {
        self.responding.store(responding, Ordering::Relaxed);
    }

    /// False if the other end did not respond to the last request, or is silent.
    pub(crate) fn is_responding(&self) -> bool {
        self.responding.load(Ordering::Relaxed) && !*self.silent.borrow()
    }

    /// Records whether the other end is silent; true if that is a change.
    pub(super) fn set_silent(&self, silent: bool) -> bool {
        self.silent.send_if_modified(|have| std::mem::replace(have, silent) != silent)
    }

    /// Waits until the other end is silent, or no longer silent.
    pub(super) async fn until_silent(&self, wanted: bool) {
        // The sender lives as long as `self`.
        let _ = self.silent.subscribe().wait_for(|silent| *silent == wanted).await;
    }

    /// Records how long it is normal that nothing arrives while streams are open.
    pub(super) fn set_quiet(&self, quiet: Duration) {
        self.quiet.store(u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// How long it is normal that nothing arrives while streams are open. `None` if the other end does not
    /// send at regular intervals, like clouds of older releases.
    pub(super) fn quiet(&self) -> Option<Duration> {
        Some(self.quiet.load(Ordering::Relaxed)).filter(|ms| *ms > 0).map(Duration::from_millis)
    }

    /// Wraps the connection, so that its bytes are counted.
    pub(super) fn count<S>(&self, connection: S) -> Counted<S> {
        Counted::new(connection, self.received.clone(), self.sent.clone())
    }

    /// Number of received bytes.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Follows the number of streams.
    pub(super) fn watch_streams(&self) -> watch::Receiver<u32> {
        self.streams.subscribe()
    }

    /// True once a stream was opened.
    pub(super) fn was_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Records a measured round-trip time.
    pub(crate) fn set_rtt(&self, rtt: Duration) {
        self.set_responding(true);
        self.rtt.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// Marks the connection: it accepts no new streams.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Number of streams that are open or being opened.
    pub(crate) fn streams(&self) -> u32 {
        *self.streams.borrow()
    }

    /// True after [`ConnectionStats::retire`].
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    fn rtt(&self) -> Option<Duration> {
        Some(self.rtt.load(Ordering::Relaxed)).filter(|us| *us > 0).map(Duration::from_micros)
    }

    /// Takes a slot for one more stream, if there are fewer than `limit`.
    pub(crate) fn take_slot(self: &Arc<Self>, limit: u32) -> Option<StreamSlot> {
        let taken = self.streams.send_if_modified(|n| {
            let free = *n < limit;
            *n += u32::from(free);
            free
        });
        self.used.fetch_or(taken, Ordering::Relaxed);
        taken.then(|| StreamSlot(self.clone()))
    }
}

/// Keeps a connection in the list until it is dropped.
pub(crate) struct Listed {
    pub(crate) number: u64,
    pub(crate) stats: Arc<ConnectionStats>,
    connections: Arc<Mutex<BTreeMap<u64, Arc<ConnectionStats>>>>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// The slot of a stream in a connection; freed on drop.
pub(crate) struct StreamSlot(Arc<ConnectionStats>);

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.streams.send_modify(|n| *n -= 1);
    }
}

/// A line of `/connections`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    connection: u64,
    gateway: &'a str,
    node: &'a str,
    /// `up`; `silent`: nothing arrives although streams are open; `retiring`: the connection ends with its last stream.
    state: &'static str,
    streams: u32,
    received_bytes: u64,
    sent_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_ms: Option<f64>,
    seconds: u64,
}

/// Refusals that are logged at once, per reason.
const LOG_BURST: NonZeroU32 = NonZeroU32::new(10).expect("not zero");

/// Limits the log of refusals to one line per second and reason after a burst, so that a flood does not fill the disk.
struct LogLimit(DefaultKeyedRateLimiter<Refusal>);

impl Default for LogLimit {
    fn default() -> Self {
        Self(RateLimiter::keyed(Quota::per_second(NonZeroU32::MIN).allow_burst(LOG_BURST)))
    }
}

/// Counters of the L7 half; clones share them.
#[derive(Clone, Default)]
pub struct Stats {
    log_limit: Arc<LogLimit>,
    refused: Family<Refused, Counter>,
    streams: Counter,
    open: Gauge<i64, AtomicI64>,
    sent: Counter,
    received: Counter,
    connections: Arc<Mutex<BTreeMap<u64, Arc<ConnectionStats>>>>,
    numbers: Arc<AtomicU64>,
    ids: Arc<Ids>,
}

impl Stats {
    /// Counts a refusal. True if it should be logged, too.
    pub fn refused(&self, reason: Refusal) -> bool {
        self.refused.get_or_create(&Refused { reason }).inc();
        self.log_limit.0.check_key(&reason).is_ok()
    }

    /// Number of refusals with this reason.
    pub fn refusals(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&Refused { reason }).get()
    }

    /// Number of open streams.
    pub fn open_streams(&self) -> i64 {
        self.open.get()
    }

    /// A stream id: unique on this node, and with high probability in the cluster.
    pub fn next_id(&self) -> String {
        format!("{:08x}-{:x}", self.ids.process, self.ids.next.fetch_add(1, Ordering::Relaxed))
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

    /// Adds a connection with a node of a Gateway to the list.
    pub(crate) fn connection(&self, gateway: &str, node: &str) -> Listed {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let stats = Arc::new(ConnectionStats {
            remote: Remote { gateway: gateway.to_owned(), node: node.to_owned() },
            begin: Instant::now(),
            streams: watch::Sender::default(),
            used: AtomicBool::new(false),
            received: Arc::default(),
            sent: Arc::default(),
            quiet: AtomicU64::new(0),
            silent: watch::Sender::default(),
            rtt: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            responding: AtomicBool::new(true),
        });
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(number, stats.clone());
        Listed { number, stats, connections: self.connections.clone() }
    }

    fn list(&self) -> BTreeMap<u64, Arc<ConnectionStats>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All proxy connections, one JSON object per line.
    pub fn connections(&self) -> String {
        self.list().iter().fold(String::new(), |mut text, (number, stats)| {
            let line = Line {
                connection: *number,
                gateway: &stats.remote.gateway,
                node: &stats.remote.node,
                state: match (*stats.silent.borrow(), stats.is_retired()) {
                    (true, _) => "silent",
                    (_, true) => "retiring",
                    _ => "up",
                },
                streams: stats.streams(),
                received_bytes: stats.received(),
                sent_bytes: stats.sent.load(Ordering::Relaxed),
                rtt_ms: stats.rtt().map(|rtt| rtt.as_secs_f64() * 1000.0),
                seconds: stats.begin.elapsed().as_secs(),
            };
            let _ = writeln!(text, "{}", serde_json::to_string(&line).unwrap_or_default());
            text
        })
    }

    /// Registers all metrics of the L7 half.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "raven_proxy_refused",
            "Refused requests and proxy connections, by reason",
            self.refused.clone(),
        );
        registry.register("raven_proxy_streams", "Opened proxy streams", self.streams.clone());
        registry.register("raven_proxy_open_streams", "Proxy streams that are open now", self.open.clone());
        registry.register("raven_proxy_sent_bytes", "Bytes sent to nodes", self.sent.clone());
        registry.register("raven_proxy_received_bytes", "Bytes received from nodes", self.received.clone());
        let (up, streams) = (Family::<Remote, Gauge>::default(), Family::<Remote, Gauge>::default());
        let rtt = Family::<Remote, Gauge<f64, AtomicU64>>::default();
        for connection in self.list().values() {
            up.get_or_create(&connection.remote).inc();
            streams.get_or_create(&connection.remote).inc_by(connection.streams().into());
            if let Some(measured) = connection.rtt() {
                let gauge = rtt.get_or_create(&connection.remote);
                gauge.set(gauge.get().max(measured.as_secs_f64()));
            }
        }
        registry.register("raven_proxy_connections", "Established proxy connections, by the node at the other end", up);
        registry.register("raven_proxy_connection_streams", "Open streams, by the node at the other end", streams);
        let help = "Round-trip time through the slowest proxy connection, by the node at the other end";
        registry.register("raven_proxy_connection_rtt_seconds", help, rtt);
    }
}

struct Ids {
    /// Random number of this process.
    process: u32,
    next: AtomicU64,
}

impl Default for Ids {
    fn default() -> Self {
        Self { process: fastrand::u32(..), next: AtomicU64::new(1) }
    }
}
