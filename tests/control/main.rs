//! The controller, whole: the real program with the rights of `deploy/rbac.yaml`, against a real API server. No dataplane.
//!
//! Each test is a story in a lab of its own, told in API objects: Nodes and Gateways are written as kubelets and people would write
//! them, and what is asserted is what the API server then holds. [`stage`] sets the scene.

#![forbid(unsafe_code)]

mod admission;
mod claims;
mod election;
mod leaders;
mod pools;
mod protected;
mod proxies;
mod schema;
mod stage;
mod versions;
mod writes;
