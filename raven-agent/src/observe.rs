//! Publishes the state of the node: its GatewayNode (server-side apply; this node's agent is the only writer),
//! metrics and health.

pub mod admin;
mod connected;
mod drops;
mod metrics;
mod publish;
mod status;

pub use drops::Drops;
pub use publish::{Latest, run as publish};
