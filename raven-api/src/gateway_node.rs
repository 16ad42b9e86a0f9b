//! The GatewayNode: state that a gateway node, or any node of a pool with encryption, publishes about itself.
//!
//! The object is named after the node, and a ValidatingAdmissionPolicy (deploy/admission.yaml) lets only that node's
//! agent write it. A stolen node can therefore publish no key but its own.

#![allow(unreachable_pub, reason = "kube's derive macros generate public items in private modules")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Published by the node's agent. The controller copies the key and the proxy's state to the Gateway's status, from which
/// agents of other nodes configure their peers.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "raven.openyurt.io",
    version = "v1beta1",
    kind = "GatewayNode",
    plural = "gatewaynodes",
    shortname = "gwn",
    category = "yurt",
    status = "GatewayNodeStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Gateway","type":"string","jsonPath":".spec.gateway"}"#,
    printcolumn = r#"{"name":"WireGuard","type":"string","jsonPath":".status.wireguardBackend","description":"kernel, or userspace where the kernel has none"}"#,
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".status.dataplaneTier","description":"how packets enter the tunnel"}"#,
    printcolumn = r#"{"name":"Peers","type":"string","jsonPath":".status.peerSummary","description":"peers with a live session / all peers"}"#,
    printcolumn = r#"{"name":"Proxy","type":"boolean","jsonPath":".status.proxy.ready","description":"the L7 proxy is ready"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message","priority":1}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".spec.version","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct GatewayNodeSpec {
    /// Gateway of this node.
    #[serde(default)]
    pub gateway: String,
    /// WireGuard public key, base64 of 32 bytes. The private key never leaves the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw480]=$"))]
    pub public_key: Option<String>,
    /// Proof that this node has the private key: its name, signed with it (XEdDSA), base64 of 64 bytes. A key that another
    /// node publishes with a proof is not accepted from a node without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9+/]{85}[AQgw]==$"))]
    pub public_key_proof: Option<String>,
    /// UDP port that the L3 tunnel listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub listen_port: Option<i32>,
    /// Addresses of the node's uplink, the outer address first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Version of the agent.
    #[serde(default)]
    pub version: String,
}

/// State observed by the node's agent, for people and for the controller. Other agents never receive it: it changes often.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayNodeStatus {
    /// WireGuard implementation: `kernel` or `userspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wireguard_backend: Option<String>,
    /// Attachment of the dataplane: `xdp+tc` (fast), `tc` (fallback) or `stack`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataplane_tier: Option<String>,
    /// MTU of the tunnel device in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_mtu: Option<i32>,
    /// Peers with a live session / all peers, for `kubectl get`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_summary: Option<String>,
    /// Peers of the tunnel, sorted by node name: at most 256, those without a session before others. `wg show` on the node
    /// lists all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerStatus>,
    /// State of the L7 proxy, if this node is elected for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyStatus>,
    /// State of the node: condition Ready, and on edges TunnelConnected and ProxyConnected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// State of a gateway node's L7 proxy.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// In the cloud: the proxy listens and has a certificate. At an edge: it has a connection to a cloud gateway node.
    /// Services route to ready proxies only.
    pub ready: bool,
    /// Reason why the proxy is not ready, or the nodes that it is connected to.
    #[serde(default)]
    pub message: String,
    /// Cloud gateway nodes that the proxy is connected to, sorted.
    // There are few cloud gateway nodes. No `x-kubernetes-list-type: set`: if a list becomes a set later, no field
    // manager owns its existing elements, and server-side apply never removes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub tunnels: Vec<String>,
    /// In the cloud: other proxies of the Gateway that stopped accepting connections, sorted. They receive no requests while
    /// this proxy works, unless they report the same of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub unreachable: Vec<String>,
}

/// A WireGuard peer as observed by the node.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Node of the peer.
    pub node_name: String,
    /// Gateway of the peer.
    pub gateway: String,
    /// Current source of the peer's packets (`address:port`); for a peer behind NAT, the translated address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_endpoint: Option<String>,
    /// Time of the last completed handshake. Up to 180 s ago in a healthy tunnel, so it does not detect
    /// failures by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handshake: Option<Time>,
}
