//! Kubernetes resources of Raven, and the names that the controller and the agents share. Types and pure functions
//! only, no I/O.
//!
//! Data flow: a user writes a [`gateway::Gateway`]; the controller elects gateway nodes and writes the Gateway's
//! status; the agent of each gateway node publishes a [`gateway_node::GatewayNode`]; every agent reads both kinds.
//!
//! - [`names`]: labels, annotations, ConfigMaps, ports. [`condition`]: condition types. [`proxy`]: names and ports of
//!   the L7 half.
//! - [`prefix`]: prefixes that are never accepted. [`event`]: notes of Events.
//! - [`guarded`]: reads lists in which single objects may be unreadable.
//! - [`gateway_v1alpha1`] and [`conversion`]: the oldest version of the Gateway, and its conversion.
//! - [`schema`]: the CRDs. [`pool`]: OpenYurt's NodePool.

#![forbid(unsafe_code)]

pub mod condition;
pub mod conversion;
pub mod event;
pub mod gateway;
pub mod gateway_node;
pub mod gateway_v1alpha1;
pub mod guarded;
pub mod key_proof;
pub mod names;
pub mod pool;
pub mod prefix;
pub mod proxy;
pub mod schema;

pub use gateway::{Gateway, GatewaySpec, GatewayStatus};
pub use gateway_node::{GatewayNode, GatewayNodeSpec, GatewayNodeStatus};
pub use guarded::Guarded;
pub use names::{
    AGENT_SERVICE_ACCOUNT, ANNOTATION_EXTRA_CIDRS, DEFAULT_NAMESPACE, DEFAULT_PROXY_PORT, DEFAULT_TUNNEL_PORT, GROUP,
    LABEL_EDGE_WORKER, LABEL_GATEWAY, LABEL_NODE_POOL, LABEL_NODE_POOL_OLD, MANAGER_AGENT, MANAGER_CONTROLLER,
};
