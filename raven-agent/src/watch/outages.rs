//! Detects watches that have failed for a long time: the agent forwards with an old topology and does not receive changes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Duration after which an outage counts as long. A restart of the API server takes seconds to minutes.
const LONG: Duration = Duration::from_secs(600);
/// Maximum time between two failures of one outage: the longest backoff and the longest attempt. A watch that works
/// again reports nothing until an object changes, so only the absence of failures shows it.
const GAP: Duration = Duration::from_secs(120);

/// The outages of all watches.
#[derive(Clone, Debug, Default)]
pub struct Outages(Arc<Mutex<BTreeMap<&'static str, Outage>>>);

#[derive(Debug)]
struct Outage {
    first: Instant,
    last: Instant,
    error: String,
}

impl Outages {
    /// Records a failure of the watch of `list`.
    pub(super) fn record(&self, list: &'static str, error: String, now: Instant) {
        let mut outages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ongoing = outages.get(list).filter(|outage| now.duration_since(outage.last) < GAP);
        let first = ongoing.map_or(now, |outage| outage.first);
        outages.insert(list, Outage { first, last: now, error });
    }

    /// Returns a message for each watch that has failed for a long time and still fails.
    pub fn long(&self, now: Instant) -> Vec<String> {
        let outages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let long = outages.iter().filter(|(_, outage)| {
            now.duration_since(outage.last) < GAP && outage.last.duration_since(outage.first) >= LONG
        });
        long.map(|(list, Outage { first, error, .. })| {
            format!(
                "the watch of {list} has failed for {} minutes, so this node does not receive changes: {error}; check that the API server is \
                 reachable from this node and that deploy/rbac.yaml is applied",
                now.duration_since(*first).as_secs() / 60
            )
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_watch_that_has_failed_for_long_and_still_fails_is_reported() {
        let (start, outages) = (Instant::now(), Outages::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        let fails = |list, seconds| outages.record(list, format!("error at {seconds}"), at(seconds));
        for seconds in (0..600).step_by(60) {
            fails("Gateways", seconds);
        }
        assert_eq!(outages.long(at(599)), Vec::<String>::new());
        fails("Gateways", 600);
        fails("GatewayNodes", 600);
        let [message] = &outages.long(at(660))[..] else { panic!("{:?}", outages.long(at(660))) };
        assert!(message.starts_with("the watch of Gateways has failed for 11 minutes"), "{message}");
        assert!(message.contains("error at 600"), "{message}");
        // It works again: no more failures.
        assert_eq!(outages.long(at(720)), Vec::<String>::new());
        // A later failure is another outage.
        fails("Gateways", 800);
        assert_eq!(outages.long(at(801)), Vec::<String>::new());
    }
}
