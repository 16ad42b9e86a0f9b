//! The resources that users write and read: types and names only, no I/O.
//!
//! In the order data flows: a person writes a [`gateway::Gateway`]; the controller elects and writes its status;
//! each gateway node's agent announces itself in a [`gateway_node::GatewayNode`]; every agent reads both.
//! [`proxy`] holds the names and numbers of the L7 path. [`guarded`] reads lists in which one object may be unreadable. [`conversion`] keeps the oldest version of the Gateway, [`gateway_v1alpha1`], readable and writable.
//! Names and numbers that OpenYurt users already have are kept (`API.md`).

#![forbid(unsafe_code)]

pub mod condition;
use std::time::Duration;

pub mod conversion;
pub mod gateway;
pub mod gateway_node;
pub mod gateway_v1alpha1;
pub mod guarded;
pub mod pool;
pub mod proxy;
pub mod schema;

pub use gateway::{Gateway, GatewaySpec, GatewayStatus};
pub use gateway_node::{GatewayNode, GatewayNodeSpec, GatewayNodeStatus};
pub use guarded::Guarded;

/// API group of all our resources.
pub const GROUP: &str = "raven.openyurt.io";

/// Label on a Node (and on our Services): the name of the Gateway that it belongs to.
pub const LABEL_GATEWAY: &str = "raven.openyurt.io/gateway";
/// Annotation on a Gateway: comma list of prefixes behind the site that the pool may also send and receive.
pub const ANNOTATION_EXTRA_CIDRS: &str = "raven.openyurt.io/extra-allowed-source-cidrs";
/// Label on a Node: `"true"` = edge, `"false"` or absent = cloud.
pub const LABEL_EDGE_WORKER: &str = "openyurt.io/is-edge-worker";
/// Label on a Node: the NodePool that it belongs to.
pub const LABEL_NODE_POOL: &str = "apps.openyurt.io/nodepool";
/// The older form of [`LABEL_NODE_POOL`].
pub const LABEL_NODE_POOL_OLD: &str = "apps.openyurt.io/desired-nodepool";

/// Server-side-apply field manager of the controller.
pub const MANAGER_CONTROLLER: &str = "raven-controller";
/// Server-side-apply field manager of the agents.
pub const MANAGER_AGENT: &str = "raven-agent";

/// Where Raven's namespaced objects live unless it is installed elsewhere.
pub const DEFAULT_NAMESPACE: &str = "kube-system";
/// Service account of the agents.
pub const AGENT_SERVICE_ACCOUNT: &str = "raven-agent-account";

/// How long the API server may say nothing on a connection that it owes an answer. One whose host lost its power with our request in hand
/// never says anything again. Watches ask for bookmarks, which come once a minute; the first one of an API server that has just started
/// after two (seen with 1.37). For a client's `read_timeout`, with `reset_reader_on_write`: it counts from the request, not from when its
/// pooled connection fell idle.
pub const API_SERVER_SILENCE: Duration = Duration::from_secs(150);

/// Port of the WireGuard tunnel, and what `Endpoint.port` means when it is left out for a tunnel.
pub const DEFAULT_TUNNEL_PORT: u16 = 4500;
/// Port of the L7 proxy, and what `Endpoint.port` means when it is left out for a proxy.
pub const DEFAULT_PROXY_PORT: u16 = 10262;
