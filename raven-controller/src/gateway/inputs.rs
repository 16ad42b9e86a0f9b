//! The facts that decisions rest on: Kubernetes objects, parsed once into checked types.
//!
//! Receives Gateways, Nodes, NodePools as the API server holds them; gives only what a decision needs, so that a Node's heartbeat,
//! which changes nothing here, causes no work.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::Selector;
use raven_api::LABEL_GATEWAY;
use raven_api::gateway::{EndpointType, Gateway};
use raven_api::pool::{NodePoolSpec, NodePoolStatus};
use raven_api::proxy::{LABEL_ENDPOINTS_NAME, LABEL_GATEWAY_TYPE};

use super::links::Says;

/// Label on a Gateway that a pool rule made: ours to delete. A person who removes it takes the Gateway over.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// As it stands in `metadata.name`.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

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
    /// Name of a Gateway, and so of its pool.
    GatewayName
);

/// Text that should be a prefix and is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPrefix {
    /// As it was written.
    pub text: String,
    /// What the parser says.
    pub why: String,
}

/// A prefix in canonical form (host bits zero). An address without a length is refused: whoever wrote it may have meant something else.
pub fn parse_prefix(text: &str) -> Result<IpNet, BadPrefix> {
    text.trim().parse::<IpNet>().map(|prefix| prefix.trunc()).map_err(|e| BadPrefix { text: text.trim().to_owned(), why: e.to_string() })
}

/// A Node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFacts {
    /// Its name.
    pub name: NodeName,
    /// Its UID: another Node of the same name is another node.
    pub uid: Option<String>,
    /// All its labels (selectors may ask for any).
    pub labels: BTreeMap<String, String>,
    /// First InternalIP, IPv4 before IPv6.
    pub address: Option<IpAddr>,
    /// Its other InternalIPs (of the other family, mostly).
    pub other_addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, in their order.
    pub pod_cidrs: Vec<Result<IpNet, BadPrefix>>,
    /// Condition Ready is True.
    pub ready: bool,
}

impl NodeFacts {
    /// The facts of a Node; none if it has no name (the API server never sends such).
    pub fn parse(node: &Node) -> Option<Self> {
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

    /// On the edge side (label `openyurt.io/is-edge-worker=true`); a node without the label is a cloud node.
    pub fn is_edge(&self) -> bool {
        self.label(raven_api::LABEL_EDGE_WORKER) == Some("true")
    }

    /// All its InternalIPs.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.address.into_iter().chain(self.other_addresses.iter().copied())
    }

    /// A label's value; one that is empty counts as absent.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

// IPv4 before IPv6, else as the kubelet has them.
fn internal_addresses(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
    let mut internal: Vec<IpAddr> = addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    internal.sort_by_key(IpAddr::is_ipv6);
    internal
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// A Gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayFacts {
    /// Its name.
    pub name: GatewayName,
    /// A pool rule made it.
    pub generated: bool,
    /// When it was created: the older one of two keeps what both claim.
    pub created: Option<Timestamp>,
    /// `spec.nodeSelector`; none also for an empty one.
    pub selector: Result<Option<Selector>, String>,
    /// The resource.
    pub resource: Arc<Gateway>,
}

impl GatewayFacts {
    /// The facts of a Gateway; none if it has no name, or is about to go (its nodes and prefixes are free from then on).
    pub fn parse(gateway: Gateway) -> Option<Self> {
        let meta: &ObjectMeta = &gateway.metadata;
        if meta.deletion_timestamp.is_some() {
            return None;
        }
        let managed_by = meta.labels.as_ref().and_then(|labels| labels.get(LABEL_MANAGED_BY));
        Some(Self {
            name: meta.name.as_deref()?.into(),
            generated: managed_by.is_some_and(|who| who == raven_api::MANAGER_CONTROLLER),
            created: meta.creation_timestamp.as_ref().map(|t| t.0),
            selector: parse_selector(&gateway),
            resource: Arc::new(gateway),
        })
    }

    /// Who keeps a node or prefix that two claim: a Gateway that a person wrote before one that a rule made, then the older one, then by name.
    fn seniority(&self) -> (bool, Timestamp, &GatewayName) {
        (self.generated, self.created.unwrap_or(Timestamp::MAX), &self.name)
    }
}

// In Kubernetes an empty selector matches everything. Here it matches nothing: `nodeSelector: {}` in a Gateway is what is left over when
// somebody removes the last label from it, and taking every node of the cluster into one pool for that would cut all the others' tunnels.
fn parse_selector(gateway: &Gateway) -> Result<Option<Selector>, String> {
    let Some(selector) = gateway.spec.node_selector.clone() else {
        return Ok(None);
    };
    let selector = Selector::try_from(selector).map_err(|e| e.to_string())?;
    Ok(Some(selector).filter(|s| !s.selects_all()))
}

/// One of our Services of type LoadBalancer that has got an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalancerFacts {
    /// The Gateway that it is for.
    pub gateway: GatewayName,
    /// The gateway node behind it.
    pub node: NodeName,
    /// `proxy` or `tunnel`.
    pub type_: EndpointType,
    /// Address or name by which it is reached.
    pub host: String,
}

