//! The edge's side: keeps tunnels to every cloud gateway node, and serves them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::{
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};
use tokio_util::sync::CancellationToken;

use super::{
    identity::{self, Identity},
    limits,
    serve::{Edge, serve},
    stats::TunnelStats,
    stream,
};

/// Who is dialled: host and port, by node name.
pub(crate) type Clouds = BTreeMap<String, (String, u16)>;

/// Tunnels that are up, by cloud gateway node.
pub(crate) type Up = BTreeMap<String, usize>;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no certificate yet")]
    NoIdentity,
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("{0:?} is no name of a host")]
    BadHost(String),
    #[error("connect: {0}")]
    Connect(std::io::Error),
    #[error("TLS: {0}")]
    Tls(std::io::Error),
    #[error("no answer (is the address right, and TCP open on the way to it?)")]
    Silent,
}

impl Error {
    /// True where the other side answered and refused, or we have nothing to show: soon again would not help. A connection that broke in
    /// the middle of its handshake is no answer: a crowd at the gate, or a load balancer with nobody behind it.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Tls(e) => e.kind() == std::io::ErrorKind::InvalidData,
            Self::Identity(_) | Self::BadHost(_) => true,
            Self::NoIdentity | Self::Connect(_) | Self::Silent => false,
        }
    }
}

