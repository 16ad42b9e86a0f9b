//! The cloud's half: the tunnels that edges have brought, and streams through them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use http_body_util::Empty;
use hyper::{Method, Request, StatusCode, Uri, body::Bytes, client::conn::http2::SendRequest, header::HeaderValue, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::{Instant, MissedTickBehavior, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    limits,
    plan::{Bearer, Target},
    serve::{PROBE_URI, REASON_HEADER, STREAM_HEADER},
    sever::Severable,
    stats::{Place, Refusal, Stats, TunnelStats},
    stream::Stream,
};

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Nobody of that site is connected.
    #[error("no tunnel to Gateway {pool} (its gateway node dials here: is it up, and does it reach this address?)")]
    NoTunnel {
        /// Which site.
        pool: String,
    },
    /// All of them carry as much as they may.
    #[error("each tunnel to Gateway {pool} carries {} streams, which is all it may", limits::STREAMS - 1)]
    Full {
        /// Which site.
        pool: String,
    },
    /// The edge answered, and said no.
    #[error("gateway node {via} says: {reason}")]
    Refused {
        /// Who.
        via: String,
        /// What it said.
        reason: String,
        /// True if the node that was asked for does not answer; else the request is to blame.
        unreachable: bool,
    },
}

impl Error {
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::NoTunnel { .. } => Refusal::NoTunnel,
            Self::Full { .. } => Refusal::TooMany,
            Self::Refused { unreachable: true, .. } => Refusal::Unreachable,
            Self::Refused { .. } => Refusal::Unknown,
        }
    }
}

/// All tunnels of this node; clones share them.
#[derive(Clone)]
pub(crate) struct Tunnels {
    shared: Arc<Shared>,
    stats: Stats,
}

struct Shared {
    by_pool: Mutex<BTreeMap<String, Vec<Arc<Tunnel>>>>,
    /// Nodes at the other ends; who waits for a tunnel waits for a change of it.
    ends: watch::Sender<BTreeSet<String>>,
}

struct Tunnel {
    number: u64,
    bearer: Bearer,
    sender: SendRequest<Empty<Bytes>>,
    stats: Arc<TunnelStats>,
    close: CancellationToken,
}

/// A stream through a tunnel; gives its place back when it is dropped.
pub(crate) struct Opened {
    io: TokioIo<Upgraded>,
    _place: Place,
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

impl Tunnels {
    pub(crate) fn new(stats: Stats) -> Self {
        let shared = Shared { by_pool: Mutex::default(), ends: watch::Sender::default() };
        Self { shared: Arc::new(shared), stats }
    }

    /// Nodes at the other ends.
    #[cfg(test)]
    pub(crate) fn ends(&self) -> watch::Receiver<BTreeSet<String>> {
        self.shared.ends.subscribe()
    }

    /// Takes a connection that an edge gateway node dialled, for its pool, until it ends, it is closed or the future is dropped. `may`: it
    /// may have one, as things are when it has joined the others.
    pub(crate) async fn take<S>(&self, bearer: Bearer, pool: &str, connection: S, may: impl Fn(&Bearer, &str) -> bool) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let close = CancellationToken::new();
        let _closed = close.clone().drop_guard();
        let connection = TokioIo::new(Severable::new(connection, close.clone()));
        let (sender, connection) = limits::client().handshake(connection).await?;
        let shown = self.stats.tunnel(pool, &bearer.node);
        let number = shown.number;
        let probe = probe(sender.clone(), shown.tunnel.clone());
        let tunnel = Tunnel { number, bearer: bearer.clone(), sender, stats: shown.tunnel.clone(), close: close.clone() };
        self.change(|by_pool| by_pool.entry(pool.to_owned()).or_default().push(Arc::new(tunnel)));
        let registered = Registered { tunnels: self, pool, number };
        let node = &bearer.node;
        if !may(&bearer, pool) || self.count(node, pool) > limits::TUNNELS_OF_A_NODE {
            close.cancel();
        }
        tracing::info!(node, gateway = pool, tunnel = number, "tunnel up");
        let ended = tokio::select! {
            ended = connection => ended,
            () = close.cancelled() => Ok(()),
            never = probe => match never {},
        };
        // No new streams; those that are open go on, and can still be ended from outside, until hyper's own task has seen the last.
        if !close.is_cancelled() {
            shown.tunnel.retire();
            tokio::select! {
                () = self.drained(&shown.tunnel) => {}
                () = close.cancelled() => {}
            }
        }
        drop(registered);
        let why = ended.as_ref().err().map(ToString::to_string);
        tracing::info!(node, gateway = pool, tunnel = number, why, "tunnel down");
        ended
    }

