//! The cloud's half: the proxy connections that edges have opened, and the streams through them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use http_body_util::Empty;
use hyper::{
    Method, Request, StatusCode, Uri, body::Bytes, client::conn::http2::SendRequest, header::HeaderValue,
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    abort::Abortable,
    fairness::{Share, Shares},
    limits::{self, Liveness},
    liveness::{self, INTERVAL_HEADER, KEEPALIVE_HEADER, Link, ROUND_TRIP_HEADER, RoundTrips, Suspicion},
    serve::{PROBE_URI, REASON_HEADER, STREAM_HEADER},
    stats::{ConnectionStats, Refusal, Stats, StreamSlot},
    stream::Stream,
};
use crate::plan::proxy::{EdgeIdentity, Target};

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No gateway node of the site is connected.
    #[error(
        "no proxy connection to Gateway {pool}: its gateway node dials this node; check that it runs and can reach the proxy endpoint of this node (TCP port 10262, unless the Gateway sets another one)"
    )]
    NoConnection {
        /// Name of the Gateway.
        pool: String,
    },
    /// The connections do not carry the request.
    #[error(
        "no answer on the proxy connections to Gateway {pool}: the site's link is interrupted or overloaded; compare GET /connections on the metrics port of this node"
    )]
    NoAnswer {
        /// Name of the Gateway.
        pool: String,
    },
    /// Every connection has reached its limit of streams.
    #[error("the limit of {} streams per proxy connection to Gateway {pool} is reached", limits::STREAMS - 1)]
    Full {
        /// Name of the Gateway.
        pool: String,
    },
    /// The client has its share of the streams.
    #[error("client {client} has its share of the streams to Gateway {pool}, which has {free} left; close some")]
    Share {
        /// Name of the Gateway.
        pool: String,
        /// Address of the client.
        client: IpAddr,
        /// Streams that are free.
        free: u32,
    },
    /// The edge refused the stream.
    #[error("gateway node {via} refused the stream: {reason}")]
    Refused {
        /// Name of the edge's gateway node.
        via: String,
        /// The reason that it sent.
        reason: String,
        /// True if the requested node does not respond; false if the request is invalid.
        unreachable: bool,
    },
}

impl Error {
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::NoConnection { .. } | Self::NoAnswer { .. } => Refusal::NoConnection,
            Self::Full { .. } | Self::Share { .. } => Refusal::TooMany,
            Self::Refused { unreachable: true, .. } => Refusal::Unreachable,
            Self::Refused { .. } => Refusal::Unknown,
        }
    }
}

/// All proxy connections of this node; clones share them.
#[derive(Clone)]
pub(crate) struct Connections {
    shared: Arc<Shared>,
    shares: Shares,
    stats: Stats,
    liveness: Liveness,
}

struct Shared {
    by_pool: Mutex<BTreeMap<String, Vec<Arc<Connection>>>>,
    /// Nodes at the other ends. A request that needs a connection waits for a change.
    edges: watch::Sender<BTreeSet<String>>,
}

struct Connection {
    number: u64,
    edge: EdgeIdentity,
    sender: SendRequest<Empty<Bytes>>,
    stats: Arc<ConnectionStats>,
    suspicion: Suspicion,
    abort: CancellationToken,
}

/// An open stream; frees its slot on drop.
pub(crate) struct Opened {
    io: TokioIo<Upgraded>,
    _slot: StreamSlot,
    /// `None` if the first connection was established while the stream was opened.
    _share: Option<Share>,
}

impl AsyncRead for Opened {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl Connections {
    pub(crate) fn new(stats: Stats, liveness: Liveness) -> Self {
        let shared = Shared { by_pool: Mutex::default(), edges: watch::Sender::default() };
        Self { shared: Arc::new(shared), shares: Shares::default(), stats, liveness }
    }

    /// Nodes at the other ends.
    #[cfg(test)]
    pub(crate) fn edges(&self) -> watch::Receiver<BTreeSet<String>> {
        self.shared.edges.subscribe()
    }

