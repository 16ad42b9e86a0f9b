//! Windows, limits and times of the L7 path. None is left at a library's default: with hyper's, one reader that stalls stops a whole
//! tunnel, and h2's guards against floods close a site's connection for ordinary `logs -f` or `exec` traffic (PEERS.md §3.1).

use std::time::Duration;

use hyper_util::rt::TokioTimer;

/// What the receiver of one stream holds at most for a reader that does not read, bytes: 40 Mbit/s and 100 ms.
pub(crate) const STREAM_WINDOW: u32 = 512 << 10;
/// The protocol's largest (RFC 9113 §6.9.1): it never stops a stream for another one's sake. What a tunnel holds in memory is bounded
/// by [`STREAMS`] × [`STREAM_WINDOW`]. Half of it is also h2's budget for small frames, which are many in an `exec`.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Streams of one tunnel at a time.
pub(crate) const STREAMS: u32 = 1024;
/// What one stream may have waiting to be sent, bytes.
pub(crate) const SEND_BUFFER: usize = 256 << 10;
/// Streams that the other side reset before we took note, and that we reset: h2 closes the connection beyond these. The other side is
/// authenticated, and both happen in numbers when a client that watches a thousand logs goes away.
pub(crate) const RESETS: usize = 1 << 20;

/// Tunnels of each edge gateway node to each cloud gateway node: one can be retired, or lost, while the other works.
pub(crate) const TUNNELS: usize = 2;
/// A tunnel's life; then a new one takes over, and the old one ends with its last stream. What a connection counts over its life (h2's
/// guards do) never grows old.
pub(crate) const TUNNEL_LIFE: Duration = Duration::from_secs(3600);
/// How often a tunnel is pinged.
pub(crate) const PING: Duration = Duration::from_secs(2);
/// How long nothing of what was sent may be acknowledged: with [`PING`], a dead link is noticed within five seconds.
pub(crate) const UNACKNOWLEDGED: Duration = Duration::from_secs(3);
/// How long the answer to a ping may take where packets do arrive: for a process that hangs. It may wait behind a stream's whole window
/// ([`STREAM_WINDOW`]) on a thin link.
pub(crate) const PONG: Duration = Duration::from_secs(30);
/// What may lie unsent in a tunnel's socket, bytes.
pub(crate) const UNSENT: u32 = 128 << 10;
/// TCP congestion control of tunnels (TCP_CONGESTION, tcp(7)), where the kernel has it. It goes by the rate at which packets arrive, where
/// cubic, most kernels' default, halves its own at each loss: at 1 % lost and 50 ms that leaves a few Mbit/s of any link.
pub(crate) const CONGESTION: &str = "bbr";
/// How often a tunnel is asked for an answer of its other end, to know how long that takes. For people: nothing follows from it.
pub(crate) const PROBE: Duration = Duration::from_secs(15);

/// TCP connect and TLS handshake of a tunnel.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long an edge waits for the answer to its SYN, attempt by attempt, over and over. Short ones, because the kernel repeats a SYN after
/// 1, 3 and 7 s, and a link that comes back is to be noticed within the second; a long one now and then, for a link that is that slow.
pub(crate) const DIAL: [Duration; 4] =
    [Duration::from_millis(1500), Duration::from_millis(1500), Duration::from_millis(1500), Duration::from_secs(5)];
/// Redials: from, to; the jitter may double either.
pub(crate) const REDIAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// The same where the other side answered, and refused: a certificate or an election has to change first.
pub(crate) const REDIAL_REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long a request waits for a tunnel, and for the answer of the node at its other end.
pub(crate) const OPEN: Duration = Duration::from_secs(8);
/// How long one tunnel has to answer before another one is tried.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(4);
/// How long one has to answer before a tunnel that has come up since is preferred.
pub(crate) const GRACE: Duration = Duration::from_millis(500);
/// How long an edge gateway node tries to connect to a node of its pool.
pub(crate) const CONNECT: Duration = Duration::from_secs(3);
/// How long a client may take for its ClientHello or the head of its request.
pub(crate) const HEAD: Duration = Duration::from_secs(5);
/// The largest ClientHello, bytes: what one TLS handshake message of 64 KiB takes on the wire.
pub(crate) const HELLO: usize = 66 << 10;
/// Clients of one listener that have not yet said what they want. For one more, the oldest goes.
pub(crate) const UNDECIDED: usize = 2048;
/// Tunnels that are being set up at a time; likewise.
pub(crate) const HANDSHAKES: usize = 512;
/// Tunnels of one edge gateway node to one cloud gateway node that take streams: whoever brings them is authenticated, and may be stolen.
pub(crate) const TUNNELS_OF_A_NODE: usize = 64;

/// What is read at a time, bytes, and the largest frame of HTTP/2 that is taken: fewer and larger ones cost less each.
pub(crate) const CHUNK: usize = 32 << 10;

/// The edge's half of a tunnel: it serves.
pub(crate) fn server() -> hyper::server::conn::http2::Builder<hyper_util::rt::TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .max_frame_size(CHUNK as u32)
        .max_send_buf_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    builder
}

/// The cloud's half: it asks.
pub(crate) fn client() -> hyper::client::conn::http2::Builder<hyper_util::rt::TokioExecutor> {
    let mut builder = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(CHUNK as u32)
        .max_send_buf_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .keep_alive_while_idle(true);
    builder
}
