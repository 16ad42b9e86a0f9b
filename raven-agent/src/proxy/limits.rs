//! Windows, limits and timeouts of the L7 half, and the HTTP/2 settings made of them.
//!
//! None is left at a library's default. With hyper's defaults, one stalled reader stops a whole proxy
//! connection, and h2's flood protection closes a site's connection under ordinary `logs -f` or `exec`
//! traffic (docs/design.md, "HTTP/2").

use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioTimer};

// === Streams ===

/// Receive window of a stream in bytes: what is buffered for a reader that does not read. Enough for 40 Mbit/s
/// at 100 ms.
pub(crate) const STREAM_WINDOW: u32 = 512 << 10;
/// Receive window of a connection in bytes: the protocol's maximum (RFC 9113 §6.9.1), so that no stream
/// stops another one.
///
/// The memory of a connection is bounded by [`STREAMS`] × [`STREAM_WINDOW`]. h2 derives its budget for small frames, of
/// which `exec` sends many, from half of this window.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Streams of a client as a multiple of those that are free; see [`fairness`](super::fairness).
pub(crate) const SHARE: u32 = 4;
/// Concurrent streams per connection.
pub(crate) const STREAMS: u32 = 1024;
/// Send buffer of a stream in bytes.
pub(crate) const SEND_BUFFER: usize = 256 << 10;
/// Stream resets that h2 tolerates before it closes the connection: streams that the peer reset before they were
/// accepted, and streams reset here. The peer is authenticated, and a client that follows a thousand logs causes many
/// of both when it disconnects.
pub(crate) const RESETS: usize = 1 << 20;
/// Read size in bytes, and the maximum size of an HTTP/2 frame. Larger chunks cost less per byte.
pub(crate) const CHUNK: usize = 32 << 10;

// === Proxy connections ===

/// Connections from each edge gateway node to each cloud gateway node, so that one can be retired or lost while
/// the other works.
pub(crate) const CONNECTIONS: usize = 2;
/// Age at which a connection that has carried streams is replaced. The old one ends with its last stream. Counters that
/// h2 keeps per connection start at zero in the new one.
pub(crate) const CONNECTION_LIFE: Duration = Duration::from_secs(3600);
/// Interval of measurements of the round-trip time while streams are open. They also show each end that the other one
/// works.
pub(crate) const PROBE: Duration = Duration::from_secs(2);
/// Time without a received byte after which a connection with open streams counts as silent, on a link without delay: with
/// [`CHECK`], a dead link is noticed within five seconds. See `liveness::quiet`.
pub(crate) const SILENT: Duration = Duration::from_millis(3500);
/// Maximum estimate of a round trip, which is added to [`SILENT`].
pub(crate) const ROUND_TRIP: Duration = Duration::from_secs(10);
/// Time without streams after which the estimate is forgotten: the link may have been busy before, and the first measurement
/// includes the start of the connection.
pub(crate) const ESTIMATE_LIFE: Duration = Duration::from_secs(1);
/// Interval of the check for silence.
pub(crate) const CHECK: Duration = Duration::from_millis(250);
/// Default time without an acknowledgement after which streams are ended.
pub(crate) const STREAM_TIMEOUT: Duration = Duration::from_secs(30);
/// Default interval of TCP keepalives on the first idle connection of an edge to a cloud gateway node. Two packets
/// of 66 bytes on Ethernet: 23 MB a month.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(15);
/// The interval on the other connections, as a multiple. Short enough to keep the mapping of a NAT alive.
pub(crate) const SPARE: u32 = 4;
/// The interval of the cloud's keepalives, as a multiple.
pub(crate) const CLOUD: u32 = 20;
/// Time without an answer to keepalives, which are then sent every second, after which an idle connection is closed.
pub(crate) const UNANSWERED: Duration = Duration::from_secs(3);
/// Time for which a suspected connection is checked for unacknowledged data: the kernel repeats that at intervals that double
/// each time.
pub(crate) const REPEATED: Duration = Duration::from_secs(30);
/// Default interval of the edge's HTTP/2 pings on an idle connection.
pub(crate) const PING: Duration = Duration::from_secs(300);
/// Measurements of the round-trip time without an answer, at most.
pub(crate) const PROBES: usize = 16;
/// Unsent bytes that a connection's socket may hold.
pub(crate) const UNSENT: u32 = 128 << 10;
/// TCP congestion control of proxy connections (TCP_CONGESTION, tcp(7)), if the kernel has it. BBR follows the delivery
/// rate. Cubic, the usual default, halves its rate at each loss, which leaves a few Mbit/s of any link with 1 % loss
/// and 50 ms.
pub(crate) const CONGESTION: &str = "bbr";
/// Connections that one edge gateway node may have to one cloud gateway node. The edge is authenticated, but it
/// may be stolen.
pub(crate) const CONNECTIONS_PER_NODE: usize = 64;

