//! Tests of the complete controller: the real binary with the permissions of `deploy/rbac.yaml`, against a real
//! API server. No dataplane.
//!
//! Each test runs in its own lab. It writes Nodes and Gateways as kubelets and users would, and asserts on the objects
//! that the API server returns. [`fixture`] provides the setup.

#![forbid(unsafe_code)]

mod admission;
mod agents;
mod claims;
mod election;
mod fixture;
mod gateway_nodes;
mod leader_election;
mod pools;
mod protected_prefixes;
mod proxies;
mod schema;
mod versions;
mod writes;
