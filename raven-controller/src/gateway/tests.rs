//! Tests of [`decide`](super::decide): examples and properties.

mod agents;
mod build;
mod cases;
mod laws;
mod links;
