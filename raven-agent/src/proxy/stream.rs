//! One stream: bytes both ways between a client and a node, until both directions have ended. Half-close is kept: one side's end is
//! told to the other, and what the other still has to say arrives.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
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

/// Carries a stream to its end, counts it and says how it ended. `first`: what the client has sent already.
pub(crate) async fn carry<C, N>(stream: Stream, client: C, mut node: N, first: &[u8], stats: &Stats)
where
    C: AsyncRead + AsyncWrite + Unpin,
    N: AsyncRead + AsyncWrite + Unpin,
{
    let start = Instant::now();
    let mut client = Counted::new(client);
    let (sent, received) = (client.read.clone(), client.written.clone());
    stats.opened();
    let _open = Open { stats, sent: sent.clone(), received: received.clone(), first: first.len() as u64 };
    let result = async {
        tokio::io::AsyncWriteExt::write_all(&mut node, first).await?;
        copy_bidirectional_with_sizes(&mut client, &mut node, limits::CHUNK, limits::CHUNK).await
    };
    let ended = match result.await {
        Ok(_) => "closed".to_owned(),
        Err(e) => e.to_string(),
    };
    tracing::info!(
        stream = stream.id,
        node = stream.node,
        port = stream.port,
        sent = sent.load(Ordering::Relaxed) + first.len() as u64,
        received = received.load(Ordering::Relaxed),
        seconds = start.elapsed().as_secs_f64(),
        ended,
        "stream"
    );
}

/// Counts the stream as closed, also when its task is dropped.
struct Open<'a> {
    stats: &'a Stats,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    first: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.stats.closed(self.sent.load(Ordering::Relaxed) + self.first, self.received.load(Ordering::Relaxed));
    }
}

/// Small packets at once, and a client that vanished is noticed though nothing is sent to it.
pub(crate) fn prepare(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    // Either is a comfort, no need.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// Counts what passes.
struct Counted<S> {
    inner: S,
    read: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
}

impl<S> Counted<S> {
    fn new(inner: S) -> Self {
        Self { inner, read: Arc::default(), written: Arc::default() }
    }
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