    /// Serves a connection that an edge opened for its pool, until it ends, is aborted or the future is dropped.
    ///
    /// `link`: the connection's socket. `may_connect` is checked after the connection is registered, so that a change of
    /// the election in between is noticed.
    pub(crate) async fn serve<S>(
        &self,
        edge: EdgeIdentity,
        pool: &str,
        io: S,
        link: Link,
        may_connect: impl Fn(&EdgeIdentity, &str) -> bool,
    ) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let abort = CancellationToken::new();
        let _aborted_on_drop = abort.clone().drop_guard();
        let listed = self.stats.connection(pool, &edge.node);
        let (number, stats) = (listed.number, listed.stats.clone());
        let io = TokioIo::new(Abortable::new(stats.count(io), abort.clone()));
        // The measurements below tell whether the edge answers.
        stats.set_quiet(liveness::quiet(Duration::ZERO));
        let (sender, http) = limits::client(self.liveness).handshake(io).await?;
        let span = tracing::info_span!("proxy_connection", edge = %edge.node, gateway = pool, connection = number);
        let idle = watch::Sender::new(liveness::cloud_interval(limits::KEEPALIVE));
        let suspicion = Suspicion::default();
        let follow = link.follow(stats.clone(), self.liveness.stream_timeout, idle.subscribe(), suspicion.clone());
        let probe = probe(sender.clone(), stats.clone(), idle);
        let connection =
            Connection { number, edge: edge.clone(), sender, stats: stats.clone(), suspicion, abort: abort.clone() };
        self.change(|by_pool| by_pool.entry(pool.to_owned()).or_default().push(Arc::new(connection)));
        let registered = Registered { connections: self, pool, number };
        if !may_connect(&edge, pool) {
            abort.cancel();
        }
        self.check_older(&edge.node, pool, number);
        let node = &edge.node;
        tracing::info!(node, gateway = pool, connection = number, "proxy connection established");
        let run = async {
            let ended = tokio::select! {
                ended = http => ended,
                () = abort.cancelled() => Ok(()),
                never = probe => match never {},
                never = follow => match never {},
            };
            // No new streams from here on. hyper's own task still carries the open ones, which can be aborted until the
            // last has ended.
            if !abort.is_cancelled() {
                stats.retire();
                let mut streams = stats.watch_streams();
                tokio::select! {
                    _ = streams.wait_for(|open| *open == 0) => {}
                    () = abort.cancelled() => {}
                }
            }
            ended
        };
        let ended = run.instrument(span).await;
        drop(registered);
        let error = ended.as_ref().err().map(ToString::to_string);
        tracing::info!(node, gateway = pool, connection = number, error, "proxy connection closed");
        ended
    }

    /// Checks the older connections of a node that has dialled again: it may have lost them without this node's knowledge.
    /// Above the limit, the oldest is aborted.
    fn check_older(&self, node: &str, pool: &str, newest: u64) {
        let by_pool = self.lock();
        let all = by_pool.get(pool).into_iter().flatten();
        let mut older: Vec<_> = all.filter(|c| c.edge.node == node && c.number != newest).collect();
        older.iter().for_each(|connection| connection.suspicion.notify_waiters());
        older.retain(|connection| !connection.stats.is_retired());
        if older.len() >= limits::CONNECTIONS_PER_NODE
            && let Some(oldest) = older.iter().min_by_key(|connection| connection.number)
        {
            oldest.abort.cancel();
        }
    }

    /// Aborts the connections of nodes that may no longer connect.
    pub(crate) fn retain(&self, may_connect: impl Fn(&EdgeIdentity, &str) -> bool) {
        for (pool, connections) in self.lock().iter() {
            connections.iter().filter(|c| !may_connect(&c.edge, pool)).for_each(|c| c.abort.cancel());
        }
    }

    /// Opens a client's stream to a node of an edge pool, through whichever of its connections works.
    pub(crate) async fn open(&self, target: &Target, stream: &Stream, client: IpAddr) -> Result<Opened, Error> {
        let begin = Instant::now();
        let (deadline, last_answer) = (begin + limits::OPEN, begin + limits::ANSWER);
        let mut changed = self.shared.edges.subscribe();
        let mut tried = BTreeSet::new();
        let mut share = None;
        loop {
            changed.mark_unchanged();
            // Without a free stream, every client waits for one.
            if let (None, Some(free @ 1..)) = (&share, self.free(&target.pool)) {
                let pool = target.pool.clone();
                share = Some(self.shares.take(&pool, client, free).ok_or(Error::Share { pool, client, free })?);
            }
            while let Some((connection, slot)) = self.choose(&target.pool, &tried) {
                tried.insert(connection.number);
                let alternative = self.has_untried(&target.pool, &tried);
                let given_up = give_up(&connection.stats, alternative, last_answer);
                match self.attempt(&connection, target, stream, &mut changed, given_up).await {
                    Attempt::Opened(io) => return Ok(Opened { io: TokioIo::new(io), _slot: slot, _share: share }),
                    Attempt::Refused { reason, unreachable } => {
                        return Err(Error::Refused { via: connection.edge.node.clone(), reason, unreachable });
                    }
                    // No byte of the client has been sent, so another connection may be tried.
                    Attempt::Failed(error) => {
                        tracing::debug!(connection = connection.number, error, "trying another proxy connection");
                    }
                    Attempt::Superseded => {
                        tracing::debug!(connection = connection.number, "trying a newer proxy connection");
                        continue;
                    }
                }
                if Instant::now() >= last_answer {
                    break;
                }
            }
            if timeout_at(deadline, changed.changed()).await.is_err() {
                let pool = target.pool.clone();
                return Err(match self.free(&pool) {
                    Some(0) => Error::Full { pool },
                    Some(_) => Error::NoAnswer { pool },
                    None => Error::NoConnection { pool },
                });
            }
        }
    }

