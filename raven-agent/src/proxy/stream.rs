//! One stream: bytes both ways between a client and a node, until both directions have ended. Half-close is kept: one side's end is
//! told to the other, and what the other still has to say arrives.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes},
    net::TcpStream,
    time::Instant,
};

use super::{limits, stats::Stats};

/// What is known of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// The same on both gateway nodes.
    pub(crate) id: String,
    /// The node that is talked to.
    pub(crate) node: String,
    /// Its port.
    pub(crate) port: u16,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}:{}", self.id, self.node, self.port)
    }
}

/// Carries a stream to its end. `first`: what the client has sent already.
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

/// The books of one stream: counted as open until it is closed, or its task dropped; then the log says how it went.
pub(crate) struct Account {
    stream: Stream,
    stats: Stats,
    begin: Instant,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    ended: String,
}

impl Account {
    pub(crate) fn open(stream: Stream, stats: &Stats) -> Self {
        stats.opened();
        let (stats, begin) = (stats.clone(), Instant::now());
        Self { stream, stats, begin, sent: Arc::default(), received: Arc::default(), ended: "cut off here".to_owned() }
    }

    /// The node's end, whose bytes are the stream's.
    pub(crate) fn count<S>(&self, node: S) -> Counted<S> {
        Counted { inner: node, read: self.received.clone(), written: self.sent.clone() }
    }

    /// The end, and why, if it was not in good order.
    pub(crate) fn close(mut self, error: Option<impl fmt::Display>) {
        self.ended = error.map_or_else(|| "closed".to_owned(), |e| e.to_string());
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed));
        self.stats.closed(sent, received);
        let Stream { id, node, port } = &self.stream;
        tracing::info!(stream = id, node, port, sent, received, seconds = self.begin.elapsed().as_secs_f64(), ended = self.ended, "stream");
    }
}

/// Small packets at once, and a client that vanished is noticed though nothing is sent to it.
pub(crate) fn prepare(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    // Either is a comfort, no need.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// The same for a connection that carries a tunnel, at both ends.
///
/// Pings see to it that there is always something under way, and the kernel ends the connection when nothing at all of it is acknowledged
/// in time (TCP_USER_TIMEOUT, tcp(7)): a dead link is told from a thin one, on which a ping's answer waits behind what a `kubectl cp`
/// sends. What has not been sent yet waits in its own stream, not in the socket, where a key stroke would wait behind it
/// (TCP_NOTSENT_LOWAT). A packet that a bad link lost is no reason to slow down, as it is for the kernel's usual congestion control: see
/// [`limits::CONGESTION`].
pub(crate) fn prepare_tunnel(connection: &TcpStream) {
    static SAID: Once = Once::new();
    let _ = connection.set_nodelay(true);
    let socket = SockRef::from(connection);
    let _ = socket.set_tcp_user_timeout(Some(limits::UNACKNOWLEDGED));
    let _ = socket.set_tcp_notsent_lowat(limits::UNSENT);
    if let Err(e) = socket.set_tcp_congestion(limits::CONGESTION.as_bytes()) {
        SAID.call_once(|| {
            let control = limits::CONGESTION;
            tracing::info!(
                "no TCP congestion control {control} ({e}; modprobe tcp_{control}): tunnels are slow on links that lose packets"
            );
        });
    }
}

/// Counts what passes.
pub(crate) struct Counted<S> {
    inner: S,
    read: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.read.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = &result {
            self.written.fetch_add(*written as u64, Ordering::Relaxed);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
