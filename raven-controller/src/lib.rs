//! The controller of Raven: Gateways, Nodes and NodePools in; elections, pool prefixes and conditions out.
//!
//! In the order data flows: [`config`] says how to run; [`watch`] turns what the API server holds into checked facts;
//! [`gateway`] decides, purely, what follows from them; [`reconcile`] has the difference written by [`apply`]; [`lead`] sees to it that one
//! replica alone writes; [`webhook`] converts Gateways of the oldest version for the API server; [`proxy`] signs the certificates
//! of the L7 half and leads clients to it (both webhook and proxies have a CA by [`authority`]); [`app`] puts them together; [`health`] tells the kubelet how it goes.
//! Nothing is remembered between two runs: all state is in the API server.

#![forbid(unsafe_code)]

pub mod app;
pub mod apply;
pub mod authority;
pub mod config;
#[cfg(test)]
mod fake_api;
pub mod gateway;
pub mod health;
pub mod lead;
pub mod proxy;
pub mod reconcile;
pub mod watch;
pub mod webhook;
pub mod world;
