//! The edge's side of a proxy connection: keeps connections to every cloud gateway node open, and serves them.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::{
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    identity::{self, Identity},
    limits,
    liveness::{Link, Suspicion},
    serve::{EdgeServer, serve},
    stats::ConnectionStats,
};

/// Cloud gateway nodes to dial: host and port, by node name.
pub(crate) type Clouds = BTreeMap<String, (String, u16)>;

/// Number of established connections, by cloud gateway node.
pub(crate) type Established = BTreeMap<String, usize>;

/// A connection that ends sooner was refused.
const REFUSED: Duration = Duration::from_secs(2);

/// Why a connection could not be established.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("this node has no certificate yet")]
    NoIdentity,
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("{0:?} is not a valid host name")]
    BadHost(String),
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    #[error("the TLS handshake failed: {0}")]
    Tls(std::io::Error),
    #[error("timed out; check the address in the exposed Gateway and that firewalls allow TCP to it")]
    Timeout,
}

impl Error {
    /// True if the cloud refused the edge, or the edge has nothing to present: an early retry does not help.
    ///
    /// A connection that closes during the handshake is not a refusal: the listener may have evicted it, or a load
    /// balancer may have no backend.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Tls(e) => e.kind() == std::io::ErrorKind::InvalidData,
            Self::Identity(_) | Self::BadHost(_) => true,
            Self::NoIdentity | Self::Connect(_) | Self::Timeout => false,
        }
    }
}

