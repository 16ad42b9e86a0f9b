//! Publishes the state of the node: its GatewayNode (server-side apply; this node's agent writes it), Events about its
//! Gateway, metrics and health.

pub mod admin;
mod connected;
mod drops;
mod events;
mod metrics;
mod publish;
pub mod secure;
mod status;

pub use drops::Drops;
pub use events::run as publish_events;
pub use publish::{Latest, run as publish};
