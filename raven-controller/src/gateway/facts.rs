//! Facts: Kubernetes objects, parsed once into validated types that contain only the fields needed by the controller.
//!
//! A Node's heartbeat changes none of these fields, so it causes no work.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};
use kube::ResourceExt;
use kube::core::{DynamicObject, Selector};
use raven_api::condition::ConditionType;
use raven_api::gateway::{EndpointType, Gateway};
use raven_api::gateway_node::GatewayNode;
use raven_api::guarded::Unreadable;
use raven_api::names::{LABEL_EDGE_WORKER, LABEL_MANAGED_BY, MANAGER_CONTROLLER, SWITCH_L3, SWITCH_L7};
use raven_api::pool::{NodePoolSpec, NodePoolStatus};
use raven_api::proxy::{LABEL_ENDPOINTS_NAME, LABEL_GATEWAY_TYPE};
use raven_api::{LABEL_GATEWAY, key_proof};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(String);

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(name.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// Name of a Node.
    NodeName
);
name_type!(
    /// Name of a Gateway and of its pool.
    GatewayName
);

impl NodeName {
    /// Value of `metadata.name`.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl GatewayName {
    /// Value of `metadata.name`.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A Gateway that cannot be parsed. The API server stored it before Raven's CRD was installed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UnreadableGateway {
    /// The field and what is wrong with it.
    pub(crate) error: String,
    /// UID of the object.
    pub(crate) uid: Option<String>,
}

impl From<Unreadable> for UnreadableGateway {
    fn from(Unreadable { error, metadata }: Unreadable) -> Self {
        Self { error, uid: metadata.uid }
    }
}

/// Text that is not a valid prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadPrefix {
    /// Text as written by the user or the CNI.
    pub(crate) text: String,
    /// Message of the parser.
    pub(crate) error: String,
}

/// Parses a prefix and clears its host bits. An address without a length is an error, because its intended
/// length is unknown.
pub(crate) fn parse_prefix(text: &str) -> Result<IpNet, BadPrefix> {
    text.trim()
        .parse::<IpNet>()
        .map(|prefix| prefix.trunc())
        .map_err(|e| BadPrefix { text: text.trim().to_owned(), error: e.to_string() })
}

/// Address family of the packets between the nodes of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// The family of a pool with these nodes. It keeps its `current` one while a node has an address of it: a change stops
    /// the pool until all of its agents have followed. At first it is IPv4, unless most nodes have only IPv6.
    pub(crate) fn of(pool: &[&NodeFacts], current: Option<Self>) -> Self {
        if let Some(current) = current.filter(|family| pool.iter().any(|node| node.address_of(*family).is_some())) {
            return current;
        }
        // The first address is an IPv4 address if the node has one.
        let first = |ipv4| pool.iter().filter(|node| node.address.is_some_and(|a| a.is_ipv4() == ipv4)).count();
        if first(false) > first(true) { Self::Ipv6 } else { Self::Ipv4 }
    }

    /// The family of the addresses in a Gateway's status.
    pub(crate) fn current(gateway: &Gateway) -> Option<Self> {
        let mut nodes = gateway.status.iter().flat_map(|status| &status.nodes);
        let address: IpAddr = nodes.find_map(|node| node.private_ip.parse().ok())?;
        Some(if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 })
    }

    /// Returns its name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

/// Facts of a Node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NodeFacts {
    /// Name of the Node.
    pub(crate) name: NodeName,
    /// UID: distinguishes a Node from a later one of the same name.
    pub(crate) uid: Option<String>,
    /// All labels: a selector may use any of them.
    pub(crate) labels: BTreeMap<String, String>,
    /// First InternalIP, IPv4 before IPv6.
    pub(crate) address: Option<IpAddr>,
    /// Further InternalIPs, usually of the other address family.
    pub(crate) other_addresses: Vec<IpAddr>,
    /// `spec.podCIDRs` in their order.
    pub(crate) pod_cidrs: Vec<Result<IpNet, BadPrefix>>,
    /// True if condition Ready is True.
    pub(crate) ready: bool,
}

