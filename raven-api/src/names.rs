//! Names and ports that both programs use: labels, annotations, ConfigMaps, field managers. They are part of the API
//! and never change.

/// API group of all resources of Raven.
pub const GROUP: &str = "raven.openyurt.io";

/// Label on a Node, and on Services of Raven: name of the Gateway that the object belongs to.
pub const LABEL_GATEWAY: &str = "raven.openyurt.io/gateway";
/// Annotation on a Gateway: comma-separated prefixes behind the site that the pool may also send and receive.
pub const ANNOTATION_EXTRA_CIDRS: &str = "raven.openyurt.io/extra-allowed-source-cidrs";
/// Label on a Node: `"true"` marks an edge node; `"false"` or no label marks a cloud node.
pub const LABEL_EDGE_WORKER: &str = "openyurt.io/is-edge-worker";
/// Label on a Node: name of the NodePool that it belongs to.
pub const LABEL_NODE_POOL: &str = "apps.openyurt.io/nodepool";
/// Older form of [`LABEL_NODE_POOL`].
pub const LABEL_NODE_POOL_OLD: &str = "apps.openyurt.io/desired-nodepool";
/// Label on objects that the controller created. On a Gateway: a pool rule created it, and the controller deletes it
/// when no rule requires it. A user who removes the label takes the Gateway over.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Server-side-apply field manager of the controller.
pub const MANAGER_CONTROLLER: &str = "raven-controller";
/// Server-side-apply field manager of the agents.
pub const MANAGER_AGENT: &str = "raven-agent";

/// Namespace of Raven's namespaced objects in the default installation.
pub const DEFAULT_NAMESPACE: &str = "kube-system";
/// ServiceAccount of the agents.
pub const AGENT_SERVICE_ACCOUNT: &str = "raven-agent-account";
/// Label selector of the agents' Pods, as in deploy/agent.yaml.
pub const AGENT_PODS: &str = "app.kubernetes.io/name=raven-agent";

/// ConfigMap with the cluster-wide switches [`SWITCH_L3`] and [`SWITCH_L7`].
pub const SWITCHES_CONFIG_MAP: &str = "raven-cfg";
/// Key in [`SWITCHES_CONFIG_MAP`] and in an elected tunnel endpoint's `config`: `false` turns the L3 half off.
pub const SWITCH_L3: &str = "enable-l3-tunnel";
/// Key in [`SWITCHES_CONFIG_MAP`] and in an elected proxy endpoint's `config`: `false` turns the L7 half off.
pub const SWITCH_L7: &str = "enable-l7-proxy";
/// ConfigMap with settings of all agents.
pub const AGENT_CONFIG_MAP: &str = "raven-agent-config";
/// Key in [`AGENT_CONFIG_MAP`]: `true` forwards traffic to node addresses of other pools.
pub const AGENT_CONFIG_FORWARD_NODE_IP: &str = "forward-node-ip";

/// Namespace of the EndpointSlice that lists the API server's addresses.
pub const API_SERVER_NAMESPACE: &str = "default";
/// Name of the EndpointSlice that lists the API server's addresses.
pub const API_SERVER_SLICE: &str = "kubernetes";

/// Default address of the health probes of both programs: all addresses, port 10275.
pub const DEFAULT_HEALTH_PROBE_ADDR: &str = ":10275";
/// Default port of the L3 tunnel: used for an endpoint of type tunnel without `port`.
pub const DEFAULT_TUNNEL_PORT: u16 = 4500;
/// Default port of the L7 proxy: used for an endpoint of type proxy without `port`.
pub const DEFAULT_PROXY_PORT: u16 = 10262;
