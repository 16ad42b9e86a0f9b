//! What a gateway node says of itself. Written by that node's agent alone (a ValidatingAdmissionPolicy enforces it);
//! named after the node, so that a stolen box can publish nothing but its own key.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the node announces: others configure their tunnels from it.
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
    printcolumn = r#"{"name":"Peers","type":"string","jsonPath":".status.peerSummary","description":"peers with a live session / all"}"#,
    printcolumn = r#"{"name":"Proxy","type":"boolean","jsonPath":".status.proxy.ready","description":"the L7 proxy is ready"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message","priority":1}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".spec.version","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct GatewayNodeSpec {
    /// The Gateway that elected this node.
    #[serde(default)]
    pub gateway: String,
    /// WireGuard public key, base64 of 32 bytes. Its private half never leaves the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw480]=$"))]
    pub public_key: Option<String>,
    /// UDP port that the tunnel listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub listen_port: Option<i32>,
    /// The node's own addresses on its uplink, the outer address first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Version of the agent.
    #[serde(default)]
    pub version: String,
}

/// What the node observes. Never an input to anybody's configuration but for the peers' observed endpoints.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayNodeStatus {
    /// `kernel` or `userspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wireguard_backend: Option<String>,
    /// `xdp+tc` (fast), `tc` (fallback) or `stack`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataplane_tier: Option<String>,
    /// MTU of the tunnel device, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_mtu: Option<i32>,
    /// `live/all`, for `kubectl get`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_summary: Option<String>,
    /// The tunnel's peers, sorted by node name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerStatus>,
    /// The L7 proxy of this node, where it was elected for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyStatus>,
    /// What works and what does not, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// The L7 proxy of a gateway node.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// In the cloud: it listens, with a certificate. At an edge: it has a tunnel to a cloud gateway node. Services lead to ready ones only.
    pub ready: bool,
    /// Why it is not, or who it has tunnels with.
    #[serde(default)]
    pub message: String,
    /// Nodes at the other end of its tunnels, sorted.
    // Of cloud gateway nodes there are few. (No `x-kubernetes-list-type: set`: a list that becomes one later has elements that no field
    // manager owns, so server-side apply would never take the present ones away again.)
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub tunnels: Vec<String>,
}

/// One WireGuard peer as the node sees it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// The peer's node.
    pub node_name: String,
    /// The peer's Gateway.
    pub gateway: String,
    /// Where its packets come from right now (`address:port`): for a peer behind NAT, what its NAT made of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_endpoint: Option<String>,
    /// When the last handshake completed. Up to 180 s old in a sound tunnel: no failure detector by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handshake: Option<Time>,
}