impl NodeFacts {
    /// Extracts the facts of a Node. Returns `None` for a Node without a name, which the API server never sends.
    pub(crate) fn parse(node: &Node) -> Option<Self> {
        let spec = node.spec.as_ref();
        let cidrs = spec.and_then(|s| s.pod_cidrs.clone()).filter(|list| !list.is_empty());
        let cidrs = cidrs.or_else(|| spec.and_then(|s| s.pod_cidr.clone()).map(|one| vec![one])).unwrap_or_default();
        let mut addresses = internal_addresses(node).into_iter();
        Some(Self {
            name: node.metadata.name.as_deref()?.into(),
            uid: node.metadata.uid.clone(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            address: addresses.next(),
            other_addresses: addresses.collect(),
            pod_cidrs: cidrs.iter().filter(|text| !text.is_empty()).map(|text| parse_prefix(text)).collect(),
            ready: is_ready(node),
        })
    }

    /// True for a node with label `openyurt.io/is-edge-worker=true`; every other node is a cloud node.
    pub(crate) fn is_edge(&self) -> bool {
        self.label(LABEL_EDGE_WORKER) == Some("true")
    }

    /// Returns all InternalIPs.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.address.into_iter().chain(self.other_addresses.iter().copied())
    }

    /// Returns the first InternalIP of a family.
    pub(crate) fn address_of(&self, family: Family) -> Option<IpAddr> {
        self.addresses().find(|address| address.is_ipv4() == (family == Family::Ipv4))
    }

    /// Returns the value of a label; an empty value counts as absent.
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

// IPv4 before IPv6, otherwise in the kubelet's order.
fn internal_addresses(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
    let mut internal: Vec<IpAddr> =
        addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    internal.sort_by_key(IpAddr::is_ipv6);
    internal
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Facts of a Pod of raven-agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AgentFacts {
    /// Node of the Pod.
    pub(crate) node: NodeName,
    /// True if condition Ready is True.
    pub(crate) ready: bool,
}

impl AgentFacts {
    /// Extracts the facts of a Pod. Returns `None` for a Pod that is not scheduled.
    pub(crate) fn parse(pod: &Pod) -> Option<Self> {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let ready = conditions.is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
        Some(Self { node: pod.spec.as_ref()?.node_name.as_deref()?.into(), ready })
    }
}

/// Facts of a Gateway.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GatewayFacts {
    /// Name of the Gateway.
    pub(crate) name: GatewayName,
    /// True if a pool rule created the Gateway, and its nodeSelector is still the rule's.
    pub(crate) generated: bool,
    /// Time of creation: the older of two Gateways keeps what both claim.
    pub(crate) created: Option<Timestamp>,
    /// `spec.nodeSelector`; `None` for an empty selector too.
    pub(crate) selector: Result<Option<Selector>, String>,
    /// The complete resource, without `metadata.managedFields`.
    pub(crate) resource: Arc<Gateway>,
}

impl GatewayFacts {
    /// Extracts the facts of a Gateway. Returns `None` for a Gateway that is being deleted: its nodes and prefixes are
    /// free from then on.
    pub(crate) fn parse(mut gateway: Gateway) -> Option<Self> {
        let managers = gateway.metadata.managed_fields.take().unwrap_or_default();
        let meta: &ObjectMeta = &gateway.metadata;
        if meta.deletion_timestamp.is_some() {
            return None;
        }
        let managed_by = meta.labels.as_ref().and_then(|labels| labels.get(LABEL_MANAGED_BY));
        let by_rule = managed_by.is_some_and(|manager| manager == MANAGER_CONTROLLER);
        Some(Self {
            name: meta.name.as_deref()?.into(),
            generated: by_rule && !managers.iter().any(owns_selector),
            created: meta.creation_timestamp.as_ref().map(|t| t.0),
            selector: parse_selector(&gateway),
            resource: Arc::new(gateway),
        })
    }