    /// Tries to open a stream through one connection. An edge that dials again may have noticed before this node that
    /// its old connections are dead, so a newer connection is preferred to a slow one.
    async fn attempt(
        &self,
        connection: &Connection,
        target: &Target,
        stream: &Stream,
        changed: &mut watch::Receiver<BTreeSet<String>>,
        given_up: impl Future<Output = ()>,
    ) -> Attempt {
        let newest = self.newest(&target.pool);
        tokio::select! {
            attempt = request(connection, stream) => {
                if matches!(attempt, Attempt::Opened(_)) {
                    connection.stats.set_responding(true);
                }
                attempt
            }
            () = given_up => {
                connection.stats.set_responding(false);
                Attempt::Failed("no response".to_owned())
            }
            () = self.newer(changed, &target.pool, newest) => Attempt::Superseded,
        }
    }

    /// Numbers of all connections.
    #[cfg(test)]
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.lock().values().flatten().map(|connection| connection.number).collect()
    }

    fn has_untried(&self, pool: &str, tried: &BTreeSet<u64>) -> bool {
        let by_pool = self.lock();
        by_pool.get(pool).into_iter().flatten().any(|c| !tried.contains(&c.number) && !c.sender.is_closed())
    }

    /// The connection with the fewest streams that has not been tried. One that did not respond last time comes last;
    /// of two that are equal, the newer one is more likely to work.
    fn choose(&self, pool: &str, tried: &BTreeSet<u64>) -> Option<(Arc<Connection>, StreamSlot)> {
        let by_pool = self.lock();
        let candidates = by_pool.get(pool)?.iter().filter(|c| !tried.contains(&c.number) && !c.sender.is_closed());
        let chosen = candidates.min_by_key(|c| (!c.stats.is_responding(), c.stats.streams(), Reverse(c.number)))?;
        // One below the edge's limit: a stream above it would wait for another one to end, and block those behind it.
        let slot = chosen.stats.take_slot(limits::STREAMS - 1)?;
        Some((chosen.clone(), slot))
    }

    /// Waits for a connection of the pool that is newer than `newest`. It waits for [`limits::GRACE`] first, because an
    /// old connection that works responds sooner.
    async fn newer(&self, changed: &mut watch::Receiver<BTreeSet<String>>, pool: &str, newest: Option<u64>) {
        sleep(limits::GRACE).await;
        while self.newest(pool) <= newest {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn newest(&self, pool: &str) -> Option<u64> {
        self.lock().get(pool)?.iter().map(|connection| connection.number).max()
    }

    /// Streams that can still be opened to a pool; `None` without a connection.
    fn free(&self, pool: &str) -> Option<u32> {
        let by_pool = self.lock();
        let open = by_pool.get(pool)?.iter().filter(|c| !c.sender.is_closed());
        open.map(|c| (limits::STREAMS - 1).saturating_sub(c.stats.streams())).reduce(|a, b| a + b)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<Arc<Connection>>>> {
        self.shared.by_pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Vec<Arc<Connection>>>)) {
        let mut by_pool = self.lock();
        change(&mut by_pool);
        // Sent even if the set of nodes is the same: waiting requests need to see a second connection of one node.
        self.shared
            .edges
            .send_replace(by_pool.values().flatten().map(|connection| connection.edge.node.clone()).collect());
    }
}

/// Waits until a connection without an answer is given up: when nothing has arrived on it for a while, if another one can
/// be tried instead, or at the deadline.
async fn give_up(stats: &ConnectionStats, alternative: bool, deadline: Instant) {
    let silent = async {
        sleep(limits::ATTEMPT).await;
        // A stream's slot is taken, so the connection counts as silent when nothing arrives.
        stats.until_silent(true).await;
    };
    if alternative {
        let _ = timeout_at(deadline, silent).await;
    } else {
        sleep_until(deadline).await;
    }
}

/// Removes a connection from the set, also when its task is dropped.
struct Registered<'a> {
    connections: &'a Connections,
    pool: &'a str,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.connections.change(|by_pool| {
            if let Some(connections) = by_pool.get_mut(self.pool) {
                connections.retain(|connection| connection.number != self.number);
                if connections.is_empty() {
                    by_pool.remove(self.pool);
                }
            }
        });
    }
}

