//! Conditions `TunnelConnected` and `ProxyConnected`, by which the controller may elect another node: True while this
//! gateway node has a connection to another pool, False after a period without one, absent in between.
//!
//! When the other end fails, all sites lose their connections. The period in between ensures that the last True
//! disappears before the first False, so that no site is judged by the others. Pure: the clock is an argument.

use std::time::{Duration, Instant};

use raven_api::condition::{ConditionType, Verdict};

/// Time for the first connection after an election.
const FIRST: Duration = Duration::from_secs(60);
/// Time without a proxy connection. Every site notices a failed connection within seconds.
const PROXY: Duration = Duration::from_secs(60);
/// Time without a WireGuard session. A session counts as alive for 180 s after a handshake, and handshakes repeat every
/// 120 s, so the last of several sites notices a common failure two minutes after the first.
const TUNNEL: Duration = Duration::from_secs(150);

/// The connections of one half, since the node was elected.
#[derive(Clone, Debug)]
pub(super) struct Connected {
    type_: ConditionType,
    what: &'static str,
    /// Time without a connection before the condition is False.
    limit: Duration,
    /// There was a connection since the election.
    had: bool,
    /// Begin of the time without a connection.
    lost: Option<Instant>,
}

impl Connected {
    /// L3: WireGuard sessions with peers that have a keepalive.
    pub(super) fn tunnel() -> Self {
        Self::new(ConditionType::TunnelConnected, "WireGuard session with a gateway node of another pool", TUNNEL)
    }

    /// L7: proxy connections to the cloud.
    pub(super) fn proxy() -> Self {
        Self::new(ConditionType::ProxyConnected, "proxy connection to a cloud gateway node", PROXY)
    }

    fn new(type_: ConditionType, what: &'static str, limit: Duration) -> Self {
        Self { type_, what, limit, had: false, lost: None }
    }

    /// Starts again: the node is no longer elected, or has nothing to connect to.
    pub(super) fn reset(&mut self) {
        (self.had, self.lost) = (false, None);
    }

    /// The condition, if it is decided. `live`: the number of connections, of `all` that are planned. If none is
    /// planned, none can be missing.
    pub(super) fn verdict(&mut self, (live, all): (usize, usize), now: Instant) -> Option<Verdict> {
        if all == 0 {
            self.reset();
            return None;
        }
        if live > 0 {
            (self.had, self.lost) = (true, None);
            return Some(self.condition(true, "Connected", format!("the node has a {}", self.what)));
        }
        let since = *self.lost.get_or_insert(now);
        let limit = if self.had { self.limit } else { FIRST };
        (now.duration_since(since) >= limit).then(|| {
            let message = format!(
                "the node has had no {} for at least {} s; check its uplink and firewall",
                self.what,
                limit.as_secs()
            );
            self.condition(false, "CutOff", message)
        })
    }

    fn condition(&self, ok: bool, reason: &'static str, message: String) -> Verdict {
        Verdict { type_: self.type_, ok, reason, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn condition_is_true_while_connected_and_false_after_the_limit() {
        let (begin, mut connected) = (Instant::now(), Connected::tunnel());
        let mut at = |seconds: u64, live: usize| {
            connected.verdict((live, 2), begin + Duration::from_secs(seconds)).map(|verdict| verdict.ok)
        };
        assert_eq!(at(0, 0), None, "just elected");
        assert_eq!(at(59, 0), None);
        assert_eq!(at(60, 0), Some(false), "never connected");
        assert_eq!(at(70, 1), Some(true));
        assert_eq!(at(80, 0), None);
        assert_eq!(at(229, 0), None, "was connected");
        assert_eq!(at(230, 0), Some(false));
        assert_eq!(connected.verdict((0, 0), begin), None, "nothing to connect to");
        let later = begin + Duration::from_secs(100_000);
        assert_eq!(connected.verdict((0, 1), later), None, "starts again");
        assert_eq!(connected.verdict((0, 1), later + FIRST).map(|verdict| verdict.ok), Some(false));
    }
}
