//! The controller of Raven: elects gateway nodes, assigns prefixes to pools, and serves the cloud's part of
//! the L7 half.
//!
//! Modules in the order of the data flow:
//! - [`config`] parses the command line; [`app`] creates and runs all tasks.
//! - `watch` follows the API server; `cluster` stores the facts and publishes snapshots for both halves.
//! - L3: `gateway` decides, `reconcile` computes the difference, `apply` writes it.
//! - L7: `proxy` signs certificates and publishes Services and host names.
//! - `lead` elects the one replica that writes. [`webhook`] converts Gateways of v1alpha1. `ca` stores the certificate
//!   authorities. `health` answers the probes of the kubelet.
//! - `accept` takes connections for the two servers, `health` and the webhook.
//!
//! All state is stored in the API server, so a restart loses nothing but the quarantine of
//! cut-off nodes (`gateway::links`).

#![forbid(unsafe_code)]

pub mod app;
pub mod config;
pub mod webhook;

mod accept;
mod apply;
mod ca;
mod cluster;
#[cfg(test)]
mod fake_api;
mod gateway;
mod health;
mod lead;
mod proxy;
mod reconcile;
mod watch;