/// The result of one attempt to open a stream.
enum Attempt {
    Opened(Upgraded),
    /// The edge refused it.
    Refused {
        reason: String,
        unreachable: bool,
    },
    /// The connection did not carry the request.
    Failed(String),
    /// A newer connection exists.
    Superseded,
}

/// Measures the round-trip time to the edge's process, and learns the edge's keepalive interval: once, and at fixed
/// intervals while streams are open, even if answers wait behind bulk data.
async fn probe(
    sender: SendRequest<Empty<Bytes>>,
    stats: Arc<ConnectionStats>,
    idle: watch::Sender<Duration>,
) -> Infallible {
    let mut streams = stats.watch_streams();
    let mut trips = RoundTrips::default();
    let mut sent = FuturesUnordered::new();
    loop {
        if sent.len() < limits::PROBES {
            sent.push(measure(sender.clone(), trips.longest(), &idle));
        }
        let next = async {
            sleep(limits::PROBE).await;
            let begin = Instant::now();
            // The sender lives as long as `stats`.
            let _ = streams.wait_for(|open| *open > 0).await;
            begin.elapsed() > limits::ESTIMATE_LIFE
        };
        let mut next = std::pin::pin!(next);
        loop {
            tokio::select! {
                is_old = &mut next => {
                    if is_old {
                        trips = RoundTrips::default();
                        stats.set_quiet(liveness::quiet(Duration::ZERO));
                    }
                    break;
                }
                Some(measured) = sent.next() => if let Some(measured) = measured {
                    stats.set_rtt(measured);
                    trips.add(measured);
                    stats.set_quiet(liveness::quiet(trips.longest()));
                }
            }
        }
    }
}

/// Measures one round trip; `None` if the connection ended. `longest`: the estimate, for the edge.
async fn measure(
    mut sender: SendRequest<Empty<Bytes>>,
    longest: Duration,
    idle: &watch::Sender<Duration>,
) -> Option<Duration> {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::OPTIONS;
    *request.uri_mut() = Uri::from_static(PROBE_URI);
    request.headers_mut().insert(INTERVAL_HEADER, HeaderValue::from(limits::PROBE.as_secs()));
    request.headers_mut().insert(ROUND_TRIP_HEADER, HeaderValue::from(longest.as_millis() as u64));
    let begin = Instant::now();
    sender.ready().await.ok()?;
    let response = sender.send_request(request).await.ok()?;
    let measured = begin.elapsed();
    let seconds = response.headers().get(KEEPALIVE_HEADER).and_then(|text| text.to_str().ok()?.parse().ok());
    let edge = seconds.map_or(limits::KEEPALIVE, Duration::from_secs);
    let interval = liveness::cloud_interval(edge);
    idle.send_if_modified(|have| std::mem::replace(have, interval) != interval);
    Some(measured)
}

async fn request(connection: &Connection, stream: &Stream) -> Attempt {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::CONNECT;
    let invalid =
        |e: &dyn std::fmt::Display| Attempt::Refused { reason: format!("invalid target: {e}"), unreachable: false };
    *request.uri_mut() = match format!("{}:{}", stream.node, stream.port).parse() {
        Ok(uri) => uri,
        Err(e) => return invalid(&e),
    };
    match HeaderValue::from_str(&stream.id) {
        Ok(id) => drop(request.headers_mut().insert(STREAM_HEADER, id)),
        Err(e) => return invalid(&e),
    }
    match send(connection.sender.clone(), request).await {
        Ok(attempt) => attempt,
        Err(e) => Attempt::Failed(e.to_string()),
    }
}

async fn send(mut sender: SendRequest<Empty<Bytes>>, request: Request<Empty<Bytes>>) -> hyper::Result<Attempt> {
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        let reason =
            response.headers().get(REASON_HEADER).and_then(|r| r.to_str().ok()).unwrap_or("no reason given").to_owned();
        return Ok(Attempt::Refused { reason, unreachable: response.status() == StatusCode::BAD_GATEWAY });
    }
    hyper::upgrade::on(response).await.map(Attempt::Opened)
}