// === Dialling ===

/// Timeout of a connection's TLS handshake.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);
/// Timeouts of successive TCP connects, repeated from the start. Most are short, because the kernel retries a SYN only
/// after 1, 3 and 7 s, and a restored link must be noticed within a second; one is long, for links with a large delay.
pub(crate) const DIAL: [Duration; 4] =
    [Duration::from_millis(1500), Duration::from_millis(1500), Duration::from_millis(1500), Duration::from_secs(5)];
/// Minimum and maximum delay between dials; jitter may double either.
pub(crate) const REDIAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// Minimum and maximum delay between dials after the cloud refused the edge: a certificate or an election has to change first.
pub(crate) const REDIAL_REFUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

// === Requests ===

/// Maximum time until a connection exists for a stream.
pub(crate) const OPEN: Duration = Duration::from_secs(8);
/// Maximum time until the node has answered: on a thin link with full queues, an answer takes long.
pub(crate) const ANSWER: Duration = Duration::from_secs(16);
/// Time for one connection to open a stream before another one is tried, if it is silent then. A dead connection is.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(4);
/// Time for one connection to open a stream before a newer one is preferred.
pub(crate) const GRACE: Duration = Duration::from_millis(500);
/// Timeout of a connect from an edge gateway node to a node of its pool.
pub(crate) const CONNECT: Duration = Duration::from_secs(3);
/// Timeout for a client's ClientHello or request head.
pub(crate) const HEAD: Duration = Duration::from_secs(5);
/// Maximum size of a ClientHello in bytes: a TLS handshake message of 64 KiB with its record headers.
pub(crate) const CLIENT_HELLO: usize = 66 << 10;
/// Pending client connections per listener.
pub(crate) const PENDING_CLIENTS: usize = 2048;
/// Pending proxy connections.
pub(crate) const PENDING_EDGES: usize = 512;

/// Settings of a node: how dead proxy connections are noticed; see `liveness`.
#[derive(Clone, Copy, Debug)]
pub struct Liveness {
    /// Interval of keepalives of an idle site, which is also the time until it notices a dead link.
    pub keepalive: Duration,
    /// Interval of the edge's HTTP/2 pings on an idle connection. They detect what kernels do not: a process that hangs, and
    /// a load balancer that answers keepalives itself.
    pub ping: Duration,
    /// Time without an acknowledgement after which streams are ended.
    pub stream_timeout: Duration,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { keepalive: KEEPALIVE, ping: PING, stream_timeout: STREAM_TIMEOUT }
    }
}

impl Liveness {
    /// Interval of the edge's keepalives on its connection with this number. Only the first one detects a dead link soon;
    /// the others are checked when it is lost.
    pub(crate) fn of_connection(self, number: usize) -> Duration {
        if number == 0 { self.keepalive } else { SPARE * self.keepalive }
    }
}

/// HTTP/2 settings of the edge, which is the server of a proxy connection.
pub(crate) fn server(liveness: Liveness) -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .max_frame_size(CHUNK as u32)
        .max_send_buf_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .keep_alive_interval(liveness.ping)
        .keep_alive_timeout(liveness.stream_timeout);
    builder
}

/// HTTP/2 settings of the cloud, which is the client of a proxy connection. It pings while streams are open.
pub(crate) fn client(liveness: Liveness) -> hyper::client::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(CHUNK as u32)
        .max_send_buf_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .keep_alive_interval(SILENT)
        .keep_alive_timeout(liveness.stream_timeout)
        .keep_alive_while_idle(false);
    builder
}
