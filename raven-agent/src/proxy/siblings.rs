//! Checks the other proxies of the own pool. Idle sites notice the failure of a cloud gateway node late, because their
//! keepalives are sparse; the nodes of a pool share a network, where frequent checks cost nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use futures::future::join_all;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

/// Interval of the checks, and the timeout of each.
const CHECK: Duration = Duration::from_secs(1);
/// Failed checks in succession after which a proxy counts as unreachable.
const FAILED: u32 = 3;
/// Failed checks in succession after which it is not reported any more. The sites have noticed a failure by then, and their
/// reports decide; so a lasting obstacle between two nodes, or a fault of the reporting one, does little harm.
const STALE: u32 = 60;

/// Addresses that the other proxies of the pool accept requests on, by node.
pub(super) type Siblings = BTreeMap<String, SocketAddr>;

/// Connects to each sibling at fixed intervals and publishes the names of those that accept no connection, until the
/// task is dropped.
pub(super) async fn run(siblings: watch::Receiver<Siblings>, unreachable: watch::Sender<BTreeSet<String>>) {
    let mut checks = Checks::default();
    let mut period = interval(CHECK);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let addresses = siblings.borrow().clone();
        let answers = addresses.iter().map(async |(node, address)| {
            // The connection is closed at once: the kernel of a node that has lost power does not accept it, and that of
            // a node without an agent refuses it.
            let connected = timeout(CHECK, TcpStream::connect(address)).await;
            (node.clone(), matches!(connected, Ok(Ok(_))))
        });
        let lost = checks.record(join_all(answers).await);
        unreachable.send_if_modified(|have| super::replace(have, lost));
    }
}

/// The failed checks in succession of each sibling that was reached at least once. Others may be behind a firewall,
/// which says nothing about their state.
#[derive(Default)]
struct Checks(BTreeMap<String, u32>);

impl Checks {
    /// Records a round of checks; returns the siblings that are unreachable now.
    fn record(&mut self, answers: Vec<(String, bool)>) -> BTreeSet<String> {
        let before = std::mem::take(&mut self.0);
        for (node, reached) in answers {
            match (reached, before.get(&node)) {
                (true, _) => drop(self.0.insert(node, 0)),
                (false, Some(failed)) if *failed < STALE => drop(self.0.insert(node, failed + 1)),
                // It must be reached again first.
                (false, _) => {}
            }
        }
        self.0.iter().filter(|(_, failed)| **failed >= FAILED).map(|(node, _)| node.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sibling_that_was_reached_is_lost_after_three_failures_and_comes_back() {
        let mut checks = Checks::default();
        let mut round = |answers: &[(&str, bool)]| {
            let answers = answers.iter().map(|(node, reached)| ((*node).to_owned(), *reached)).collect();
            checks.record(answers).into_iter().collect::<Vec<_>>()
        };
        for _ in 0..5 {
            assert!(round(&[("a", true), ("b", false)]).is_empty(), "b may be behind a firewall");
        }
        assert!(round(&[("a", false), ("b", true)]).is_empty());
        assert!(round(&[("a", false), ("b", true)]).is_empty());
        assert_eq!(round(&[("a", false), ("b", true)]), ["a"]);
        assert_eq!(round(&[("a", false), ("b", false)]), ["a"]);
        assert!(round(&[("a", true), ("b", false)]).is_empty());
        assert_eq!(round(&[("b", false)]), ["b"], "a is no longer elected");
        assert!((0..STALE - FAILED).all(|_| round(&[("b", false)]) == ["b"]));
        assert!(round(&[("b", false)]).is_empty(), "the sites have noticed");
        assert!(round(&[("a", false)]).is_empty(), "elected again and not reached yet");
    }
}
