//! One proxy stream: copies bytes between a client and a node until both directions have ended. Half-close is
//! preserved: the end of one direction is passed on, and the other direction continues.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes},
    net::TcpStream,
    time::Instant,
};

use super::{counted::Counted, limits, stats::Stats};

/// The identification of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// Id, the same on both gateway nodes.
    pub(crate) id: String,
    /// Name of the node.
    pub(crate) node: String,
    /// TCP port of the node.
    pub(crate) port: u16,
}

impl Stream {
    /// The span of everything that happens to the stream on this node.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::info_span!("proxy_stream", stream = %self.id, node = %self.node, port = self.port)
    }
}

/// Carries a stream to its end. `first`: bytes that the client has sent already.
pub(crate) async fn carry<C, N>(stream: Stream, mut client: C, node: N, first: &[u8], stats: &Stats)
where
    C: AsyncRead + AsyncWrite + Unpin,
    N: AsyncRead + AsyncWrite + Unpin,
{
    let account = Account::open(stream, stats);
    let mut node = account.count(node);
    let result = async {
        tokio::io::AsyncWriteExt::write_all(&mut node, first).await?;
        copy_bidirectional_with_sizes(&mut client, &mut node, limits::CHUNK, limits::CHUNK).await
    };
    account.close(result.await.err());
}

/// Accounts for one stream: counts it as open until it is closed or its task is dropped, then logs its totals.
pub(crate) struct Account {
    stream: Stream,
    stats: Stats,
    begin: Instant,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    outcome: String,
}

impl Account {
    pub(crate) fn open(stream: Stream, stats: &Stats) -> Self {
        stats.opened();
        let (stats, begin) = (stats.clone(), Instant::now());
        Self { stream, stats, begin, sent: Arc::default(), received: Arc::default(), outcome: "aborted".to_owned() }
    }

    /// Wraps the node's end, so that its bytes are counted.
    pub(crate) fn count<S>(&self, node: S) -> Counted<S> {
        Counted::new(node, self.received.clone(), self.sent.clone())
    }

    /// Closes the account, with the error that ended the stream, if any.
    pub(crate) fn close(mut self, error: Option<impl fmt::Display>) {
        self.outcome = error.map_or_else(|| "closed".to_owned(), |e| e.to_string());
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed));
        self.stats.closed(sent, received);
        let Stream { id, node, port } = &self.stream;
        let seconds = self.begin.elapsed().as_secs_f64();
        tracing::info!(stream = id, node, port, sent, received, seconds, outcome = self.outcome, "stream closed");
    }
}

/// Disables Nagle's algorithm, and enables keepalives so that a vanished client is detected on an idle connection.
pub(crate) fn prepare(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    // The stream works without either.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}
