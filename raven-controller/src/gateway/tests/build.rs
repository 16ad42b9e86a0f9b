//! Builders for clusters under test.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta, Time};
use raven_api::gateway::{Endpoint, EndpointType, ExposeType, Gateway, GatewaySpec};
use raven_api::names::{LABEL_EDGE_WORKER, LABEL_GATEWAY, LABEL_MANAGED_BY};
use raven_api::pool::NodePoolSpec;

use crate::gateway::facts::{BlockFacts, GatewayFacts, LinkFacts, NodeFacts, PoolFacts, parse_prefix};
use crate::gateway::inputs::Inputs;
use crate::gateway::{Decisions, decide};

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a small number")
}

/// A Gateway created at second `age`.
pub(super) fn gateway(name: &str, age: i64) -> Gateway {
    let metadata = ObjectMeta {
        name: Some(name.to_owned()),
        creation_timestamp: Some(Time(at(age))),
        generation: Some(1),
        ..Default::default()
    };
    Gateway { metadata, spec: GatewaySpec::default(), status: None }
}

pub(super) fn exposed(mut gateway: Gateway) -> Gateway {
    gateway.spec.expose_type = ExposeType::PublicIP;
    gateway
}

pub(super) fn by_rule(mut gateway: Gateway) -> Gateway {
    gateway.metadata.labels = Some([(LABEL_MANAGED_BY.to_owned(), "raven-controller".to_owned())].into());
    gateway
}

pub(super) fn selecting(mut gateway: Gateway, key: &str, value: &str) -> Gateway {
    let labels = [(key.to_owned(), value.to_owned())].into();
    gateway.spec.node_selector = Some(LabelSelector { match_labels: Some(labels), match_expressions: None });
    gateway
}

pub(super) fn listing(mut gateway: Gateway, type_: EndpointType, nodes: &[&str]) -> Gateway {
    let endpoints = nodes.iter().map(|n| Endpoint { node_name: (*n).to_owned(), type_, ..Default::default() });
    gateway.spec.endpoints.extend(endpoints);
    gateway
}

pub(super) fn annotated(mut gateway: Gateway, cidrs: &str) -> Gateway {
    gateway.metadata.annotations = Some([(raven_api::ANNOTATION_EXTRA_CIDRS.to_owned(), cidrs.to_owned())].into());
    gateway
}