    /// Waits until a tunnel has no streams any more.
    async fn drained(&self, tunnel: &TunnelStats) {
        let mut period = tokio::time::interval(limits::PING);
        while tunnel.streams() > 0 {
            period.tick().await;
        }
    }

    /// Tunnels of a node that take streams.
    fn count(&self, node: &str, pool: &str) -> usize {
        self.lock().get(pool).map_or(0, |tunnels| tunnels.iter().filter(|t| t.bearer.node == node && !t.stats.is_retired()).count())
    }

    /// Closes the tunnels of nodes that may not have one (any more).
    pub(crate) fn retain(&self, may: impl Fn(&Bearer, &str) -> bool) {
        for (pool, tunnels) in self.lock().iter() {
            tunnels.iter().filter(|tunnel| !may(&tunnel.bearer, pool)).for_each(|tunnel| tunnel.close.cancel());
        }
    }

    /// Opens a stream to a node of an edge pool, by whichever of its tunnels works.
    pub(crate) async fn open(&self, target: &Target, stream: &Stream) -> Result<Opened, Error> {
        let deadline = Instant::now() + limits::OPEN;
        let mut changed = self.shared.ends.subscribe();
        let mut tried = BTreeSet::new();
        loop {
            changed.mark_unchanged();
            while let Some((tunnel, place)) = self.choose(&target.pool, &tried) {
                tried.insert(tunnel.number);
                let newest = self.newest(&target.pool);
                // An edge that dials anew may know better than we do what became of its old tunnels.
                let attempt = tokio::select! {
                    attempt = timeout(limits::ATTEMPT, request(&tunnel, stream)) => attempt,
                    () = self.newer(&mut changed, &target.pool, newest) => {
                        tracing::debug!(%stream, tunnel = tunnel.number, "try the new tunnel");
                        continue;
                    }
                };
                match attempt {
                    Ok(Ok(io)) => {
                        tunnel.stats.answers(true);
                        return Ok(Opened { io: TokioIo::new(io), _place: place });
                    }
                    Ok(Err(Failure::Refused { reason, unreachable })) => {
                        return Err(Error::Refused { via: tunnel.bearer.node.clone(), reason, unreachable });
                    }
                    // Nothing of the client's has been sent: another tunnel may try.
                    Ok(Err(Failure::Tunnel(e))) => tracing::debug!(%stream, tunnel = tunnel.number, "try another tunnel: {e}"),
                    Err(_) => {
                        tunnel.stats.answers(false);
                        tracing::debug!(%stream, tunnel = tunnel.number, "try another tunnel: no answer");
                    }
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            if timeout_at(deadline, changed.changed()).await.is_err() {
                let pool = target.pool.clone();
                return Err(if self.is_full(&pool) { Error::Full { pool } } else { Error::NoTunnel { pool } });
            }
        }
    }

    /// Numbers of all tunnels.
    #[cfg(test)]
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.lock().values().flatten().map(|tunnel| tunnel.number).collect()
    }

    /// The tunnel with the fewest streams that has not been tried.
    fn choose(&self, pool: &str, tried: &BTreeSet<u64>) -> Option<(Arc<Tunnel>, Place)> {
        let by_pool = self.lock();
        let tunnels = by_pool.get(pool)?.iter().filter(|t| !tried.contains(&t.number) && !t.sender.is_closed());
        // One that did not answer last time comes last: its other end may hang. Of two that are alike the newer one is the likelier to work.
        let fewest = tunnels.min_by_key(|t| (t.stats.is_mute(), t.stats.streams(), Reverse(t.number)))?;
        // Below what the edge allows: a stream that waits for another one to end would block those behind it.
        let place = fewest.stats.take_place(limits::STREAMS - 1)?;
        Some((fewest.clone(), place))
    }

    /// Waits for a tunnel of a pool that is newer than what was its newest (other sites come and go all the time). Not at once: an old one
    /// that works answers sooner.
    async fn newer(&self, changed: &mut watch::Receiver<BTreeSet<String>>, pool: &str, newest: Option<u64>) {
        sleep(limits::GRACE).await;
        while self.newest(pool) <= newest {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn newest(&self, pool: &str) -> Option<u64> {
        self.lock().get(pool)?.iter().map(|tunnel| tunnel.number).max()
    }

    fn is_full(&self, pool: &str) -> bool {
        let by_pool = self.lock();
        let mut open = by_pool.get(pool).into_iter().flatten().filter(|t| !t.sender.is_closed()).peekable();
        open.peek().is_some() && open.all(|t| t.stats.streams() >= limits::STREAMS - 1)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<Arc<Tunnel>>>> {
        self.shared.by_pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Vec<Arc<Tunnel>>>)) {
        let mut by_pool = self.lock();
        change(&mut by_pool);
        // Sent also when the set is the same: a second tunnel of the same node is news to who waits.
        self.shared.ends.send_replace(by_pool.values().flatten().map(|tunnel| tunnel.bearer.node.clone()).collect());
    }
}

/// Takes a tunnel off the list, also when its task is dropped.
struct Registered<'a> {
    tunnels: &'a Tunnels,
    pool: &'a str,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.tunnels.change(|by_pool| {
            if let Some(tunnels) = by_pool.get_mut(self.pool) {
                tunnels.retain(|tunnel| tunnel.number != self.number);
                if tunnels.is_empty() {
                    by_pool.remove(self.pool);
                }
            }
        });
    }
}