/// Keeps tunnels to `clouds`, until the task is dropped; says in `up` which there are.
pub(crate) async fn run(
    mut clouds: watch::Receiver<Clouds>,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    edge: Edge,
    up: watch::Sender<Up>,
) {
    let mut tasks = JoinSet::new();
    let mut dialled: BTreeMap<(String, String, u16), CancellationToken> = BTreeMap::new();
    loop {
        let wanted = clouds.borrow_and_update().clone();
        dialled.retain(|(node, host, port), stop| {
            let stays = wanted.get(node) == Some(&(host.clone(), *port));
            if !stays {
                stop.cancel();
            }
            stays
        });
        for (node, (host, port)) in wanted {
            let key = (node.clone(), host.clone(), port);
            if dialled.contains_key(&key) {
                continue;
            }
            let stop = CancellationToken::new();
            for _ in 0..limits::TUNNELS {
                let (node, host) = (node.clone(), host.clone());
                let slot = Slot {
                    node,
                    host,
                    port,
                    identity: identity.clone(),
                    edge: edge.clone(),
                    up: up.clone(),
                    stop: stop.clone(),
                    attempts: 0,
                };
                tasks.spawn(slot.run());
            }
            dialled.insert(key, stop);
        }
        tokio::select! {
            changed = clouds.changed() => if changed.is_err() { return },
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// One of the tunnels to one cloud gateway node.
struct Slot {
    node: String,
    host: String,
    port: u16,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    edge: Edge,
    up: watch::Sender<Up>,
    stop: CancellationToken,
    attempts: usize,
}

impl Slot {
    async fn run(mut self) {
        let stop = self.stop.clone();
        // With this task they all end.
        let mut tunnels = JoinSet::new();
        let mut current: Option<Live> = None;
        let mut futile = backoff(limits::REDIAL_REFUSED);
        loop {
            let next = tokio::select! {
                next = self.dial() => next,
                () = stop.cancelled() => break,
            };
            // The successor is there: now the old one may end with its last stream.
            if let Some(old) = current.take() {
                old.retire();
            }
            let live = self.hold(next, &mut tunnels);
            let begin = Instant::now();
            tokio::select! {
                () = live.ended.cancelled() => {
                    // One that ends at once is no better than none: the other side will not have it.
                    if begin.elapsed() < limits::PING {
                        self.pause(futile.next().unwrap_or(limits::REDIAL_REFUSED.1)).await;
                    } else {
                        futile = backoff(limits::REDIAL_REFUSED);
                    }
                    continue;
                }
                () = sleep(limits::TUNNEL_LIFE.mul_f64(0.9 + 0.2 * jitter())) => tracing::debug!(cloud = self.node, "tunnel grows old"),
                _ = self.identity.changed() => tracing::info!(cloud = self.node, "another certificate: a new tunnel takes over"),
                () = stop.cancelled() => {}
            }
            current = Some(live);
        }
        // Its node is no proxy any more, or another one: what is open may end by itself.
        current.iter().for_each(Live::retire);
        while tunnels.join_next().await.is_some() {}
    }

    /// A new tunnel, however long it takes.
    async fn dial(&mut self) -> TlsStream<TcpStream> {
        let mut said = None;
        let (mut soon, mut late) = (backoff(limits::REDIAL), backoff(limits::REDIAL_REFUSED));
        loop {
            match self.connect().await {
                Ok(tunnel) => {
                    tracing::info!(cloud = self.node, host = self.host, port = self.port, "tunnel up");
                    return tunnel;
                }
                Err(Error::NoIdentity) => {
                    if self.identity.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                Err(e) => {
                    let text = e.to_string();
                    if said.as_ref() != Some(&text) {
                        tracing::warn!(cloud = self.node, host = self.host, port = self.port, "no tunnel: {text}; trying again");
                        said = Some(text);
                    }
                    let delay = if e.is_refusal() { late.next() } else { soon.next() };
                    self.pause(delay.unwrap_or(limits::REDIAL_REFUSED.1)).await;
                }
            }
        }
    }

    async fn pause(&mut self, delay: Duration) {
        tokio::select! {
            () = sleep(delay) => {}
            // A new certificate may be what was missing.
            _ = self.identity.changed() => {}
        }
    }

    async fn connect(&mut self) -> Result<TlsStream<TcpStream>, Error> {
        let identity = self.identity.borrow_and_update().clone().ok_or(Error::NoIdentity)?;
        let name = ServerName::try_from(self.host.clone()).map_err(|_| Error::BadHost(self.host.clone()))?;
        let connector = TlsConnector::from(identity.client()?);
        let patience = limits::DIAL[self.attempts % limits::DIAL.len()];
        self.attempts += 1;
        let tcp = timeout(patience, TcpStream::connect((self.host.as_str(), self.port))).await;
        let tcp = tcp.map_err(|_| Error::Silent)?.map_err(Error::Connect)?;
        stream::prepare_tunnel(&tcp);
        timeout(limits::HANDSHAKE, connector.connect(name, tcp)).await.map_err(|_| Error::Silent)?.map_err(Error::Tls)
    }

    /// Serves a tunnel, in a task of its own.
    fn hold(&self, tunnel: TlsStream<TcpStream>, tunnels: &mut JoinSet<()>) -> Live {
        let gateway = self.edge.plan.borrow().directory.pool_of(&self.node).unwrap_or_default().to_owned();
        let shown = self.edge.stats.tunnel(&gateway, &self.node);
        let live = Live { stats: shown.tunnel.clone(), retire: CancellationToken::new(), ended: CancellationToken::new() };
        let counted = Counted::new(&self.up, &self.node);
        let (served, ended, node) =
            (serve(tunnel, self.edge.clone(), shown.tunnel.clone(), live.retire.clone()), live.ended.clone(), self.node.clone());
        tunnels.spawn(async move {
            let _shown_and_counted = (shown, counted, ended.drop_guard());
            let why = served.await.err().map(|e| e.to_string());
            tracing::info!(cloud = node, why, "tunnel down");
        });
        live
    }
}

/// A tunnel that is being served.
struct Live {
    stats: Arc<TunnelStats>,
    retire: CancellationToken,
    ended: CancellationToken,
}

impl Live {
    /// It takes no new streams, and ends with its last one.
    fn retire(&self) {
        self.stats.retire();
        self.retire.cancel();
    }
}

/// Between 0 and 1, another one for each slot and time: so that a thousand sites do not come at once.
fn jitter() -> f64 {
    static DRAWN: AtomicUsize = AtomicUsize::new(0);
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_usize(DRAWN.fetch_add(1, Ordering::Relaxed));
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

fn backoff((least, most): (Duration, Duration)) -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default().with_min_delay(least).with_max_delay(most).with_jitter().without_max_times().build()
}

/// Counts a tunnel as up until it is dropped.
struct Counted {
    up: watch::Sender<Up>,
    node: String,
}

impl Counted {
    fn new(up: &watch::Sender<Up>, node: &str) -> Self {
        up.send_modify(|up| *up.entry(node.to_owned()).or_default() += 1);
        Self { up: up.clone(), node: node.to_owned() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.up.send_modify(|up| {
            if let Some(count) = up.get_mut(&self.node) {
                *count -= 1;
            }
            up.retain(|_, count| *count > 0);
        });
    }
}
