//! How a dead proxy connection is noticed, how long its streams survive, and what an idle one costs.
//!
//! - **Idle**: the kernels exchange TCP keepalives, sparsely, because a site may pay for each byte. The edge sets the
//!   interval and tells the cloud, which sends far fewer. A connection without answers is closed.
//! - **With open streams**: the cloud sends a request every two seconds ([`limits::PROBE`]). An end that receives nothing for
//!   [`limits::SILENT`] and a round trip prefers other connections, and the edge dials a new one; but streams are not ended
//!   until nothing was acknowledged for [`limits::Liveness::stream_timeout`], so that a short stall of the link does not
//!   end an `exec`.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::{
    net::TcpStream,
    sync::{Notify, watch},
    time::{Instant, interval, sleep, timeout},
};

use super::{limits, stats::ConnectionStats};

/// Header of the cloud's measurements: their interval in seconds while streams are open.
pub(super) const INTERVAL_HEADER: &str = "raven-interval";
/// Header of the cloud's measurements: by its estimate, an answer takes no longer than this number of milliseconds.
pub(super) const ROUND_TRIP_HEADER: &str = "raven-round-trip";
/// Header of the edge's answers to measurements: its keepalive interval in seconds.
pub(super) const KEEPALIVE_HEADER: &str = "raven-keepalive";

/// Interval of the cloud's keepalives, from that of the edge. The edge may be stolen and send any number, so it is bounded.
///
/// These keepalives only find connections of sites that do not come back: when a site dials again, its older connections
/// are checked at once. (The kernel sends them even if the other end's keepalives arrive.)
pub(super) fn cloud_interval(edge: Duration) -> Duration {
    limits::CLOUD * edge.clamp(Duration::from_secs(1), MAXIMUM / limits::CLOUD)
}

/// How long it is normal that nothing arrives on a connection with streams, from the estimate of its round trips. On a thin
/// link with full queues, these take seconds, and the kernel sends nothing new while it repeats a lost packet.
///
/// The estimate is bounded, because the other end, which may be stolen, can delay its answers.
pub(super) fn quiet(round_trip: Duration) -> Duration {
    limits::SILENT + round_trip.min(limits::ROUND_TRIP)
}

/// Estimates how long a round trip takes at most, as TCP does for its retransmissions (RFC 6298 §2).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RoundTrips {
    /// The smoothed round-trip time and its variation; `None` before the first measurement.
    estimate: Option<(Duration, Duration)>,
}

impl RoundTrips {
    /// Adds a measurement.
    pub(super) fn add(&mut self, measured: Duration) {
        self.estimate = Some(match self.estimate {
            None => (measured, measured / 2),
            Some((smoothed, variation)) => {
                ((smoothed * 7 + measured) / 8, (variation * 3 + smoothed.abs_diff(measured)) / 4)
            }
        });
    }

    /// Zero before the first measurement.
    pub(super) fn longest(self) -> Duration {
        self.estimate.map_or(Duration::ZERO, |(smoothed, variation)| smoothed + variation * 4)
    }
}

/// Longest interval of keepalives that the kernel accepts (MAX_TCP_KEEPIDLE).
const MAXIMUM: Duration = Duration::from_secs(32_767);

/// Asks idle connections to check the other end at once. At the edge, the connections to one cloud node share it, and the
/// loss of one is the reason; in the cloud each has its own, and a new connection of the same edge is the reason.
pub(super) type Suspicion = Arc<Notify>;

/// The socket of a proxy connection, for its options.
pub(super) struct Link(Socket);

impl Link {
    /// Sets the options that do not change, and those of an idle connection.
    ///
    /// - TCP_NOTSENT_LOWAT: unsent data waits in its own stream and not in the socket, where a key stroke would wait
    ///   behind it.
    /// - TCP_CONGESTION: [`limits::CONGESTION`].
    pub(super) fn new(connection: &TcpStream) -> io::Result<Self> {
        static REPORTED: std::sync::Once = std::sync::Once::new();
        connection.set_nodelay(true)?;
        let socket = SockRef::from(connection).try_clone()?;
        // The connection works without either.
        let _ = socket.set_tcp_notsent_lowat(limits::UNSENT);
        if let Err(e) = socket.set_tcp_congestion(limits::CONGESTION.as_bytes()) {
            REPORTED.call_once(|| {
                tracing::info!(
                    algorithm = limits::CONGESTION,
                    error = %e,
                    "the kernel lacks the TCP congestion control for proxy connections, which are slow on lossy links without it; load its module (modprobe tcp_bbr)"
                );
            });
        }
        let link = Self(socket);
        link.set(limits::KEEPALIVE, limits::KEEPALIVE + limits::UNANSWERED);
        Ok(link)
    }