enum Failure {
    /// The edge answered.
    Refused { reason: String, unreachable: bool },
    /// The tunnel did not carry the question.
    Tunnel(hyper::Error),
}

/// Asks the other end for an answer now and then, and notes how long it takes.
async fn probe(mut sender: SendRequest<Empty<Bytes>>, stats: Arc<TunnelStats>) -> Infallible {
    let mut period = tokio::time::interval(limits::PROBE);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let mut question = Request::new(Empty::new());
        *question.method_mut() = Method::OPTIONS;
        *question.uri_mut() = Uri::from_static(PROBE_URI);
        let begin = Instant::now();
        if sender.ready().await.is_ok() && sender.send_request(question).await.is_ok() {
            stats.took(begin.elapsed());
        }
    }
}

async fn request(tunnel: &Tunnel, stream: &Stream) -> Result<Upgraded, Failure> {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::CONNECT;
    let bad = |e: &dyn std::fmt::Display| Failure::Refused { reason: format!("no request can be made of it: {e}"), unreachable: false };
    *request.uri_mut() = format!("{}:{}", stream.node, stream.port).parse().map_err(|e| bad(&e))?;
    request.headers_mut().insert(STREAM_HEADER, HeaderValue::from_str(&stream.id).map_err(|e| bad(&e))?);
    let mut sender = tunnel.sender.clone();
    sender.ready().await.map_err(Failure::Tunnel)?;
    let response = sender.send_request(request).await.map_err(Failure::Tunnel)?;
    if response.status() != StatusCode::OK {
        let reason = response.headers().get(REASON_HEADER).and_then(|r| r.to_str().ok()).unwrap_or("no reason given").to_owned();
        return Err(Failure::Refused { reason, unreachable: response.status() == StatusCode::BAD_GATEWAY });
    }
    hyper::upgrade::on(response).await.map_err(Failure::Tunnel)
}
