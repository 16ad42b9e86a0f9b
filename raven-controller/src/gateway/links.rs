//! Which gateway nodes are cut off: Ready for Kubernetes, and yet without a connection to any other pool, while other sites have one.
//!
//! Each says so of itself, after a minute (conditions TunnelConnected and ProxyConnected of its GatewayNode). That alone would not do: where
//! the cloud is down, every site says so, and electing others everywhere would mend nothing. So another site has to bear witness.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use raven_api::GatewayNode;
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
    /// The facts of a GatewayNode; none if it says nothing of either.
    pub fn parse(node: &GatewayNode) -> Option<Self> {
        let conditions = node.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
        let says = |type_: ConditionType| conditions.iter().find(|c| c.type_ == type_.as_str()).map(|c| c.status == "True");
        let facts = Self { tunnel: says(ConditionType::TunnelConnected), proxy: says(ConditionType::ProxyConnected) };
        (facts != Self::default()).then_some(facts)
    }

    fn of(self, type_: EndpointType) -> Option<bool> {
        match type_ {
            EndpointType::Tunnel => self.tunnel,
            EndpointType::Proxy => self.proxy,
        }
    }
}

/// What gateway nodes say, and which sites bear witness.
#[derive(Debug)]
pub struct Links<'a> {
    says: &'a BTreeMap<NodeName, Arc<LinkFacts>>,
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
                if says == Some(true) {
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
