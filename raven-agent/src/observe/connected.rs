//! Whether this gateway node has a connection to any other pool: said only after a while without one, so that the controller can elect
//! another node, and not at every hiccup. Pure but for the clock that is handed in.

use std::time::{Duration, Instant};

use raven_api::condition::{ConditionType, Verdict};

/// So long without a connection is more than a link that is cut for half a minute, or an agent's start.
const PATIENCE: Duration = Duration::from_secs(60);

/// One half's connections.
#[derive(Clone, Debug)]
pub(super) struct Connected {
    type_: ConditionType,
    what: &'static str,
    /// Since when there has been none.
    since: Option<Instant>,
}

impl Connected {
    /// L3: WireGuard sessions.
    pub(super) fn tunnel() -> Self {
        Self { type_: ConditionType::TunnelConnected, what: "WireGuard session with a gateway node of another pool", since: None }
    }

    /// L7: tunnels to the cloud.
    pub(super) fn proxy() -> Self {
        Self { type_: ConditionType::ProxyConnected, what: "tunnel to a cloud gateway node", since: None }
    }

    /// What is to be said. `now`: how many connections there are, of how many that should be; where none should be, nothing is said.
    pub(super) fn verdict(&mut self, (live, all): (usize, usize), now: Instant) -> Option<Verdict> {
        if all == 0 {
            self.since = None;
            return None;
        }
        let since = *match live {
            0 => self.since.get_or_insert(now),
            _ => self.since.insert(now),
        };
        let ok = now.duration_since(since) < PATIENCE;
        let (reason, message) = match ok {
            true => ("Connected", format!("a {}, or none for less than {PATIENCE:?}", self.what)),
            false => ("CutOff", format!("no {} for {PATIENCE:?} and more: look at this node's uplink and firewall", self.what)),
        };
        Some(Verdict { type_: self.type_, ok, reason, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_cut_off_after_a_minute_without_a_connection_and_not_before() {
        let (begin, mut connected) = (Instant::now(), Connected::tunnel());
        let mut at =
            |seconds: u64, live: usize| connected.verdict((live, 2), begin + Duration::from_secs(seconds)).map(|verdict| verdict.ok);
        assert_eq!(at(0, 0), Some(true), "an agent that has just started");
        assert_eq!(at(59, 0), Some(true));
        assert_eq!(at(60, 0), Some(false));
        assert_eq!(at(70, 1), Some(true), "back");
        assert_eq!(at(129, 0), Some(true), "since it was last seen");
        assert_eq!(at(131, 0), Some(false));
        assert_eq!(connected.verdict((0, 0), begin), None, "nobody to be connected with");
    }
}