    /// Sort key: of two Gateways with the same claim, the smaller one keeps it. A Gateway written by a user precedes
    /// one created by a rule, then the older one, then the order of names.
    pub(crate) fn seniority(&self) -> (bool, Timestamp, &GatewayName) {
        (self.generated, self.created.unwrap_or(Timestamp::MAX), &self.name)
    }
}

// A person who applies a Gateway with a nodeSelector over the rule's takes it over: `kubectl apply` keeps the label, but
// the API server records who set each field.
fn owns_selector(entry: &ManagedFieldsEntry) -> bool {
    let selector = entry.fields_v1.as_ref().and_then(|fields| fields.0.pointer("/f:spec/f:nodeSelector"));
    // The API server gives the second name to the writers of an object before its first server-side apply.
    let ours = [Some(MANAGER_CONTROLLER), Some("before-first-apply")];
    !ours.contains(&entry.manager.as_deref()) && selector.is_some()
}

// In Kubernetes an empty selector matches everything; here it matches nothing. `nodeSelector: {}` remains when a user
// removes the last label of a selector, and moving every node of the cluster into one pool would cut the tunnels of
// all other pools.
fn parse_selector(gateway: &Gateway) -> Result<Option<Selector>, String> {
    let Some(selector) = gateway.spec.node_selector.clone() else {
        return Ok(None);
    };
    let selector = Selector::try_from(selector).map_err(|e| e.to_string())?;
    Ok(Some(selector).filter(|s| !s.selects_all()))
}

/// Facts of a Service of type LoadBalancer that the controller created and that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BalancerFacts {
    /// Gateway of the elected node.
    pub(crate) gateway: GatewayName,
    /// Gateway node behind the Service.
    pub(crate) node: NodeName,
    /// Type of the endpoint behind the Service.
    pub(crate) type_: EndpointType,
    /// Address or host name of the load balancer.
    pub(crate) host: String,
}

impl BalancerFacts {
    /// Extracts the facts of a Service. Returns `None` without an address or without Raven's labels.
    pub(crate) fn parse(service: &Service) -> Option<Self> {
        let labels = service.metadata.labels.as_ref()?;
        let type_ = match labels.get(LABEL_GATEWAY_TYPE)?.as_str() {
            "proxy" => EndpointType::Proxy,
            "tunnel" => EndpointType::Tunnel,
            _ => return None,
        };
        let ingress = service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref()?;
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        // Addresses first: they need no DNS lookup.
        let host =
            ingress.iter().find_map(|i| given(&i.ip)).or_else(|| ingress.iter().find_map(|i| given(&i.hostname)))?;
        let (gateway, node) =
            (labels.get(LABEL_GATEWAY)?.as_str().into(), labels.get(LABEL_ENDPOINTS_NAME)?.as_str().into());
        Some(Self { gateway, node, type_, host })
    }
}

/// Facts of OpenYurt's NodePool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolFacts {
    /// Name of the NodePool.
    pub(crate) name: String,
    /// True for a pool on the edge side: any type but `Cloud`.
    pub(crate) edge: bool,
    /// The pool's nodes do not reach each other: each is a site of its own.
    pub(crate) separate: bool,
    /// Nodes according to the NodePool's status; a node's own label takes precedence.
    pub(crate) nodes: BTreeSet<NodeName>,
}

impl PoolFacts {
    /// Extracts the facts of a NodePool of any version.
    pub(crate) fn new(name: &str, spec: &NodePoolSpec, status: Option<&NodePoolStatus>) -> Self {
        let nodes = status.map(|s| s.nodes.iter().map(|n| n.as_str().into()).collect()).unwrap_or_default();
        let edge = !spec.type_.eq_ignore_ascii_case("cloud");
        let separate = edge && spec.inter_connectivity == Some(false);
        Self { name: name.to_owned(), edge, separate, nodes }
    }
}

/// Facts of a BlockAffinity (`crd.projectcalico.org`): a block of addresses that Calico's IPAM assigned to a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockFacts {
    /// Node that the block is assigned to.
    pub(crate) node: NodeName,
    /// Prefix of the block.
    pub(crate) prefix: Result<IpNet, BadPrefix>,
}

impl BlockFacts {
    /// Extracts the facts of a BlockAffinity's spec. Returns `None` unless the affinity is confirmed and not deleted:
    /// otherwise the block may belong to a different node.
    pub(crate) fn parse(spec: &serde_json::Value) -> Option<Self> {
        let text = |key: &str| spec.get(key).and_then(|value| value.as_str()).filter(|text| !text.is_empty());
        // A string in Calico's CRD for compatibility with its first releases; a boolean is accepted as well.
        let deleted =
            spec.get("deleted").is_some_and(|value| value.as_bool() == Some(true) || value.as_str() == Some("true"));
        if deleted || text("state") != Some("confirmed") {
            return None;
        }
        Some(Self { node: text("node")?.into(), prefix: parse_prefix(text("cidr")?) })
    }
}

