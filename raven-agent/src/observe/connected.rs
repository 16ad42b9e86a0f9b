//! Whether this gateway node has a connection to any other pool, for the controller, which may elect another node instead: *yes* only while
//! it has one, *no* only after a while without; in between nothing is said. So the last site that still says yes falls silent before the
//! first one says no, where it is the other end that is down. Pure but for the clock that is handed in.

use std::time::{Duration, Instant};

use raven_api::condition::{ConditionType, Verdict};

/// How long a node that has just been elected may take for its first connection.
const FIRST: Duration = Duration::from_secs(60);
/// A tunnel to the cloud that broke is noticed within seconds everywhere.
const PROXY: Duration = Duration::from_secs(60);
/// A WireGuard session counts as alive for 180 s after its last handshake, and there is one every 120 s: of sites that lost their other end
/// at the same time, the last notices two minutes after the first.
const TUNNEL: Duration = Duration::from_secs(150);

/// One half's connections, in one term as an elected node.
#[derive(Clone, Debug)]
pub(super) struct Connected {
    type_: ConditionType,
    what: &'static str,
    /// How long it may be without one that it had.
    patience: Duration,
    /// There was one.
    had: bool,
    /// Since when there has been none.
    lack: Option<Instant>,
}

impl Connected {
    /// L3: WireGuard sessions with peers that we keep one with.
    pub(super) fn tunnel() -> Self {
        Self::new(ConditionType::TunnelConnected, "WireGuard session with a gateway node of another pool", TUNNEL)
    }

    /// L7: tunnels to the cloud.
    pub(super) fn proxy() -> Self {
        Self::new(ConditionType::ProxyConnected, "tunnel to a cloud gateway node", PROXY)
    }

    fn new(type_: ConditionType, what: &'static str, patience: Duration) -> Self {
        Self { type_, what, patience, had: false, lack: None }
    }

    /// A new term.
    pub(super) fn forget(&mut self) {
        (self.had, self.lack) = (false, None);
    }

    /// What is to be said, if anything. `live`: how many connections there are, of `all` that should be; where none should be, there is none
    /// to be missed.
    pub(super) fn verdict(&mut self, (live, all): (usize, usize), now: Instant) -> Option<Verdict> {
        if all == 0 {
            self.forget();
            return None;
        }
        if live > 0 {
            (self.had, self.lack) = (true, None);
            return Some(self.say(true, "Connected", format!("a {}", self.what)));
        }
        let since = *self.lack.get_or_insert(now);
        let patience = if self.had { self.patience } else { FIRST };
        (now.duration_since(since) >= patience).then(|| {
            self.say(false, "CutOff", format!("no {} for {patience:?} and more: look at this node's uplink and firewall", self.what))
        })
    }

    fn say(&self, ok: bool, reason: &'static str, message: String) -> Verdict {
        Verdict { type_: self.type_, ok, reason, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_says_yes_while_it_is_connected_no_after_a_while_and_nothing_in_between() {
        let (begin, mut connected) = (Instant::now(), Connected::tunnel());
        let mut at =
            |seconds: u64, live: usize| connected.verdict((live, 2), begin + Duration::from_secs(seconds)).map(|verdict| verdict.ok);
        assert_eq!(at(0, 0), None, "it has just been elected");
        assert_eq!(at(59, 0), None);
        assert_eq!(at(60, 0), Some(false), "and never had one");
        assert_eq!(at(70, 1), Some(true));
        assert_eq!(at(80, 0), None);
        assert_eq!(at(229, 0), None, "it had one");
        assert_eq!(at(230, 0), Some(false));
        assert_eq!(connected.verdict((0, 0), begin), None, "nobody to be connected with");
        let later = begin + Duration::from_secs(100_000);
        assert_eq!(connected.verdict((0, 1), later), None, "another term");
        assert_eq!(connected.verdict((0, 1), later + FIRST).map(|verdict| verdict.ok), Some(false));
    }
}
