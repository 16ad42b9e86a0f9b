//! Detects gateway nodes that are cut off: Ready in Kubernetes, but without a connection to any other pool.
//!
//! A gateway node reports its connections in conditions TunnelConnected and ProxyConnected of its GatewayNode. A
//! negative report alone does not suffice: if the cloud is down, every site reports it, and new elections would not
//! help. A node therefore counts as cut off only while at least one other site reports a connection.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raven_api::gateway::EndpointType;

use super::facts::{GatewayFacts, GatewayName, LinkReports, NodeName};
use super::inputs::Inputs;

/// How long a negative report stays valid after the node stops reporting. A replaced node is no longer elected and
/// reports nothing; without this period it would be elected again as soon as its replacement is cut off, too.
const QUARANTINE: Duration = Duration::from_secs(1800);

/// Nodes whose last report was negative, with the time since when they report nothing; `None`: they still report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quarantine(BTreeMap<(NodeName, EndpointType), Option<Instant>>);

impl Quarantine {
    /// Updates the quarantine from the present reports.
    pub(crate) fn update(&mut self, reports: &LinkReports, now: Instant) {
        let of = |node: &NodeName, type_: EndpointType| reports.get(node).and_then(|facts| facts.of(type_));
        self.0.retain(|(node, type_), silent| match of(node, *type_) {
            Some(connected) => !connected,
            None => now.duration_since(*silent.get_or_insert(now)) < QUARANTINE,
        });
        for (node, facts) in reports {
            for type_ in
                [EndpointType::Tunnel, EndpointType::Proxy].into_iter().filter(|type_| facts.of(*type_) == Some(false))
            {
                self.0.insert((node.clone(), type_), None);
            }
        }
    }

    /// Adds a negative report for each node in quarantine that reports nothing.
    pub(crate) fn merge(&self, mut reports: LinkReports, now: Instant) -> LinkReports {
        for ((node, type_), silent) in &self.0 {
            if silent.is_some_and(|since| now.duration_since(since) < QUARANTINE) {
                Arc::make_mut(reports.entry(node.clone()).or_default()).of_mut(*type_).get_or_insert(false);
            }
        }
        reports
    }
}

/// Link reports of all nodes, and the sites that are connected.
#[derive(Debug)]
pub(crate) struct Links<'a> {
    reports: &'a LinkReports,
    exposed: &'a BTreeSet<GatewayName>,
    connected: BTreeMap<EndpointType, BTreeSet<&'a GatewayName>>,
}

impl<'a> Links<'a> {
    /// Evaluates the reports of the whole cluster.
    pub(crate) fn of(inputs: &'a Inputs, exposed: &'a BTreeSet<GatewayName>) -> Self {
        let mut connected: BTreeMap<EndpointType, BTreeSet<&GatewayName>> = BTreeMap::new();
        for gateway in inputs.gateways.values().filter(|g| !exposed.contains(&g.name)) {
            let elected = gateway.resource.status.iter().flat_map(|status| &status.active_endpoints);
            for endpoint in elected {
                let report = inputs
                    .links
                    .get(&NodeName::from(endpoint.node_name.as_str()))
                    .and_then(|facts| facts.of(endpoint.type_));
                // The report of a site without power is stale, as is that of an agent that no longer works.
                let name = NodeName::from(endpoint.node_name.as_str());
                let reports =
                    || inputs.nodes.get(&name).is_some_and(|node| node.ready) && !inputs.without_agent.contains(&name);
                if report == Some(true) && reports() {
                    connected.entry(endpoint.type_).or_default().insert(&gateway.name);
                }
            }
        }
        Self { reports: &inputs.links, exposed, connected }
    }

    /// True if a node of `gateway` is cut off. Nodes of exposed Gateways never count as cut off: their links fail
    /// together with those of the sites.
    pub(crate) fn is_cut_off(&self, gateway: &GatewayFacts, node: &NodeName, type_: EndpointType) -> bool {
        let disconnected = || self.reports.get(node).and_then(|facts| facts.of(type_)) == Some(false);
        let other_site_connected =
            || self.connected.get(&type_).is_some_and(|sites| sites.iter().any(|site| **site != gateway.name));
        !self.exposed.contains(&gateway.name) && disconnected() && other_site_connected()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::facts::LinkFacts;

    #[test]
    fn negative_report_is_kept_until_the_next_report_or_the_end_of_the_quarantine() {
        let reports = |tunnel: Option<bool>| {
            LinkReports::from([(NodeName::from("e1"), Arc::new(LinkFacts { tunnel, ..LinkFacts::default() }))])
        };
        let (now, mut quarantine) = (Instant::now(), Quarantine::default());
        let held = |quarantine: &Quarantine, at: Instant| {
            quarantine.merge(LinkReports::new(), at).get(&NodeName::from("e1")).and_then(|facts| facts.tunnel)
        };
        quarantine.update(&reports(Some(true)), now);
        quarantine.update(&LinkReports::new(), now);
        assert_eq!(held(&quarantine, now), None, "its last report was positive");
        quarantine.update(&reports(Some(false)), now);
        quarantine.update(&LinkReports::new(), now);
        assert_eq!(held(&quarantine, now), Some(false), "its GatewayNode was deleted");
        quarantine.update(&reports(None), now);
        assert_eq!(
            held(&quarantine, now + QUARANTINE / 2),
            Some(false),
            "it is elected again and has not reported yet"
        );
        assert_eq!(held(&quarantine, now + QUARANTINE), None);
        quarantine.update(&reports(Some(true)), now);
        assert_eq!(held(&quarantine, now), None, "it is connected");
    }
}
