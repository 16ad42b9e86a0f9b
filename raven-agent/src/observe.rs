//! What the node says of itself: its GatewayNode (server-side apply, this node's agent its only writer), metrics, health.

pub mod admin;
mod connected;
mod drops;
mod metrics;
mod publish;

pub use drops::Drops;
pub use publish::{Latest, Proxied, run as publish};
