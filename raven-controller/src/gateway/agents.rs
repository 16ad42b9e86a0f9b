//! Detects nodes on which no agent works: Ready in Kubernetes, but not able to become a gateway node, for example
//! because the image cannot be pulled, a port is taken, or the node runs Windows.
//!
//! The heartbeat is the condition Ready of the agent's Pod, which the kubelet reports in any case. The dataplane
//! outlives the agent, so a node counts as without an agent only after a timeout: an upgrade must not move the traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::facts::{AgentFacts, NodeName};

/// Default of the timeout. Long enough for a slow link to pull a new image.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);

/// Nodes without a Ready agent, with the time since when.
#[derive(Clone, Debug)]
pub(crate) struct Absences {
    timeout: Duration,
    since: BTreeMap<NodeName, Instant>,
}

impl Absences {
    /// Creates an empty list.
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, since: BTreeMap::new() }
    }

    /// Updates the list from the present Nodes and Pods. Without any Pod the list is empty: agents that do not run as
    /// Pods have no heartbeat.
    pub(crate) fn update<'a>(
        &mut self,
        nodes: impl Iterator<Item = &'a NodeName>,
        agents: &BTreeMap<String, Arc<AgentFacts>>,
        now: Instant,
    ) {
        let mut before = std::mem::take(&mut self.since);
        if agents.is_empty() {
            return;
        }
        let present: BTreeSet<&NodeName> =
            agents.values().filter(|agent| agent.ready).map(|agent| &agent.node).collect();
        let absent = nodes.filter(|name| !present.contains(name));
        self.since = absent.map(|name| (name.clone(), before.remove(name).unwrap_or(now))).collect();
    }

    /// Returns the nodes that have had no Ready agent for the whole timeout.
    pub(crate) fn nodes(&self, now: Instant) -> BTreeSet<NodeName> {
        let long = self.since.iter().filter(|(_, since)| now.duration_since(**since) >= self.timeout);
        long.map(|(name, _)| name.clone()).collect()
    }

    /// Returns the next time at which the result of [`Absences::nodes`] changes by itself.
    pub(crate) fn next_timeout(&self, now: Instant) -> Option<Instant> {
        self.since.values().map(|since| *since + self.timeout).filter(|end| *end > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(agents: &[(&str, bool)]) -> BTreeMap<String, Arc<AgentFacts>> {
        let facts = |(n, (node, ready)): (usize, &(&str, bool))| {
            (format!("agent-{n}"), Arc::new(AgentFacts { node: (*node).into(), ready: *ready }))
        };
        agents.iter().enumerate().map(facts).collect()
    }

    #[test]
    fn node_counts_after_the_timeout_and_until_its_agent_is_ready() {
        let (now, names) = (Instant::now(), ["a", "b", "windows"].map(NodeName::from));
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut absences = Absences::new(TIMEOUT);
        absences.update(names.iter(), &pods(&[("a", true), ("b", true)]), at(0));
        absences.update(names.iter(), &pods(&[("a", true), ("b", false)]), at(60));
        assert_eq!(absences.nodes(at(119)), [].into());
        assert_eq!(absences.next_timeout(at(60)), Some(at(120)));
        assert_eq!(absences.nodes(at(120)), ["windows".into()].into());
        // Its Pod is replaced twice by one that is not Ready either.
        absences.update(names.iter(), &pods(&[("a", true)]), at(100));
        absences.update(names.iter(), &pods(&[("a", true), ("b", false)]), at(110));
        assert_eq!(absences.next_timeout(at(120)), Some(at(180)));
        assert_eq!(absences.nodes(at(180)), ["b".into(), "windows".into()].into());
        assert_eq!(absences.next_timeout(at(180)), None);
        absences.update(names.iter(), &pods(&[("a", true), ("b", true)]), at(200));
        assert_eq!(absences.nodes(at(200)), ["windows".into()].into());
    }

    #[test]
    fn without_any_pod_no_node_counts() {
        let (now, names) = (Instant::now(), ["a"].map(NodeName::from));
        let mut absences = Absences::new(TIMEOUT);
        absences.update(names.iter(), &pods(&[("b", true)]), now);
        absences.update(names.iter(), &pods(&[]), now);
        assert_eq!(absences.nodes(now + TIMEOUT), [].into());
    }
}
