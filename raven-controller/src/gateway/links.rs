//! Which gateway nodes are cut off: Ready for Kubernetes, and yet without a connection to any other pool, while other sites have one.
//!
//! Each says so of itself, after a while (conditions TunnelConnected and ProxyConnected of its GatewayNode). That alone would not do: where
//! the cloud is down, every site says so, and electing others everywhere would mend nothing. So another site has to bear witness.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::core::DynamicObject;
use raven_api::condition::ConditionType;
use raven_api::gateway::EndpointType;

use super::inputs::{GatewayName, Inputs, NodeName};

/// What a gateway node says of its connections; `None`: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkFacts {
    /// Of L3.
    pub tunnel: Option<bool>,
    /// Of L7.
    pub proxy: Option<bool>,
}

impl LinkFacts {
    /// The facts of a GatewayNode; none if it says nothing of either. Read word by word: what a box writes about itself may be anything, and
    /// must not keep the others' from being read.
    pub fn parse(node: &DynamicObject) -> Option<Self> {
        let conditions = node.data["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let says = |type_: ConditionType| conditions.iter().find(|c| c["type"] == type_.as_str()).map(|c| c["status"] == "True");
        let facts = Self { tunnel: says(ConditionType::TunnelConnected), proxy: says(ConditionType::ProxyConnected) };
        (facts != Self::default()).then_some(facts)
    }

    /// Of one half.
    pub fn of(self, type_: EndpointType) -> Option<bool> {
        match type_ {
            EndpointType::Tunnel => self.tunnel,
            EndpointType::Proxy => self.proxy,
        }
    }

    fn of_mut(&mut self, type_: EndpointType) -> &mut Option<bool> {
        match type_ {
            EndpointType::Tunnel => &mut self.tunnel,
            EndpointType::Proxy => &mut self.proxy,
        }
    }
}

/// How long a node counts as cut off after it has fallen silent: one that gave way is not elected any more and says nothing, and the one
/// that took its place may be no better off.
const DOUBT: Duration = Duration::from_secs(1800);

/// What nodes say, by name.
pub type Says = BTreeMap<NodeName, Arc<LinkFacts>>;

/// Nodes that said last that they are cut off, and since when they have said nothing at all; `None`: they say so still.
#[derive(Debug, Default)]
pub struct Doubts(BTreeMap<(NodeName, EndpointType), Option<Instant>>);

impl Doubts {
    /// Takes note of what is said now: of who is cut off, who fell silent, and who speaks again.
    pub fn note(&mut self, says: &Says, now: Instant) {
        let of = |node: &NodeName, type_: EndpointType| says.get(node).and_then(|facts| facts.of(type_));
        self.0.retain(|(node, type_), silent| match of(node, *type_) {
            Some(connected) => !connected,
            None => now.duration_since(*silent.get_or_insert(now)) < DOUBT,
        });
        for (node, facts) in says {
            for type_ in [EndpointType::Tunnel, EndpointType::Proxy].into_iter().filter(|type_| facts.of(*type_) == Some(false)) {
                self.0.insert((node.clone(), type_), None);
            }
        }
    }

    /// What is said, and what is still held against who says nothing.
    pub fn merge(&self, mut says: Says, now: Instant) -> Says {
        for ((node, type_), silent) in &self.0 {
            if silent.is_some_and(|since| now.duration_since(since) < DOUBT) {
                Arc::make_mut(says.entry(node.clone()).or_default()).of_mut(*type_).get_or_insert(false);
            }
        }
        says
    }
}

/// What gateway nodes say, and which sites bear witness.
#[derive(Debug)]
pub struct Links<'a> {
    says: &'a Says,
    connected: BTreeMap<EndpointType, BTreeSet<&'a GatewayName>>,
}

impl<'a> Links<'a> {
    /// Of the whole cluster.
    pub fn of(inputs: &'a Inputs) -> Self {
        let mut connected: BTreeMap<EndpointType, BTreeSet<&GatewayName>> = BTreeMap::new();
        for gateway in inputs.gateways.values().filter(|g| g.resource.spec.expose_type.is_edge()) {
            let elected = gateway.resource.status.iter().flat_map(|status| &status.active_endpoints);
            for endpoint in elected {
                let says = inputs.links.get(&NodeName::from(endpoint.node_name.as_str())).and_then(|facts| facts.of(endpoint.type_));
                // A site without power says for ever what it said last.
                let ready = || inputs.nodes.get(&NodeName::from(endpoint.node_name.as_str())).is_some_and(|node| node.ready);
                if says == Some(true) && ready() {
                    connected.entry(endpoint.type_).or_default().insert(&gateway.name);
                }
            }
        }
        Self { says: &inputs.links, connected }
    }

    /// True if a node of `gateway` is cut off. Exposed Gateways are the others' other end: nobody can tell whose fault it is.
    pub fn is_cut_off(&self, gateway: &super::GatewayFacts, node: &NodeName, type_: EndpointType) -> bool {
        let says_so = || self.says.get(node).and_then(|facts| facts.of(type_)) == Some(false);
        let witness = || self.connected.get(&type_).is_some_and(|sites| sites.iter().any(|site| **site != gateway.name));
        gateway.resource.spec.expose_type.is_edge() && says_so() && witness()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gave_way_is_held_in_doubt_until_it_speaks_or_time_passes() {
        let says = |tunnel: Option<bool>| Says::from([(NodeName::from("e1"), Arc::new(LinkFacts { tunnel, proxy: None }))]);
        let (now, mut doubts) = (Instant::now(), Doubts::default());
        let held = |doubts: &Doubts, at: Instant| doubts.merge(Says::new(), at).get(&NodeName::from("e1")).and_then(|f| f.tunnel);
        doubts.note(&says(Some(true)), now);
        doubts.note(&Says::new(), now);
        assert_eq!(held(&doubts, now), None, "it was connected");
        doubts.note(&says(Some(false)), now);
        doubts.note(&Says::new(), now);
        assert_eq!(held(&doubts, now), Some(false), "its GatewayNode is gone");
        doubts.note(&says(None), now);
        assert_eq!(held(&doubts, now + DOUBT / 2), Some(false), "it is elected again, and has not said anything yet");
        assert_eq!(held(&doubts, now + DOUBT), None);
        doubts.note(&says(Some(true)), now);
        assert_eq!(held(&doubts, now), None, "it is connected");
    }

    #[test]
    fn what_a_box_says_of_itself_is_read_whatever_else_it_says() {
        let node = |status: serde_json::Value| -> DynamicObject {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "e1"}, "status": status})).expect("an object")
        };
        let condition = serde_json::json!({"type": "TunnelConnected", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00ZTx"});
        let facts = LinkFacts::parse(&node(serde_json::json!({"conditions": [7, condition], "peers": "none"})));
        assert_eq!(facts, Some(LinkFacts { tunnel: Some(false), proxy: None }));
        assert_eq!(LinkFacts::parse(&node(serde_json::json!({"conditions": {}}))), None);
    }
}