impl BalancerFacts {
    /// The facts; none while it has no address, or is none of ours.
    pub fn parse(service: &Service) -> Option<Self> {
        let labels = service.metadata.labels.as_ref()?;
        let type_ = match labels.get(LABEL_GATEWAY_TYPE)?.as_str() {
            "proxy" => EndpointType::Proxy,
            "tunnel" => EndpointType::Tunnel,
            _ => return None,
        };
        let ingress = service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref()?;
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        // An address before a name: nobody has to resolve it.
        let host = ingress.iter().find_map(|i| given(&i.ip)).or_else(|| ingress.iter().find_map(|i| given(&i.hostname)))?;
        let (gateway, node) = (labels.get(LABEL_GATEWAY)?.as_str().into(), labels.get(LABEL_ENDPOINTS_NAME)?.as_str().into());
        Some(Self { gateway, node, type_, host })
    }
}

/// A NodePool of OpenYurt.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolFacts {
    /// Its name.
    pub name: String,
    /// On the edge side (anything but `Cloud`).
    pub edge: bool,
    /// The nodes that OpenYurt counts in; a node's own label comes first.
    pub nodes: BTreeSet<NodeName>,
}

impl PoolFacts {
    /// The facts of a NodePool in whatever version it was read.
    pub fn new(name: &str, spec: &NodePoolSpec, status: Option<&NodePoolStatus>) -> Self {
        let nodes = status.map(|s| s.nodes.iter().map(|n| n.as_str().into()).collect()).unwrap_or_default();
        Self { name: name.to_owned(), edge: !spec.type_.eq_ignore_ascii_case("cloud"), nodes }
    }
}

/// A block of addresses that Calico's IPAM gave to a node (BlockAffinity of `crd.projectcalico.org`).
#[derive(Clone, Debug, PartialEq)]
pub struct BlockFacts {
    /// The node.
    pub node: NodeName,
    /// The block.
    pub prefix: Result<IpNet, BadPrefix>,
}

impl BlockFacts {
    /// The facts of a BlockAffinity's spec; none unless it is confirmed and stays: before and after that the block may be anybody's.
    pub fn parse(spec: &serde_json::Value) -> Option<Self> {
        let text = |key: &str| spec.get(key).and_then(|value| value.as_str()).filter(|text| !text.is_empty());
        // A string in Calico's CRD, for what its first releases wrote; a boolean is taken as well.
        let deleted = spec.get("deleted").is_some_and(|value| value.as_bool() == Some(true) || value.as_str() == Some("true"));
        if deleted || text("state") != Some("confirmed") {
            return None;
        }
        Some(Self { node: text("node")?.into(), prefix: parse_prefix(text("cidr")?) })
    }
}

/// What the ConfigMap `raven-cfg` switches for the whole cluster. Absent means on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switches {
    /// `enable-l3-tunnel`.
    pub l3: bool,
    /// `enable-l7-proxy`.
    pub l7: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self { l3: true, l7: true }
    }
}

impl Switches {
    /// From the ConfigMap's data. Only the word `false` switches off: a typing error must not cut a cluster's network.
    pub fn parse(data: &BTreeMap<String, String>) -> Self {
        let on = |key: &str| data.get(key).is_none_or(|value| !value.trim().eq_ignore_ascii_case("false"));
        Self { l3: on(crate::gateway::elect::CONFIG_L3), l7: on(crate::gateway::elect::CONFIG_L7) }
    }
}

/// All facts of the cluster. Kept by name, so the order in which they came is forgotten.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// All Gateways.
    pub gateways: BTreeMap<GatewayName, Arc<GatewayFacts>>,
    /// All Nodes.
    pub nodes: BTreeMap<NodeName, Arc<NodeFacts>>,
    /// All NodePools; empty also where the CRD is not installed.
    pub pools: BTreeMap<String, Arc<PoolFacts>>,
    /// Calico's blocks, by the name of the BlockAffinity; empty also where the CRD is not installed.
    pub blocks: BTreeMap<String, Arc<BlockFacts>>,
    /// Load balancers that have an address.
    pub balancers: Vec<BalancerFacts>,
    /// What gateway nodes say of their connections.
    pub links: Says,
    /// Ranges of Service addresses.
    pub services: BTreeSet<IpNet>,
    /// Addresses of the API server.
    pub api_servers: BTreeSet<IpAddr>,
    /// Cluster-wide switches.
    pub switches: Switches,
    /// The three pool rules make Gateways. Off: a Gateway that they once made counts as written by a person.
    pub rules: bool,
}

impl Inputs {
    /// Gateways, those first that keep what two claim.
    pub fn by_seniority(&self) -> Vec<&GatewayFacts> {
        let mut all: Vec<&GatewayFacts> = self.gateways.values().map(Arc::as_ref).collect();
        all.sort_by(|a, b| a.seniority().cmp(&b.seniority()));
        all
    }

    /// True if a rule made this Gateway and rules are on.
    pub fn is_ruled(&self, gateway: &GatewayFacts) -> bool {
        self.rules && gateway.generated
    }
}