/// Address for a node name, in the benchmark range (RFC 2544).
fn address_of(name: &str) -> IpAddr {
    let sum = name.bytes().fold(0u16, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let [high, low] = sum.to_be_bytes();
    IpAddr::from([198, 18, high, low])
}

/// A ready node with one pod prefix.
pub(super) fn node(name: &str, cidr: &str) -> NodeFacts {
    NodeFacts {
        name: name.into(),
        uid: Some(format!("uid-of-{name}")),
        labels: Default::default(),
        address: Some(address_of(name)),
        other_addresses: Vec::new(),
        pod_cidrs: vec![parse_prefix(cidr)],
        ready: true,
    }
}

/// Changes the node's address.
pub(super) fn at_address(mut node: NodeFacts, address: &str) -> NodeFacts {
    node.address = Some(address.parse().expect("an address written in a test"));
    node
}

pub(super) fn labelled(mut node: NodeFacts, key: &str, value: &str) -> NodeFacts {
    node.labels.insert(key.to_owned(), value.to_owned());
    node
}

pub(super) fn member(gateway: &str, name: &str, cidr: &str) -> NodeFacts {
    labelled(node(name, cidr), LABEL_GATEWAY, gateway)
}

pub(super) fn edge(node: NodeFacts) -> NodeFacts {
    labelled(node, LABEL_EDGE_WORKER, "true")
}

pub(super) fn down(mut node: NodeFacts) -> NodeFacts {
    node.ready = false;
    node
}

/// A cluster under test.
#[derive(Clone, Default)]
pub(super) struct Cluster(pub(super) Inputs);

impl Cluster {
    /// Creates a cluster with the pool rules off.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Creates a cluster with the pool rules on.
    pub(super) fn with_rules() -> Self {
        Self(Inputs { rules: true, ..Default::default() })
    }

    pub(super) fn gateway(mut self, gateway: Gateway) -> Self {
        let facts = GatewayFacts::parse(gateway).expect("tests name their gateways");
        self.0.gateways.insert(facts.name.clone(), Arc::new(facts));
        self
    }

    /// Adds or replaces a node.
    pub(super) fn node(mut self, node: NodeFacts) -> Self {
        self.0.nodes.insert(node.name.clone(), Arc::new(node));
        self
    }

    /// Adds a confirmed block of Calico.
    pub(super) fn block(mut self, node: &str, prefix: &str) -> Self {
        let spec = serde_json::json!({"node": node, "cidr": prefix, "state": "confirmed", "deleted": "false"});
        let block = BlockFacts::parse(&spec).expect("a confirmed block");
        self.0.blocks.insert(format!("{node}-{prefix}"), Arc::new(block));
        self
    }

    /// Sets a gateway node's report about its connections.
    pub(super) fn link(mut self, node: &str, tunnel: Option<bool>, proxy: Option<bool>) -> Self {
        self.0.links.insert(node.into(), Arc::new(LinkFacts { ready: Some(true), tunnel, proxy }));
        self
    }

    /// Adds a node to those without a working agent.
    pub(super) fn without_agent(mut self, node: &str) -> Self {
        self.0.without_agent.insert(node.into());
        self
    }

    pub(super) fn without_node(mut self, name: &str) -> Self {
        self.0.nodes.remove(&name.into());
        self
    }

    pub(super) fn pool(self, name: &str, edge: bool) -> Self {
        let type_ = if edge { "Edge" } else { "Cloud" };
        self.pool_with(name, NodePoolSpec { type_: type_.to_owned(), ..NodePoolSpec::default() })
    }

    pub(super) fn pool_with(mut self, name: &str, spec: NodePoolSpec) -> Self {
        self.0.pools.insert(name.to_owned(), Arc::new(PoolFacts::new(name, &spec, None)));
        self
    }

    pub(super) fn decide(&self) -> Decisions {
        decide(&self.0)
    }

    /// Applies the decisions to the cluster, as the controller does.
    pub(super) fn apply(mut self, now: i64) -> Self {
        let decisions = self.decide();
        for name in &decisions.delete {
            self.0.gateways.remove(name);
        }
        for (name, decision) in &decisions.gateways {
            let Some(facts) = self.0.gateways.get(name) else {
                continue;
            };
            let mut resource = facts.resource.as_ref().clone();
            resource.status = Some(decision.status(&resource, at(now)));
            self = self.gateway(resource);
        }
        for mut created in decisions.create {
            created.metadata.creation_timestamp = Some(Time(at(now)));
            self = self.gateway(created);
        }
        self
    }

    pub(super) fn resource(&self, gateway: &str) -> &Gateway {
        &self.0.gateways[&gateway.into()].resource
    }

    pub(super) fn active(&self, gateway: &str) -> &[Endpoint] {
        &self.resource(gateway).status.as_ref().expect("applied").active_endpoints
    }

    pub(super) fn elected(&self, gateway: &str, type_: EndpointType) -> Vec<String> {
        self.active(gateway).iter().filter(|e| e.type_ == type_).map(|e| e.node_name.clone()).collect()
    }

    pub(super) fn tunnel(&self, gateway: &str) -> Vec<String> {
        self.elected(gateway, EndpointType::Tunnel)
    }

    pub(super) fn nodes(&self, gateway: &str) -> Vec<String> {
        self.resource(gateway).status.as_ref().expect("applied").nodes.iter().map(|n| n.node_name.clone()).collect()
    }

    pub(super) fn addresses(&self, gateway: &str) -> Vec<String> {
        self.resource(gateway).status.as_ref().expect("applied").nodes.iter().map(|n| n.private_ip.clone()).collect()
    }

    pub(super) fn subnets(&self, gateway: &str, node: &str) -> Vec<String> {
        let nodes = &self.resource(gateway).status.as_ref().expect("applied").nodes;
        nodes.iter().find(|n| n.node_name == node).map(|n| n.subnets.clone()).unwrap_or_default()
    }

    pub(super) fn condition(&self, gateway: &str, type_: &str) -> Condition {
        let conditions = &self.resource(gateway).status.as_ref().expect("applied").conditions;
        conditions.iter().find(|c| c.type_ == type_).cloned().expect("every status has three conditions")
    }

    /// Asserts the status and reason of a condition, and that its message contains `part`.
    #[track_caller]
    pub(super) fn assert_condition(&self, gateway: &str, type_: &str, status: &str, reason: &str, part: &str) {
        let condition = self.condition(gateway, type_);
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), (status, reason), "{}", condition.message);
        assert!(condition.message.contains(part), "{:?} does not contain {part:?}", condition.message);
    }
}