/// Cluster-wide switches of ConfigMap `raven-cfg`. An absent key means on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Switches {
    /// Key `enable-l3-tunnel`: the L3 half is on.
    pub(crate) l3: bool,
    /// Key `enable-l7-proxy`: the L7 half is on.
    pub(crate) l7: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self { l3: true, l7: true }
    }
}

impl Switches {
    /// Parses the ConfigMap's data. Only the word `false` turns a half off: a misspelled value must not cut
    /// the cluster's network.
    pub(crate) fn parse(data: &BTreeMap<String, String>) -> Self {
        let on = |key: &str| data.get(key).is_none_or(|value| !value.trim().eq_ignore_ascii_case("false"));
        Self { l3: on(SWITCH_L3), l7: on(SWITCH_L7) }
    }
}

/// Conditions of a gateway node's GatewayNode. `None`: not reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkFacts {
    /// Condition Ready.
    pub(crate) ready: Option<bool>,
    /// Condition TunnelConnected (L3).
    pub(crate) tunnel: Option<bool>,
    /// Condition ProxyConnected (L7).
    pub(crate) proxy: Option<bool>,
}

impl LinkFacts {
    /// Extracts the facts of a GatewayNode; `None` if none of the conditions is present.
    ///
    /// Only these conditions are parsed: a node writes its own GatewayNode, and other invalid content must
    /// not hide them.
    pub(crate) fn parse(node: &DynamicObject) -> Option<Self> {
        let conditions = node.data["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let status = |type_: ConditionType| {
            conditions.iter().find(|c| c["type"] == type_.as_str()).map(|c| c["status"] == "True")
        };
        let facts = Self {
            ready: status(ConditionType::Ready),
            tunnel: status(ConditionType::TunnelConnected),
            proxy: status(ConditionType::ProxyConnected),
        };
        (facts != Self::default()).then_some(facts)
    }

    /// Returns the state of one half.
    pub(crate) fn of(self, type_: EndpointType) -> Option<bool> {
        match type_ {
            EndpointType::Tunnel => self.tunnel,
            EndpointType::Proxy => self.proxy,
        }
    }

    /// Returns the state of one half for modification.
    pub(crate) fn of_mut(&mut self, type_: EndpointType) -> &mut Option<bool> {
        match type_ {
            EndpointType::Tunnel => &mut self.tunnel,
            EndpointType::Proxy => &mut self.proxy,
        }
    }
}

/// A WireGuard public key that a node has published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublishedKey {
    /// The key, base64.
    pub(crate) key: String,
    /// The node has proven that it has the private key. Agents of older releases publish no proof.
    pub(crate) proven: bool,
}

impl PublishedKey {
    /// `None` if the node publishes no key.
    pub(crate) fn of(node: &GatewayNode) -> Option<Self> {
        let key = node.spec.public_key.clone()?;
        let proof = node.spec.public_key_proof.as_deref();
        let proven = proof.is_some_and(|proof| key_proof::is_proven(&key, &node.name_any(), proof));
        Some(Self { key, proven })
    }
}

/// Reports of gateway nodes about their connections, by node name.
pub(crate) type LinkReports = BTreeMap<NodeName, Arc<LinkFacts>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_conditions_are_read_despite_other_invalid_content() {
        let node = |status: serde_json::Value| -> DynamicObject {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "e1"}, "status": status}))
                .expect("an object")
        };
        let condition = serde_json::json!({"type": "TunnelConnected", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00ZTx"});
        let facts = LinkFacts::parse(&node(serde_json::json!({"conditions": [7, condition], "peers": "none"})));
        assert_eq!(facts, Some(LinkFacts { tunnel: Some(false), ..LinkFacts::default() }));
        assert_eq!(LinkFacts::parse(&node(serde_json::json!({"conditions": {}}))), None);
    }
}