    /// Sends a keepalive after `idle` without a packet, then one per second, and closes the connection after `timeout`
    /// without an acknowledgement, of keepalives or of data (TCP_USER_TIMEOUT, tcp(7); zero: after three keepalives).
    fn set(&self, idle: Duration, timeout: Duration) {
        let keepalive = TcpKeepalive::new()
            .with_time(idle)
            .with_interval(Duration::from_secs(1))
            .with_retries(limits::UNANSWERED.as_secs() as u32);
        // Without these options a dead connection is noticed later, by HTTP/2 pings.
        let _ = self.0.set_tcp_user_timeout(Some(timeout));
        let _ = self.0.set_tcp_keepalive(&keepalive);
    }

    /// Follows a connection until the future is dropped: sets the options for its streams, and records in `stats` whether
    /// it is silent.
    pub(super) async fn follow(
        self,
        stats: Arc<ConnectionStats>,
        stream_timeout: Duration,
        mut idle: watch::Receiver<Duration>,
        suspicion: Suspicion,
    ) -> Infallible {
        let mut streams = stats.watch_streams();
        loop {
            stats.set_silent(false);
            tokio::select! {
                () = until(&mut streams, |open| open > 0) => {}
                never = self.idle(&mut idle, &suspicion) => match never {},
            }
            self.set(limits::PROBE, stream_timeout);
            tokio::select! {
                () = until(&mut streams, |open| open == 0) => {}
                never = listen(&stats, &suspicion) => match never {},
            }
            if !stats.is_responding() {
                // A request was sent and nothing came back: if the other end is dead, the kernel closes the connection now.
                let _ = timeout(stream_timeout, until(&mut streams, |open| open > 0)).await;
            }
        }
    }

    /// Sets the options of a connection without streams: sparse keepalives, or frequent ones after a suspicion.
    async fn idle(&self, interval: &mut watch::Receiver<Duration>, suspicion: &Suspicion) -> Infallible {
        loop {
            let sparse = *interval.borrow_and_update();
            self.set(sparse, sparse + limits::UNANSWERED);
            tokio::select! {
                Ok(()) = interval.changed() => {}
                () = suspicion.notified() => {
                    self.set(Duration::from_secs(1), Duration::ZERO);
                    sleep(limits::UNANSWERED * 2).await;
                    // With unacknowledged data the kernel has sent no keepalives. It repeats the data at growing intervals, and
                    // compares the timeout each time. With that timeout, one lost keepalive would close the connection, so
                    // none is sent meanwhile.
                    self.set(sparse.max(limits::REPEATED * 2), limits::UNANSWERED);
                    sleep(limits::REPEATED).await;
                }
            }
        }
    }
}

/// Records whether a connection with streams is silent.
async fn listen(stats: &ConnectionStats, suspicion: &Suspicion) -> Infallible {
    let (mut received, mut heard) = (stats.received(), Instant::now());
    let mut period = interval(limits::CHECK);
    loop {
        period.tick().await;
        if stats.received() != received {
            (received, heard) = (stats.received(), Instant::now());
        }
        let silent = stats.quiet().is_some_and(|quiet| heard.elapsed() > quiet);
        if stats.set_silent(silent) && silent {
            suspicion.notify_waiters();
        }
    }
}

/// Waits until the number of streams fulfils a condition.
async fn until(streams: &mut watch::Receiver<u32>, holds: impl Fn(u32) -> bool) {
    // The sender is part of the connection's counters, which the caller holds.
    let _ = streams.wait_for(|open| holds(*open)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_a_hostile_edge_is_bounded() {
        assert_eq!(cloud_interval(limits::KEEPALIVE), Duration::from_secs(300));
        assert_eq!(cloud_interval(Duration::ZERO), Duration::from_secs(20));
        assert_eq!(cloud_interval(Duration::from_secs(u64::MAX)), MAXIMUM);
    }

    #[test]
    fn silence_is_relative_to_the_round_trips_of_the_link() {
        let mut trips = RoundTrips::default();
        assert_eq!(quiet(trips.longest()), limits::SILENT);
        for _ in 0..50 {
            trips.add(Duration::from_millis(50));
        }
        // A dead link with 50 ms is still noticed within five seconds.
        assert!(quiet(trips.longest()) + limits::CHECK < Duration::from_secs(5), "{trips:?}");
        // Its queues fill.
        trips.add(Duration::from_millis(2500));
        assert!(trips.longest() > Duration::from_millis(2500), "{trips:?}");
        // And become empty again.
        for _ in 0..50 {
            trips.add(Duration::from_millis(50));
        }
        assert!(trips.longest() < Duration::from_millis(100), "{trips:?}");
        // The other end delays its answers.
        trips.add(Duration::from_secs(10_000));
        assert_eq!(quiet(trips.longest()), limits::SILENT + limits::ROUND_TRIP);
    }
}