/// Keeps connections to `clouds` open until the task is dropped, and reports in `established` how many there are.
pub(crate) async fn run(
    mut clouds: watch::Receiver<Clouds>,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    server: EdgeServer,
    established: watch::Sender<Established>,
) {
    let mut tasks = JoinSet::new();
    let mut dialled: BTreeMap<(String, String, u16), CancellationToken> = BTreeMap::new();
    loop {
        let wanted = clouds.borrow_and_update().clone();
        dialled.retain(|(node, host, port), stop| {
            let kept = wanted.get(node) == Some(&(host.clone(), *port));
            if !kept {
                stop.cancel();
            }
            kept
        });
        for (node, (host, port)) in wanted {
            let key = (node.clone(), host.clone(), port);
            if dialled.contains_key(&key) {
                continue;
            }
            let (stop, suspicion) = (CancellationToken::new(), Suspicion::default());
            for number in 0..limits::CONNECTIONS {
                let dialler = Dialler {
                    number,
                    node: node.clone(),
                    host: host.clone(),
                    port,
                    identity: identity.clone(),
                    server: server.clone(),
                    established: established.clone(),
                    stop: stop.clone(),
                    suspicion: suspicion.clone(),
                    attempts: 0,
                };
                let span = tracing::info_span!("proxy_dial", cloud = %node, number);
                tasks.spawn(dialler.run().instrument(span));
            }
            dialled.insert(key, stop);
        }
        tokio::select! {
            changed = clouds.changed() => if changed.is_err() { return },
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Keeps one connection to one cloud gateway node open.
struct Dialler {
    /// Number among those to the same node.
    number: usize,
    node: String,
    host: String,
    port: u16,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    server: EdgeServer,
    established: watch::Sender<Established>,
    stop: CancellationToken,
    /// Shared with the others to the same node.
    suspicion: Suspicion,
    attempts: usize,
}

impl Dialler {
    async fn run(mut self) {
        let stop = self.stop.clone();
        // All connections end with this task.
        let mut tasks = JoinSet::new();
        let mut current: Option<Connection> = None;
        let mut short_lived = backoff(limits::REDIAL_REFUSED);
        loop {
            let next = tokio::select! {
                next = self.dial() => next,
                () = stop.cancelled() => break,
            };
            // Its successor is established, so the old connection may end with its last stream.
            if let Some(old) = current.take() {
                old.retire();
            }
            let (tls, link) = next;
            let connection = self.serve(tls, link, &mut tasks);
            let begin = Instant::now();
            tokio::select! {
                () = connection.ended.cancelled() => {
                    self.suspicion.notify_waiters();
                    // A connection that ends at once was refused by the cloud.
                    if begin.elapsed() < REFUSED {
                        self.pause(short_lived.next().unwrap_or(limits::REDIAL_REFUSED.1)).await;
                    } else {
                        short_lived = backoff(limits::REDIAL_REFUSED);
                    }
                    continue;
                }
                () = aged(&connection.stats) => {
                    tracing::debug!(cloud = self.node, "the proxy connection reached its maximum age; replacing it");
                }
                () = connection.stats.until_silent(true) => {
                    tracing::warn!(cloud = self.node, "the proxy connection carries nothing from the cloud any more; dialling another one");
                }
                _ = self.identity.changed() => tracing::info!(cloud = self.node, "the certificate changed; replacing the proxy connection"),
                () = stop.cancelled() => {}
            }
            current = Some(connection);
        }
        // The cloud node is no longer a proxy, or has another address: open streams may end by themselves.
        current.iter().for_each(Connection::retire);
        while tasks.join_next().await.is_some() {}
    }

    /// Dials until a connection is established.
    async fn dial(&mut self) -> (TlsStream<TcpStream>, Link) {
        let mut reported = None;
        let (mut soon, mut late) = (backoff(limits::REDIAL), backoff(limits::REDIAL_REFUSED));
        loop {
            match self.connect().await {
                Ok(connected) => {
                    tracing::info!(
                        cloud = self.node,
                        host = self.host,
                        port = self.port,
                        "proxy connection established"
                    );
                    return connected;
                }
                Err(Error::NoIdentity) => {
                    if self.identity.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                Err(e) => {
                    let error = e.to_string();
                    if reported.as_ref() != Some(&error) {
                        tracing::warn!(
                            cloud = self.node,
                            host = self.host,
                            port = self.port,
                            error,
                            "cannot establish a proxy connection; retrying with backoff"
                        );
                        reported = Some(error);
                    }
                    let delay = if e.is_refusal() { late.next() } else { soon.next() };
                    self.pause(delay.unwrap_or(limits::REDIAL_REFUSED.1)).await;
                }
            }
        }
    }

    /// Waits for the delay, or for a new certificate, which may remove the cause of a refusal.
    async fn pause(&mut self, delay: Duration) {
        tokio::select! {
            () = sleep(delay) => {}
            _ = self.identity.changed() => {}
        }
    }

    async fn connect(&mut self) -> Result<(TlsStream<TcpStream>, Link), Error> {
        let identity = self.identity.borrow_and_update().clone().ok_or(Error::NoIdentity)?;
        let name = ServerName::try_from(self.host.clone()).map_err(|_| Error::BadHost(self.host.clone()))?;
        let connector = TlsConnector::from(identity.client()?);
        let limit = limits::DIAL[self.attempts % limits::DIAL.len()];
        self.attempts += 1;
        let tcp = timeout(limit, TcpStream::connect((self.host.as_str(), self.port))).await;
        let tcp = tcp.map_err(|_| Error::Timeout)?.map_err(Error::Connect)?;
        let link = Link::new(&tcp).map_err(Error::Connect)?;
        let tls = timeout(limits::HANDSHAKE, connector.connect(name, tcp)).await.map_err(|_| Error::Timeout)?;
        Ok((tls.map_err(Error::Tls)?, link))
    }

    /// Serves an established connection in its own task.
    fn serve(&self, tls: TlsStream<TcpStream>, link: Link, tasks: &mut JoinSet<()>) -> Connection {
        let gateway = self.server.plan.borrow().directory.pool_of(&self.node).unwrap_or_default().to_owned();
        let listed = self.server.stats.connection(&gateway, &self.node);
        let connection = Connection {
            stats: listed.stats.clone(),
            retire: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        let liveness = self.server.liveness;
        let keepalive = liveness.of_connection(self.number);
        let served = serve(tls, self.server.clone(), keepalive, listed.stats.clone(), connection.retire.clone());
        let interval = watch::channel(keepalive).1;
        let follow = link.follow(listed.stats.clone(), liveness.stream_timeout, interval, self.suspicion.clone());
        let count = count(self.established.clone(), self.node.clone(), listed.stats.clone());
        let (ended, node, number) = (connection.ended.clone(), self.node.clone(), listed.number);
        let span = tracing::info_span!("proxy_connection", cloud = %node, connection = number);
        let task = async move {
            let _until_the_end = (listed, ended.drop_guard());
            let error = tokio::select! {
                served = served => served.err().map(|e| e.to_string()),
                never = follow => match never {},
                never = count => match never {},
            };
            tracing::info!(cloud = node, error, "proxy connection closed");
        };
        tasks.spawn(task.instrument(span));
        connection
    }
}

/// A connection that is being served.
struct Connection {
    stats: Arc<ConnectionStats>,
    retire: CancellationToken,
    ended: CancellationToken,
}

impl Connection {
    /// Stops accepting streams; the connection ends with its last one.
    fn retire(&self) {
        self.stats.retire();
        self.retire.cancel();
    }
}

/// Waits until a connection has reached its maximum age. One that has carried no stream is as good as new, and a new one
/// would cost an idle site several kilobytes.
async fn aged(stats: &ConnectionStats) {
    loop {
        // Jitter keeps a thousand sites from reconnecting together.
        sleep(limits::CONNECTION_LIFE.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
        if stats.was_used() {
            return;
        }
    }
}

fn backoff((least, most): (Duration, Duration)) -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default().with_min_delay(least).with_max_delay(most).with_jitter().without_max_times().build()
}

/// Counts a connection as established until it is dropped.
struct EstablishedCount {
    established: watch::Sender<Established>,
    node: String,
}

impl EstablishedCount {
    fn new(established: &watch::Sender<Established>, node: &str) -> Self {
        established.send_modify(|counts| *counts.entry(node.to_owned()).or_default() += 1);
        Self { established: established.clone(), node: node.to_owned() }
    }
}

/// Counts a connection as established while it is not silent, until the future is dropped.
async fn count(established: watch::Sender<Established>, node: String, stats: Arc<ConnectionStats>) -> Infallible {
    loop {
        let counted = EstablishedCount::new(&established, &node);
        stats.until_silent(true).await;
        drop(counted);
        stats.until_silent(false).await;
    }
}

impl Drop for EstablishedCount {
    fn drop(&mut self) {
        self.established.send_modify(|counts| {
            if let Some(count) = counts.get_mut(&self.node) {
                *count -= 1;
            }
            counts.retain(|_, count| *count > 0);
        });
    }
}
